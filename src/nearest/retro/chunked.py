"""Chunked cross-attention: from a sequence to the neighbours of its chunks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nearest.retro.attention import Attention
from nearest.retro.cache import ChunkState
from nearest.retro.config import RetroConfig
from nearest.retro.layout import ChunkLayout
from nearest.retro.positions import Rotation, rotate, rotation


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of the neighbours of the chunks that end in a pass.

    Attributes:
        states: of each token, by the number of the layer that attends to them.
        following: vectors of the tokens that come next; None where values are made of the states.
        seen: which tokens there are to attend to.
    """

    states: Mapping[int, Float[Tensor, "batch chunks tokens dim"]]
    following: Float[Tensor, "batch chunks tokens next_dim"] | None
    seen: Bool[Tensor, "batch chunks tokens"]


@dataclass(frozen=True)
class Retrieved:
    """What the neighbours of one forward pass give to every layer that attends to them."""

    layout: ChunkLayout
    length: int  # tokens of a neighbour
    encoded: Encoded | None  # None: no chunk ends in this pass
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
        layout = retrieved.layout
        if layout.blocks == 0:
            return torch.zeros_like(x)
        k, v = self._keys_values(retrieved)
        q = self.split(layout.into_blocks(self.q(x)))
        if self.bias is None:
            q = rotate(q, self._query_rotation(layout, q))
        found = self.attended(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *self._scores(retrieved, k)
        )
        answers = self.joined(found).unflatten(0, q.shape[:2])
        if retrieved.silent is not None:
            answers = answers.masked_fill(retrieved.silent, 0)
        return layout.from_blocks(answers)

    def _keys_values(self, retrieved: Retrieved) -> tuple[Tensor, Tensor]:
        """Of what each block attends to, (batch, blocks, heads, keys, dim); updates the state."""
        new: list[Tensor | None] = [None, None]
        if retrieved.encoded is not None:
            k, v = self._of(retrieved.encoded)
            if self.bias is None:
                places = torch.arange(k.shape[-2]) % retrieved.length
                k = rotate(k, rotation(places, self.config.rotary_dim, k))
            new = [self._with_null(k, 0), self._with_null(v, 1)]
        old = retrieved.state.tensors if retrieved.state else {}
        stacks = []
        for name, tensor in zip((f"keys.{self.layer}", f"values.{self.layer}"), new, strict=True):
            stack, current = retrieved.layout.merge(old.get(name), tensor)
            stacks.append(stack)
            if retrieved.state:
                retrieved.state.keep_current(name, stack, current)
        return stacks[0], stacks[1]

    def _of(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbours, (batch, chunks, heads, tokens, dim)."""
        return self.keys_values(encoded.states[self.layer])

    def _with_null(self, x: Float[Tensor, "b c h n d"], which: int) -> Float[Tensor, "b c h k d"]:
        if self.null is None:
            return x
        null = self.null.chunk(2)[which].reshape(self.heads, 1, -1)
        return torch.cat([null.expand(*x.shape[:2], -1, -1, -1), x], dim=-2)

    def _query_rotation(self, layout: ChunkLayout, q: Tensor) -> Rotation:
        m = self.config.chunk_size
        if self.config.cca_rotary == "aligned":
            places = layout.rows + m - 1
        else:
            places = (layout.rows == 0) * (2 * m - 2)
        cos, sin = rotation(places, self.config.rotary_dim, q)
        return cos[:, None, None], sin[:, None, None]

    def _scores(self, retrieved: Retrieved, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to scores: for all sequences alike, and for each."""
        if self.bias is None:
            return None, retrieved.hidden
        layout, m = retrieved.layout, self.config.chunk_size
        nulls = 0 if self.null is None else 1
        keys, ahead = k.shape[-2] - nulls, 0
        if self.config.cca_buckets == "shared":
            keys, ahead = retrieved.length, m - 1
        if layout.single and layout.uniform:
            bias = self.bias(1, keys, ahead + int(layout.rows))
        else:
            bias = self.bias(m, keys, ahead)
        if self.config.cca_buckets == "shared":
            bias = bias.repeat(1, 1, k.shape[-2] // keys)
        bias = F.pad(bias, (nulls, 0))
        if layout.uniform or not layout.single:
            return bias, retrieved.hidden
        mine = bias[:, layout.rows[:, 0]].transpose(0, 1)[:, :, None]
        return None, mine if retrieved.hidden is None else mine + retrieved.hidden
