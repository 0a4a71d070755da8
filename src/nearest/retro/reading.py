"""From the arguments of a forward pass to what its layers need of the neighbours."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from nearest.errors import SettingError
from nearest.retro.attention import hidden_keys, holds
from nearest.retro.cache import ChunkState, RetroCache
from nearest.retro.chunked import Encoded, Retrieved
from nearest.retro.config import RetroConfig
from nearest.retro.encoder import Encoder
from nearest.retro.layout import ChunkLayout


def layout_of(
    config: RetroConfig,
    input_ids: Int[Tensor, "batch columns"],
    attention_mask: Tensor | None,
    cache: Cache | None,
) -> ChunkLayout:
    """Where the tokens of a call stand: after a cache, and after padding on the left."""
    batch, columns = input_ids.shape
    seen = cache.get_seq_length() if cache is not None else 0
    if attention_mask is None:
        return ChunkLayout(config.chunk_size, columns, seen, (0,) * batch)
    if tuple(attention_mask.shape) != (batch, seen + columns):
        raise SettingError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, but must be (batch, "
            f"tokens so far) = ({batch}, {seen + columns})"
        )
    starts = (attention_mask.cumsum(1) == 0).sum(1)
    return ChunkLayout(config.chunk_size, columns, seen, tuple(starts.tolist()))


def neighbour_chunks(config: RetroConfig, layout: ChunkLayout) -> int:
    """How many chunks' neighbours a call comes with."""
    return layout.chunks if layout.seen else config.chunks(layout.columns)


def check_dtype(ids: Tensor) -> None:
    """Refuse what are no token ids (SettingError)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise SettingError(f"neighbour_ids must be token ids, int64, got {ids.dtype}: convert them")


def check_ids(name: str, ids: Tensor, least: int, vocab_size: int) -> None:
    """Refuse ids outside `least` … vocab_size − 1 (SettingError).

    On CPUs alone: elsewhere it would cost every pass a wait for the device, whose embedding asserts
    the upper end by itself.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < least or high >= vocab_size:
        raise SettingError(
            f"{name} lie in {low} … {high}, but the vocabulary has {vocab_size} tokens: use the "
            "model's own tokenizer" + ("; −1 or the padding token is padding" if least < 0 else "")
        )


def check_call(config: RetroConfig, layout: ChunkLayout, ids: Tensor, cache: Cache | None) -> None:
    """Refuse neighbours of a wrong shape, dtype or range, or that came too late (SettingError)."""
    if not config.cca_layers:
        raise SettingError("neighbour_ids are given, but cca_layers is empty: no layer reads them")
    check_dtype(ids)
    seen, batch = layout.seen, len(layout.starts)
    chunks = neighbour_chunks(config, layout)
    if ids.ndim != 4 or tuple(ids.shape[:2]) != (batch, chunks):
        raise SettingError(
            f"neighbour_ids have the shape {tuple(ids.shape)}, but must be (batch, chunks, "
            f"neighbours, length) = ({batch}, {chunks}, …): {layout.columns} tokens after {seen} "
            f"in chunks of {config.chunk_size}, chunk_count {config.chunk_count!r}"
        )
    check_ids("neighbour_ids", ids, -1, config.vocab_size)
    if layout.chunks and not ids.numel():
        raise SettingError(
            f"neighbour_ids have the shape {tuple(ids.shape)} and so no tokens: give padding where "
            "there are no neighbours, or None to switch retrieval off"
        )
    if cache is not None and (not isinstance(cache, RetroCache) or cache.chunk.columns != seen):
        raise SettingError(
            "this cache was filled without neighbours: start anew to switch retrieval on"
        )


def chunks_seen(
    mask: Bool[Tensor, "batch columns"] | None, layout: ChunkLayout
) -> Bool[Tensor, "batch chunks m"] | None:
    """Which tokens of the chunks that end in a pass are no padding; None where all are."""
    if mask is None or holds(mask, Tensor.all):
        return None
    columns = layout.chunk_columns().to(mask.device).clamp(max=mask.shape[1] - 1)
    return mask.gather(1, columns.flatten(1)).reshape(columns.shape)


Encode = Callable[[Tensor, Tensor, Tensor, Tensor | None], Encoded]
"""Ids of neighbours, which of them are no padding, the states of their chunks, and which of these
are none → what layers attend to."""


def encoding(config: RetroConfig, encoder: Encoder, embed: Callable[[Tensor], Tensor]) -> Encode:
    """How an encoder of the model's own reads neighbours; embed: ids → vectors."""

    def encode(ids: Tensor, seen: Tensor, context: Tensor, context_seen: Tensor | None) -> Encoded:
        states = encoder(embed(ids.clamp(min=0)), seen, context, context_seen)
        return Encoded(dict.fromkeys(config.cca_layers, states), None, seen.flatten(2))

    return encode


def no_padding(config: RetroConfig, ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which ids of neighbours are tokens."""
    return (ids != config.pad_token_id) & (ids >= 0)


class NeighbourReader:
    """Encodes a pass's neighbours when the first layer asks, and tells the others the same."""

    def __init__(
        self,
        config: RetroConfig,
        encode: Encode,
        layout: ChunkLayout,
        ids: Int[Tensor, "batch _ neighbours length"],
        context_seen: Bool[Tensor, "batch chunks m"] | None,
        state: ChunkState | None,
    ) -> None:
        """Of one pass.

        Args:
            config: the model's. encode: reads neighbours. layout: the pass.
            ids: neighbours of at least the finished chunks; −1 and pad_token_id are padding.
            context_seen: which tokens of the finished chunks are no padding; None where all are.
            state: what generation keeps between passes, updated; None without a cache.
        """
        self.config = config
        self.encode = encode
        self.layout = layout
        self.ids = ids[:, : layout.chunks]
        self.context_seen = context_seen
        self.state = state
        self._retrieved: Retrieved | None = None

    def __call__(self, x: Float[Tensor, "batch columns dim"]) -> Retrieved:
        """What a layer attends to; x: the decoder's states, which the encoder reads once."""
        if self._retrieved is None:
            self._retrieved = self._read(x)
        return self._retrieved

    def _read(self, x: Float[Tensor, "batch columns dim"]) -> Retrieved:
        layout, state = self.layout, self.state
        chunks, carry = layout.chunk_states(x, state.tensors.get("carry") if state else None)
        if state:
            state.begin(layout, x)
            state.keep("carry", carry)
        seen = no_padding(self.config, self.ids)
        shape = (seen.shape[2], seen.shape[3])
        encoded = new = None
        if layout.chunks:
            encoded = self.encode(self.ids, seen, chunks, self.context_seen)
            nulls = int(self.config.null_neighbour)
            new = nn.functional.pad(encoded.seen, (nulls, 0), value=True)
            if state:
                state.set_shape(shape)
        elif state and state.shape:
            shape = state.shape
        if layout.blocks == 0:
            return Retrieved(layout, shape[1], None, None, None, None)
        stack, current = layout.merge(state.tensors.get("seen") if state else None, new)
        if state:
            state.keep_current("seen", stack, current)
        silent = torch.tensor(layout.absent, device=x.device) | ~stack.any(-1)
        return Retrieved(
            layout,
            shape[1],
            encoded,
            hidden_keys(self.config, stack.flatten(0, 1), x),
            None if holds(silent, Tensor.any) is False else silent[..., None, None],
            state,
        )
