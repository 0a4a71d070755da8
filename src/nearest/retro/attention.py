"""Multi-head attention: within a sequence, and from a neighbour to its chunk."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nearest.models.memorizing.attention import MemorizingAttention
from nearest.models.memorizing.decoder import DecoderMemory, Pairs
from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.retro.dropout import Dropout, drop
from nearest.retro.positions import BucketBias, Rotation, rotate, rotation


def holds(mask: Bool[Tensor, "*shape"], question: Callable[[Tensor], Tensor]) -> bool | None:
    """`mask.all()` or `mask.any()` on CPUs; None elsewhere, where the host would have to wait."""
    return bool(question(mask)) if mask.device.type == "cpu" else None


def hidden_keys(
    config: RetroConfig, seen: Bool[Tensor, "batch keys"], x: Tensor
) -> Float[Tensor, "batch 1 1 keys"] | None:
    """Additive attention mask in x's dtype: 0 where a key is seen, a large negative number if not.

    Never −∞: a row whose keys are all hidden, as padding's own may be, must give no NaN. None where
    all keys are seen, which is only looked for on CPUs.
    """
    if holds(seen, Tensor.all):
        return None
    score = config.masked_score
    if score is None:
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
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
    return drop(scores.softmax(-1), dropout) @ v


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
        self.head_dim: int = getattr(config, f"{side}_head_dim")
        self.scale: float = self.head_dim**-0.5 if config.scale_scores else 1.0
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=config.bias)
        self.dropout = Dropout(config.residual_dropout)
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

    def attended(
        self,
        q: Float[Tensor, "batch heads q dim"],
        k: Float[Tensor, "batch heads k dim"],
        v: Float[Tensor, "batch heads k dim"],
        bias: Float[Tensor, "#heads q k"] | None = None,
        hidden: Float[Tensor, "#batch #heads #q k"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch heads q dim"]:
        """What each head finds in the values."""
        dropout = self.config.attention_dropout if self.training else 0.0
        return attend(q, k, v, bias, hidden, causal=causal, scale=self.scale, dropout=dropout)

    def joined(self, found: Float[Tensor, "batch heads q dim"]) -> Float[Tensor, "batch q model"]:
        """The heads side by side, projected."""
        return self.dropout(self.out(found.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Recall:
    """What the memorizing layers of one pass read, and the pairs that each makes of the segment.

    A layer that gradient checkpointing repeats replaces its pairs by equal ones.
    """

    memory: DecoderMemory
    pairs: dict[int, Pairs] = field(default_factory=dict)

    def remembered(self, valid: Bool[Tensor, "batch n"] | None) -> DecoderMemory:
        """The memory with the pairs of every layer; `valid`: which tokens are no padding."""
        return self.memory.extended([self.pairs[i] for i in sorted(self.pairs)], valid)


class SelfAttention(Attention):
    """A sequence attends to itself, the decoder's only backwards."""

    def __init__(self, config: RetroConfig, side: str, layer: int) -> None:
        causal = side == "decoder"
        buckets = config.decoder_buckets if causal else config.encoder_buckets
        super().__init__(config, side, getattr(config, f"{side}_dim"), buckets, causal)
        self.layer = layer
        self.memorizing: MemorizingAttention | None = None
        if causal and layer in config.memorizing_layers:
            self.memorizing = MemorizingAttention(
                self.heads,
                self.head_dim,
                k=config.memorizing_k,
                initial_gate=config.memorizing_initial_gate,
                normalise=False,
                scale=self.scale,
            )

    def forward(
        self,
        x: Float[Tensor, "batch n dim"],
        hidden: Float[Tensor, "batch 1 1 k"] | None = None,
        positions: Rotation | None = None,
        cache: RetroCache | None = None,
        recall: Recall | None = None,
    ) -> Float[Tensor, "batch n dim"]:
        """Attend to these states, after those of the cache, and to the memory.

        Args:
            x: normed states.
            hidden: added to the scores of each key, cached ones included; None where all are seen.
            positions: rotations of x.
            cache: keys and values of earlier passes; these are added.
            recall: read, and given the pairs of this pass, by a layer that memorizes.
        """
        q = self.split(self.q(x))
        k, v = self.keys_values(x)
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        found = self._attended_locally(q, k, v, hidden)
        if self.memorizing is not None and recall is not None:
            number = self.config.memorizing_layers.index(self.layer)
            recall.pairs[number] = (k.detach(), v.detach())
            found = self.memorizing.mixed(q, found, recall.memory.layers[number])
        return self.joined(found)

    def _attended_locally(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        """Attention of the last queries to all keys, each to those before it where it is causal."""
        queries, keys = q.shape[-2], k.shape[-2]
        causal = self.causal and queries > 1
        if self.bias is not None:
            bias = self.bias(queries, keys, keys - queries, hide_later=causal)
            return self.attended(q, k, v, bias, hidden)
        if not causal or (queries == keys and hidden is None):
            return self.attended(q, k, v, None, hidden, causal=causal)
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        later = later.triu(keys - queries + 1)[None]
        bias = torch.zeros(later.shape, dtype=q.dtype, device=q.device)
        return self.attended(q, k, v, bias.masked_fill(later, -torch.inf), hidden)


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
        return self.joined(self.attended(q, k, v, bias, hidden)).reshape(x.shape)
