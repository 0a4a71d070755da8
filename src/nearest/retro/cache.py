"""What generation keeps between forward passes."""

from dataclasses import dataclass, field
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from nearest.errors import SettingError


@dataclass
class ChunkState:
    """What chunked cross-attention needs of the passes before.

    `tensors` are batch-first: the unfinished chunk's hidden states where the encoder reads
    ("carry"), and of the neighbours acting now each layer's keys and values and what is padding.
    """

    columns: int = 0  # read so far, padding included
    shape: tuple[int, int] | None = None  # neighbours of a chunk, and tokens of each
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Store a tensor; of a view its own numbers alone, so that a long prompt's are freed."""
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        self.tensors[name] = tensor if whole else tensor.clone()

    def set_shape(self, shape: tuple[int, int]) -> None:
        """Note the neighbours' shape, or refuse another than before (SettingError)."""
        if self.shape not in (None, shape):
            raise SettingError(
                f"the neighbours of a chunk have the shape {shape}, those of chunks before "
                f"{self.shape}: give every chunk as many neighbours, padded to one length"
            )
        self.shape = shape

    def select(self, rows: Int[Tensor, " n"]) -> None:
        """Keep, repeat or re-order rows of the batch."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_select(0, rows.to(tensor.device))


class RetroCache(DynamicCache):
    """Self-attention keys and values, and the state of the current chunk, row by row."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.chunk = ChunkState()

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Let each beam go on from the one it extends."""
        super().reorder_cache(cast(Any, beam_idx))
        self.chunk.select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " n"]) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self.chunk.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        for name, tensor in self.chunk.tensors.items():
            self.chunk.tensors[name] = tensor.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.chunk = ChunkState()

    @property
    def is_croppable(self) -> bool:
        """False: neighbours of chunks before the current one are not kept."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget the last tokens, which assisted decoding asks for."""
        if tokens_to_remove:
            raise SettingError(
                "the cache cannot go back, which assisted decoding needs: generate without an "
                "assistant or prompt lookup, or with use_cache=False"
            )
