"""Multi-head attention: within a sequence, to another one, and to a chunk's neighbours."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nearest.retro.cache import ChunkState, RetroCache
from nearest.retro.chunks import Segment
from nearest.retro.config import RetroConfig
from nearest.retro.positions import BucketBias, Rotation, rotate, rotation


def hidden_keys(
    config: RetroConfig, seen: Bool[Tensor, "batch keys"], x: Tensor
) -> Float[Tensor, "batch 1 1 keys"] | None:
    """What is added to the scores of keys: 0 where seen; None where all are. In x's dtype.

    Never −∞: a row whose keys are all hidden, as of padding itself, has some mean and not a NaN.
    """
    if bool(seen.all()):
        return None
    score = config.masked_score
    if score is None:
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        score = torch.finfo(torch.get_autocast_dtype(kind) if autocast else x.dtype).min / 2
    zeros = torch.zeros(seen.shape, dtype=x.dtype, device=seen.device)
    return zeros.masked_fill(~seen, score)[:, None, None]


def attend(
    q: Float[Tensor, "batch heads q dim"],
    k: Float[Tensor, "batch heads k dim"],
    v: Float[Tensor, "batch heads k dim"],
    bias: Float[Tensor, "#heads q k"] | None,
    hidden: Float[Tensor, "#batch #heads #q k"] | None,
    *,
    causal: bool = False,
    scale: float,
    dropout: float,
) -> Float[Tensor, "batch heads q dim"]:
    """Softmax attention with a bias of the scores and hidden keys.

    PyTorch's fused kernel keeps no scores, but gives no gradient to a bias and on CPUs no dropout:
    there its fallback makes more copies of the scores than the three lines here.
    """
    if dropout == 0 and not (bias is not None and bias.requires_grad):
        mask = bias if bias is None else bias[None]
        if hidden is not None:
            mask = hidden if mask is None else mask + hidden
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    scores = (q * scale if scale != 1 else q) @ k.mT
    if bias is not None:
        scores += bias
    if hidden is not None:
        scores += hidden
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(later, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


class Attention(nn.Module):
    """Projections, heads and position biases; the subclasses say who attends to whom."""

    def __init__(
        self, config: RetroConfig, side: str, context_dim: int, buckets: int, causal: bool = False
    ) -> None:
        super().__init__()
        dim, inner = getattr(config, f"{side}_dim"), getattr(config, f"{side}_attention_dim")
        self.config = config
        self.side = side
        self.heads: int = getattr(config, f"{side}_heads")
        self.causal = causal
        self.scale: float = (inner // self.heads) ** -0.5 if config.scale_scores else 1.0
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=config.bias)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.bias = (
            BucketBias(
                buckets, self.heads, causal, config.bucket_spacing, config.bucket_max_distance
            )
            if config.positions == "buckets"
            else None
        )

    def split(self, x: Float[Tensor, "*batch n inner"]) -> Float[Tensor, "*batch heads n head_dim"]:
        """One matrix a head."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def keys_values(
        self, context: Float[Tensor, "*batch n dim"]
    ) -> tuple[Float[Tensor, "*batch heads n head_dim"], Float[Tensor, "*batch heads n head_dim"]]:
        """Of every head."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def mix(
        self,
        q: Float[Tensor, "batch heads q dim"],
        k: Float[Tensor, "batch heads k dim"],
        v: Float[Tensor, "batch heads k dim"],
        bias: Float[Tensor, "#heads q k"] | None = None,
        hidden: Float[Tensor, "#batch #heads #q k"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch q model"]:
        """Attend, join the heads and project."""
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed = attend(q, k, v, bias, hidden, causal=causal, scale=self.scale, dropout=dropout)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class SelfAttention(Attention):
    """A sequence attends to itself, the decoder's only backwards."""

    def __init__(self, config: RetroConfig, side: str, layer: int) -> None:
        causal = side == "decoder"
        buckets = config.decoder_buckets if causal else config.encoder_buckets
        super().__init__(config, side, getattr(config, f"{side}_dim"), buckets, causal)
        self.layer = layer

    def forward(
        self,
        x: Float[Tensor, "batch n dim"],
        hidden: Float[Tensor, "batch 1 1 k"] | None = None,
        positions: Rotation | None = None,
        cache: RetroCache | None = None,
    ) -> Float[Tensor, "batch n dim"]:
        """Attend to these states, after those of the cache.

        Args:
            x: normed states.
            hidden: added to the scores of each key, cached ones included; None where all are seen.
            positions: rotations of x.
            cache: keys and values of earlier passes; these are added.
        """
        q = self.split(self.q(x))
        k, v = self.keys_values(x)
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        queries, keys = q.shape[-2], k.shape[-2]
        causal = self.causal and queries > 1
        if self.bias is not None:
            bias = self.bias(queries, keys, keys - queries, hide_later=causal)
            return self.mix(q, k, v, bias, hidden)
        if not causal or (queries == keys and hidden is None):
            return self.mix(q, k, v, None, hidden, causal=causal)
        later = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
        later = later.triu(keys - queries + 1)[None]
        bias = torch.zeros(later.shape, dtype=x.dtype, device=x.device)
        return self.mix(q, k, v, bias.masked_fill(later, -torch.inf), hidden)


class ContextAttention(Attention):
    """The encoder's states of a chunk's neighbours attend to the chunk."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__(config, "encoder", config.decoder_dim, config.encoder_cross_buckets)

    def forward(
        self,
        x: Float[Tensor, "sequences length dim"],
        context: Float[Tensor, "chunks m context_dim"],
        hidden: Float[Tensor, "chunks 1 1 m"] | None,
    ) -> Float[Tensor, "sequences length dim"]:
        """All neighbours of a chunk are one sequence of queries: its keys are made once."""
        neighbours, length, m = len(x) // len(context), x.shape[1], context.shape[1]
        q = self.split(self.q(x).unflatten(0, (len(context), neighbours)).flatten(1, 2))
        k, v = self.keys_values(context)
        bias = None
        if self.bias is not None:
            bias = self.bias(length, m).repeat(1, neighbours, 1)
        else:
            dim = self.config.rotary_dim
            places = torch.arange(length).repeat(neighbours)
            q = rotate(q, rotation(places, dim, q))
            k = rotate(k, rotation(torch.arange(m), dim, k))
        return self.mix(q, k, v, bias, hidden).reshape(x.shape)


@dataclass(frozen=True)
class Retrieved:
    """What the neighbours of one forward pass give to every layer that attends to them."""

    segment: Segment
    length: int  # tokens of a neighbour
    encoded: Float[Tensor, "batch chunks tokens dim"] | None  # None: no chunk ends in this pass
    hidden: Float[Tensor, "sequences 1 1 keys"] | None  # added to scores; None: all are seen
    silent: Bool[Tensor, "batch blocks 1 1"] | None  # blocks to which nothing is added
    state: ChunkState | None  # of generation; taken from and left for the next pass


class ChunkedCrossAttention(Attention):
    """A sequence attends to the neighbours of the chunk before (arXiv:2112.04426, §2.4)."""

    def __init__(self, config: RetroConfig, layer: int) -> None:
        super().__init__(config, "decoder", config.encoder_output_dim, config.cca_bucket_count)
        self.layer = layer
        inner = config.decoder_attention_dim
        self.null = nn.Parameter(torch.randn(2 * inner)) if config.null_neighbour else None

    def forward(
        self, x: Float[Tensor, "batch n dim"], retrieved: Retrieved
    ) -> Float[Tensor, "batch n dim"]:
        """Zeros before the first chunk ends and where all neighbours are padding."""
        segment = retrieved.segment
        if segment.blocks == 0:
            return torch.zeros_like(x)
        k, v = self._keys_values(retrieved)
        q = self.split(segment.into_blocks(self.q(x)))
        if self.bias is None:
            q = rotate(q, self._query_rotation(segment, q))
        answers = self.mix(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *self._scores(retrieved, k)
        ).unflatten(0, q.shape[:2])
        if retrieved.silent is not None:
            answers = answers.masked_fill(retrieved.silent, 0)
        return segment.from_blocks(answers)

    def _keys_values(self, retrieved: Retrieved) -> tuple[Tensor, Tensor]:
        """Of what each block attends to, (batch, blocks, heads, keys, dim); updates the state."""
        new: list[Tensor | None] = [None, None]
        if retrieved.encoded is not None:
            k, v = self.keys_values(retrieved.encoded)
            if self.bias is None:
                places = torch.arange(k.shape[-2]) % retrieved.length
                k = rotate(k, rotation(places, self.config.rotary_dim, k))
            new = [self._with_null(k, 0), self._with_null(v, 1)]
        old = retrieved.state.tensors if retrieved.state else {}
        stacks = []
        for name, tensor in zip((f"keys.{self.layer}", f"values.{self.layer}"), new, strict=True):
            stack, current = retrieved.segment.merge(old.get(name), tensor)
            stacks.append(stack)
            if retrieved.state:
                retrieved.state.keep(name, current)
        return stacks[0], stacks[1]

    def _with_null(self, x: Float[Tensor, "b c h n d"], which: int) -> Float[Tensor, "b c h k d"]:
        if self.null is None:
            return x
        null = self.null.chunk(2)[which].reshape(self.heads, 1, -1)
        return torch.cat([null.expand(*x.shape[:2], -1, -1, -1), x], dim=-2)

    def _query_rotation(self, segment: Segment, q: Tensor) -> Rotation:
        m = self.config.chunk_size
        if self.config.cca_rotary == "aligned":
            places = segment.rows + m - 1
        else:
            places = (segment.rows == 0) * (2 * m - 2)
        cos, sin = rotation(places, self.config.rotary_dim, q)
        return cos[:, None, None], sin[:, None, None]

    def _scores(self, retrieved: Retrieved, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to scores: for all sequences alike, and for each."""
        if self.bias is None:
            return None, retrieved.hidden
        segment, m = retrieved.segment, self.config.chunk_size
        nulls = 0 if self.null is None else 1
        keys, ahead = k.shape[-2] - nulls, 0
        if self.config.cca_buckets == "shared":
            keys, ahead = retrieved.length, m - 1
        if segment.single and segment.uniform:
            bias = self.bias(1, keys, ahead + int(segment.rows))
        else:
            bias = self.bias(m, keys, ahead)
        if self.config.cca_buckets == "shared":
            bias = bias.repeat(1, 1, k.shape[-2] // keys)
        bias = F.pad(bias, (nulls, 0))
        if segment.uniform or not segment.single:
            return bias, retrieved.hidden
        mine = bias[:, segment.rows[:, 0]].transpose(0, 1)[:, :, None]
        return None, mine if retrieved.hidden is None else mine + retrieved.hidden
