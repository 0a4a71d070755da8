"""Root mean square norms as the published weights know them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """x / rms(x) · weight (arXiv:1910.07467), optionally times σ(x · gate).

    A tiny number keeps the division finite: added to the rms, or its least value (`clamped`).
    """

    EPS = 1e-8

    def __init__(self, dim: int, clamped: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.clamped = clamped
        self.weight = nn.Parameter(torch.ones(dim))
        self.gate = nn.Parameter(torch.ones(dim)) if gated else None

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The same shape, every row normalised."""
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        scale = rms.clamp(min=self.EPS) if self.clamped else rms + self.EPS
        normed = x / scale * self.weight
        return normed if self.gate is None else normed * torch.sigmoid(x * self.gate)


def make_norm(kind: str, dim: int, gated: bool) -> nn.Module:
    """`kind` and `gated` as in `RetroConfig`: only RMS norms have gates."""
    if kind == "layer":
        return nn.LayerNorm(dim)
    return RmsNorm(dim, clamped=kind == "rms_clamped", gated=gated)
