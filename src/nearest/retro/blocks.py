"""Feed-forward layers, and a layer with its norm and residual sum."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_layers import GradientCheckpointingLayer

from nearest.retro.config import RetroConfig
from nearest.retro.dropout import Dropout
from nearest.retro.norms import make_norm


class FeedForward(nn.Module):
    """Two linear maps with a GELU between, gated by a third in "geglu" (arXiv:2002.05202)."""

    def __init__(self, config: RetroConfig, side: str) -> None:
        super().__init__()
        dim, inner = getattr(config, f"{side}_dim"), getattr(config, f"{side}_ffn_dim")
        self.side = side
        self.gated = config.feed_forward == "geglu"
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = nn.Linear(dim, inner * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(inner, dim, bias=config.bias)
        self.inner_dropout = Dropout(config.feed_forward_dropout)
        self.dropout = Dropout(config.residual_dropout)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Each position for itself."""
        if self.gated:
            gate, linear = self.up(x).chunk(2, dim=-1)
            inner = F.gelu(gate, approximate=self.approximate) * linear
        else:
            inner = F.gelu(self.up(x), approximate=self.approximate)
        return self.dropout(self.down(self.inner_dropout(inner)))


class Residual(GradientCheckpointingLayer):
    """A layer's output added to its input, normed before the layer, or after the sum (DeepNet)."""

    def __init__(self, config: RetroConfig, side: str, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.norm = make_norm(config.norm, getattr(config, f"{side}_dim"), config.gated_norm)
        self.weight = residual_weight(config, side) if config.deepnet else None

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        """x: states; inputs: what else the layer takes."""
        if self.weight is None:
            return x + self.body(self.norm(x), *inputs)
        return self.norm(self.weight * x + self.body(x, *inputs))


def residual_weight(config: RetroConfig, side: str) -> float:
    """DeepNet's α (arXiv:2203.00555, figure 2), for N encoder and M decoder layers."""
    if side == "encoder":
        return 0.81 * float(config.encoder_layers**4 * config.decoder_layers) ** (1 / 16)
    return float(3 * config.decoder_layers) ** 0.25


def deepnet_gain(config: RetroConfig, side: str) -> float:
    """DeepNet's β: Xavier gain of feed-forward, value and output projections."""
    if side == "encoder":
        return 0.87 * float(config.encoder_layers**4 * config.decoder_layers) ** (-1 / 16)
    return float(12 * config.decoder_layers) ** -0.25
