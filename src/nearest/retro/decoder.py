"""One layer of the decoder."""

from jaxtyping import Float
from torch import Tensor, nn

from nearest.retro.attention import Recall, SelfAttention
from nearest.retro.blocks import FeedForward, Residual
from nearest.retro.cache import RetroCache
from nearest.retro.chunked import ChunkedCrossAttention
from nearest.retro.config import RetroConfig
from nearest.retro.positions import Rotation
from nearest.retro.reading import NeighbourReader


class DecoderLayer(nn.Module):
    """Self-attention, chunked cross-attention in some layers, feed-forward."""

    def __init__(self, config: RetroConfig, layer: int) -> None:
        super().__init__()
        self.self_attention = Residual(config, "decoder", SelfAttention(config, "decoder", layer))
        self.chunked_cross_attention = (
            Residual(config, "decoder", ChunkedCrossAttention(config, layer))
            if layer in config.cca_layers
            else None
        )
        self.feed_forward = Residual(config, "decoder", FeedForward(config, "decoder"))

    def forward(
        self,
        x: Float[Tensor, "batch n dim"],
        hidden: Float[Tensor, "batch 1 1 k"] | None,
        turns: Rotation | None,
        cache: RetroCache | None,
        read: NeighbourReader | None,
        recall: Recall | None,
    ) -> Float[Tensor, "batch n dim"]:
        """See `SelfAttention`; read: None switches retrieval off, recall: None the memory."""
        x = self.self_attention(x, hidden, turns, cache, recall)
        if self.chunked_cross_attention is not None and read is not None:
            x = self.chunked_cross_attention(x, read(x))
        return self.feed_forward(x)
