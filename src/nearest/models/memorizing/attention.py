"""Memorizing attention: the local segment and the nearest cached pairs, mixed by a gate per head.

Wu et al., 2022, arXiv:2203.08913, §3.1: g = σ(b), output = g · memory + (1 − g) · local, with the
same queries for both and separate softmaxes. Projections and positions are the decoder's own.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearest.errors import ModelError, SettingError
from nearest.models.memorizing.memory import AttentionMemory

# Henry et al., 2020 (arXiv:2010.04245) start at log2(L² − L); this is for segments of L = 512.
_SCALE_OF_NORMALISED = math.log2(512**2 - 512)


def attend_memory(
    queries: Float[Tensor, "batch heads q dim"], memory: AttentionMemory, k: int | None
) -> Float[Tensor, "batch heads q value_dim"]:
    """Softmax attention over the k pairs of each row's memory with the largest inner product.

    Scores are the inner products themselves: scale the queries before. Rows without memory give
    zeros. Query heads may be a multiple of the memory's. The gradient reaches the queries alone.

    Args:
        queries: scaled, and normalised if the memory's keys are.
        memory: pairs of earlier segments only, so that there is nothing to mask for causality.
        k: pairs for each query and head; None attends to all.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, columns = memory.keys.shape[1:3]
    if not columns:
        return queries.new_zeros(batch, heads, length, memory.values.shape[3])
    # Nothing is masked between queries here, so those that share a head are one longer sequence.
    grouped = queries.reshape(batch, kv_heads, -1, dim)
    if k is None or (k >= columns and memory.index is None):
        held = memory.held[:, None, None, :]
        # A row without memory sees zeros, not nothing: softmax over nothing is undefined.
        seen = held | ~held.any(-1, keepdim=True)
        found = F.scaled_dot_product_attention(
            grouped, memory.keys, memory.values, attn_mask=seen, scale=1.0
        )
    else:
        found = _attend_nearest(grouped, memory, k)
    return found.reshape(batch, heads, length, -1)


def _attend_nearest(
    queries: Float[Tensor, "batch heads q dim"], memory: AttentionMemory, k: int
) -> Float[Tensor, "batch heads q value_dim"]:
    columns = memory.nearest(queries, k)
    held = memory.held_at(columns)
    flat = columns.clamp(min=0).flatten(2)[..., None]
    shape = (*columns.shape, -1)
    keys = memory.keys.take_along_dim(flat, 2).reshape(shape)
    values = memory.values.take_along_dim(flat, 2).reshape(shape)
    scores = torch.einsum("bhqd,bhqkd->bhqk", queries, keys)
    # The least number, not −inf: a row without memory then weighs zeros equally, and is no NaN.
    scores = scores.masked_fill(~held, torch.finfo(scores.dtype).min)
    values = values.masked_fill(~held[..., None], 0)
    return torch.einsum("bhqk,bhqkv->bhqv", scores.softmax(-1), values)


class MemorizingAttention(nn.Module):
    """Causal attention over a segment and over the nearest pairs of the segments before it.

    Stands where a decoder's softmax attention stood, between its projections:

    >>> layer = MemorizingAttention(heads=2, dim=8, k=16)
    >>> memory = AttentionMemory.empty(batch=1, heads=2, dim=8, capacity=1024)
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)  # of one segment of five tokens
    >>> out = layer(q, k, v, memory)
    >>> memory = layer.remember(memory, k, v)  # for the segments that follow
    >>> out.shape, memory.lengths.tolist()
    (torch.Size([1, 2, 5, 8]), [5])

    A row whose memory is empty has the local attention alone, whatever its gate. Nothing is
    remembered but by `remember`: within a segment that is decoded token by token, the earlier
    tokens are in the local keys, and must not be in the memory too.

    Args:
        heads: query heads.
        dim: of each head.
        k: pairs each query attends to in each head, the paper's 32; None for all.
        initial_gate: of every head, in (0, 1); the learned parameter `gate` is its logit.
        normalise: give queries and keys unit length, as the paper does so that old and new keys
            do not differ in size, and learn the scale of each head.
        scale: of the scores; the learned one's beginning (default log2(512² − 512)), or, when not
            normalising, the fixed one (default dim^-½).

    Raises:
        SettingError: a setting is outside its range.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        k: int | None = 32,
        initial_gate: float = 0.5,
        normalise: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1:
            raise SettingError(f"heads and dim must be at least 1, got {heads} and {dim}")
        if k is not None and k < 1:
            raise SettingError(f"k must be at least 1, got {k}; for every pair give None")
        if not 0 < initial_gate < 1:
            raise SettingError(f"the gate must lie inside (0, 1), got {initial_gate}")
        if scale is not None and not (scale > 0 and math.isfinite(scale)):
            raise SettingError(f"the scale must be positive and finite, got {scale}")
        self.heads, self.dim, self.k, self.normalise = heads, dim, k, normalise
        self.initial_gate = initial_gate
        if scale is None:
            scale = _SCALE_OF_NORMALISED if normalise else dim**-0.5
        self.initial_scale = scale
        self.gate = nn.Parameter(torch.empty(heads))
        if normalise:
            self.scale = nn.Parameter(torch.empty(heads))
        else:
            self.register_buffer("scale", torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head's gate and scale as at the beginning."""
        nn.init.constant_(self.gate, math.log(self.initial_gate / (1 - self.initial_gate)))
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(
        self,
        queries: Float[Tensor, "_ _ _ _"],
        keys: Float[Tensor, "_ _ _ _"],
        values: Float[Tensor, "_ _ _ _"],
        memory: AttentionMemory,
        valid: Bool[Tensor, "_ _"] | Int[Tensor, "_ _"] | None = None,
        bias: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "_ _ _ _"]:
        """Attend.

        Args:
            queries: [batch, heads, q, dim], the last q positions of the segment.
            keys: [batch, kv_heads, length, dim] of the segment; heads is a multiple of kv_heads.
            values: [batch, kv_heads, length, value_dim].
            memory: of the segments before, one row for each of the batch.
            valid: [batch, length], False at padding, which is not attended to.
            bias: broadcasts to [batch, heads, q, length]; added to the local scores and not to the
                memory's, such as the paper's relative positions.

        Returns:
            [batch, heads, q, value_dim].

        Raises:
            ModelError: the shapes do not fit each other, this layer or the memory.
        """
        self._check_local(queries, keys, values)
        q, length = queries.shape[2], keys.shape[2]
        seen = torch.ones(q, length, dtype=torch.bool, device=keys.device).tril(length - q)
        if valid is not None:
            # Each position sees itself, even padding: softmax over nothing is undefined.
            own = torch.eye(length, dtype=torch.bool, device=keys.device)[length - q :]
            seen = seen & valid.bool()[:, None, None, :] | own
        added = torch.zeros_like(seen, dtype=queries.dtype) if bias is None else bias
        local = F.scaled_dot_product_attention(
            self._scaled(queries),
            self._unit(keys),
            values,
            attn_mask=added.masked_fill(~seen, -torch.inf),
            scale=1.0,
            enable_gqa=keys.shape[1] != self.heads,
        )
        return self.mixed(queries, local, memory)

    def mixed(
        self,
        queries: Float[Tensor, "batch heads q dim"],
        local: Float[Tensor, "batch heads q value_dim"],
        memory: AttentionMemory,
    ) -> Float[Tensor, "batch heads q value_dim"]:
        """The memory's part mixed into a local attention that was computed elsewhere.

        Raises:
            ModelError: the memory does not fit.
        """
        self._check_memory(queries, local, memory)
        found = attend_memory(self._scaled(queries).to(memory.keys.dtype), memory, self.k)
        has_memory = memory.held.any(1)[:, None, None, None]
        gate = torch.where(has_memory, self.gate.sigmoid()[:, None, None], 0.0)
        return (gate * found + (1 - gate) * local).to(local.dtype)

    def remember(
        self,
        memory: AttentionMemory,
        keys: Float[Tensor, "_ _ _ _"],
        values: Float[Tensor, "_ _ _ _"],
        valid: Bool[Tensor, "_ _"] | Int[Tensor, "_ _"] | None = None,
    ) -> AttentionMemory:
        """The memory with a finished segment's pairs, its keys normalised if this layer does so.

        Raises:
            ModelError: the pairs do not fit the memory, or are not finite.
        """
        return memory.extended(self._unit(keys), values, valid)

    def _unit(self, keys: Tensor) -> Tensor:
        return F.normalize(keys, dim=-1) if self.normalise else keys

    def _scaled(self, queries: Tensor) -> Tensor:
        return self._unit(queries) * self.scale[:, None, None].to(queries.dtype)

    def _check_local(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        batch, heads, q, dim = queries.shape
        fits = (
            (heads, dim, keys.shape[3]) == (self.heads, self.dim, self.dim)
            and (keys.shape[0], values.shape[0]) == (batch, batch)
            and keys.shape[1:3] == values.shape[1:3]
            and keys.shape[1] >= 1
            and heads % keys.shape[1] == 0
            and q <= keys.shape[2]
        )
        if not fits:
            raise ModelError(
                f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
                f"{tuple(values.shape)} do not fit a layer of {self.heads} heads of {self.dim}: "
                "give [batch, heads, length, dim], keys and values alike, at least as many as "
                "queries, in heads that divide the layer's"
            )

    def _check_memory(self, queries: Tensor, local: Tensor, memory: AttentionMemory) -> None:
        batch, kv_heads, _, dim = memory.keys.shape
        found = (queries.shape[0], queries.shape[3], local.shape[3])
        if found != (batch, dim, memory.values.shape[3]) or self.heads % kv_heads:
            raise ModelError(
                f"the memory holds {batch} rows of {kv_heads} heads with keys of {dim} and values "
                f"of {memory.values.shape[3]} dims, the batch has {found[0]} rows of {self.heads} "
                f"heads with keys of {found[1]} and values of {found[2]}: begin an empty memory "
                "for it (memory.rows chooses and repeats rows)"
            )
