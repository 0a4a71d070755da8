"""What a whole decoder remembers: one memory for each of its memorizing layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearest.models.memorizing.memory import AttentionMemory

Pairs = tuple[Float[Tensor, "_ _ _ _"], Float[Tensor, "_ _ _ _"]]
"""Keys and values that one layer makes of a segment."""


@dataclass(frozen=True, eq=False)
class DecoderMemory:
    """The memories of a decoder's memorizing layers, in order; a value, as each of them is.

    All have the same rows, one for each document that is read, and hold pairs of the same tokens.
    """

    layers: tuple[AttentionMemory, ...]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens that each row remembers."""
        return self.layers[0].lengths

    def extended(
        self,
        segment: Sequence[Pairs],
        valid: Bool[Tensor, "_ _"] | Int[Tensor, "_ _"] | None = None,
    ) -> "DecoderMemory":
        """A memory with every layer's pairs of a segment after its own.

        Args:
            segment: of each layer, as in `AttentionMemory.extended`.
            valid: [batch, length], False where a row is padded.

        Raises:
            ModelError: the pairs do not fit the memories, or are not finite.
        """
        return DecoderMemory(
            tuple(
                memory.extended(keys, values, valid)
                for memory, (keys, values) in zip(self.layers, segment, strict=True)
            )
        )

    def cleared(self, ended: Bool[Tensor, " _"] | Int[Tensor, " _"]) -> "DecoderMemory":
        """A memory with nothing in the rows whose document has ended.

        Raises:
            ModelError: `ended` does not have one value for each row.
        """
        return DecoderMemory(tuple(memory.cleared(ended) for memory in self.layers))

    def rows(self, chosen: Int[Tensor, " chosen"]) -> "DecoderMemory":
        """The memories of chosen rows, which may repeat: for beams and re-ordered batches."""
        return DecoderMemory(tuple(memory.rows(chosen) for memory in self.layers))
