"""Neighbours, read in the light of the chunk they were found for."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearest.retro.attention import ContextAttention, SelfAttention, hidden_keys
from nearest.retro.blocks import FeedForward, Residual
from nearest.retro.config import RetroConfig
from nearest.retro.norms import make_norm
from nearest.retro.positions import Rotation, rotation


class EncoderLayer(nn.Module):
    """Self-attention, attention to the chunk in some layers, feed-forward."""

    def __init__(self, config: RetroConfig, layer: int) -> None:
        super().__init__()
        self.self_attention = Residual(config, "encoder", SelfAttention(config, "encoder", layer))
        self.context_attention = (
            Residual(config, "encoder", ContextAttention(config))
            if layer in config.encoder_cross_layers
            else None
        )
        self.feed_forward = Residual(config, "encoder", FeedForward(config, "encoder"))

    def forward(
        self,
        x: Float[Tensor, "sequences length dim"],
        hidden: Float[Tensor, "sequences 1 1 length"] | None,
        positions: Rotation | None,
        context: Float[Tensor, "chunks m decoder_dim"],
        context_hidden: Float[Tensor, "chunks 1 1 m"] | None,
    ) -> Float[Tensor, "sequences length dim"]:
        """See `SelfAttention` and `ContextAttention`."""
        x = self.self_attention(x, hidden, positions)
        if self.context_attention is not None:
            x = self.context_attention(x, context, context_hidden)
        return self.feed_forward(x)


class Encoder(nn.Module):
    """Bidirectional over each neighbour; its states become keys of chunked cross-attention."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))
        self.norm: nn.Module = nn.Identity()
        self.project: nn.Module = nn.Identity()
        if config.project_encoder_output:
            self.project = nn.Linear(config.encoder_dim, config.decoder_dim)
            if not config.deepnet:  # whose layers end with a norm
                self.norm = make_norm(config.norm, config.encoder_dim, config.gated_norm)

    def forward(
        self,
        x: Float[Tensor, "batch chunks neighbours length dim"],
        seen: Bool[Tensor, "batch chunks neighbours length"],
        context: Float[Tensor, "batch chunks m decoder_dim"],
        context_seen: Bool[Tensor, "batch chunks m"] | None,
    ) -> Float[Tensor, "batch chunks tokens output_dim"]:
        """States of every neighbour's tokens.

        Args:
            x: embedded neighbours. seen: which of their tokens are no padding.
            context: the decoder's states of the chunk. context_seen: None where all are seen.
        """
        shape = x.shape
        x, context = x.flatten(0, 2), context.flatten(0, 1)
        hidden = hidden_keys(self.config, seen.flatten(0, 2), x)
        if context_seen is None or not self.config.mask_encoder_context:
            context_hidden = None
        else:
            context_hidden = hidden_keys(self.config, context_seen.flatten(0, 1), x)
        positions = None
        if self.config.positions == "rotary":
            positions = rotation(torch.arange(shape[3]), self.config.rotary_dim, x)
        for layer in self.layers:
            x = layer(x, hidden, positions, context, context_hidden)
        x = self.project(self.norm(x))
        return x.reshape(*shape[:2], shape[2] * shape[3], -1)
