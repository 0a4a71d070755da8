"""What generation keeps between forward passes."""

from dataclasses import dataclass, field, replace
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from nearest.errors import SettingError
from nearest.retro.layout import ChunkLayout


@dataclass
class LastPass:
    """What a pass was made of, so that its last tokens can be taken back."""

    layout: ChunkLayout
    states: Tensor  # (batch, columns, dim), where the encoder reads
    carry: Tensor | None  # of the unfinished chunk before
    stacks: dict[str, Tensor] = field(default_factory=dict)  # of all its blocks


@dataclass
class ChunkState:
    """What chunked cross-attention needs of the passes before.

    `tensors` are batch-first: the unfinished chunk's hidden states where the encoder reads
    ("carry"), and of the neighbours acting now each layer's keys and values and what is padding.
    """

    columns: int = 0  # read so far, padding included
    shape: tuple[int, int] | None = None  # neighbours of a chunk, and tokens of each
    tensors: dict[str, Tensor] = field(default_factory=dict)
    recording: bool = False  # keep the last pass
    last: LastPass | None = None

    def begin(self, layout: ChunkLayout, states: Tensor) -> None:
        """Note a pass that starts."""
        self.columns += layout.columns
        carry = self.tensors.get("carry")
        self.last = LastPass(layout, states, carry) if self.recording else None

    def keep_current(self, name: str, stack: Tensor, current: Tensor) -> None:
        """Store what stays of what the blocks of a pass attended to."""
        self.keep(name, current)
        if self.last is not None:
            self.last.stacks[name] = stack

    def crop(self, tokens: int) -> None:
        """Take back the last tokens of the last pass, as assisted decoding does with drafts."""
        if "input" in self.tensors:
            self.tensors["input"] = self.tensors["input"][:, :-tokens]
        if self.columns == 0:  # retrieval is off
            return
        if self.last is None or tokens >= self.last.layout.columns:
            raise SettingError(
                f"{tokens} tokens cannot be taken back: only some of the last pass can, after "
                "activate_past_recording()"
            )
        last = self.last
        layout = replace(last.layout, columns=last.layout.columns - tokens)
        self.columns -= tokens
        self.keep("carry", layout.chunk_states(last.states[:, : layout.columns], last.carry)[1])
        for name, stack in last.stacks.items():
            if layout.first_block == 1 and layout.chunks == 0:
                del self.tensors[name]  # no chunk has ended
            else:
                self.keep(name, layout.current(stack))
        self.last = None

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

    def activate_past_recording(self) -> None:
        """From now on keep what each pass was made of, so that `crop` can take tokens back."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.chunk.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, a negative number of them, which the last pass has read.

        Raises:
            SettingError: they are more than the last pass read, or it was not recorded.
        """
        if tokens_to_remove:
            self.chunk.crop(-tokens_to_remove)
        super().crop(tokens_to_remove)
