"""Where a key stands relative to a query: learned biases in buckets, or rotations."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Rotation = tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
"""Cosines and sines, (…, positions, dims), that broadcast over a batch and heads."""


def linear_buckets(
    relative: Int[Tensor, "*shape"], buckets: int, causal: bool
) -> Int[Tensor, "*shape"]:
    """Bucket of each key position minus query position; what is farther shares the last bucket."""
    low, high = (1 - buckets, 0) if causal else (buckets // 2 + 1 - buckets, buckets // 2)
    return relative.clamp(low, high) - low


def log_buckets(
    relative: Int[Tensor, "*shape"], buckets: int, causal: bool, max_distance: int
) -> Int[Tensor, "*shape"]:
    """T5's buckets (arXiv:1910.10683): the near half one by one, the far half logarithmically.

    Not causal: half the buckets for keys after the query, half for those before or at it.
    """
    if causal:
        offset, distance = torch.zeros_like(relative), (-relative).clamp(min=0)
    else:
        buckets //= 2
        offset, distance = (relative > 0) * buckets, relative.abs()
    near = buckets // 2
    spread = torch.log(distance.clamp(min=1) / near) / math.log(max_distance / near)
    far = near + (spread * (buckets - near)).long()
    return offset + torch.where(distance < near, distance, far.clamp(max=buckets - 1))


class BucketBias(nn.Module):
    """A learned number for each bucket and head, added to attention scores."""

    def __init__(
        self, buckets: int, heads: int, causal: bool, spacing: str, max_distance: int
    ) -> None:
        super().__init__()
        self.causal = causal
        self.spacing = spacing
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.zeros(buckets, heads))

    def forward(
        self, queries: int, keys: int, shift: int = 0, hide_later: bool = False
    ) -> Float[Tensor, "heads queries keys"]:
        """Bias of key j for query i + shift; −∞ where j is the later one, if these are hidden.

        One number for each distance is looked up, then laid out along the diagonals, which keeps
        both passes linear in the number of distances.
        """
        distances = torch.arange(queries + keys - 1, device=self.weight.device) - queries + 1
        relative = distances - shift
        count = len(self.weight)
        if self.spacing == "linear":
            bucket = linear_buckets(relative, count, self.causal)
        else:
            bucket = log_buckets(relative, count, self.causal, self.max_distance)
        values = self.weight[bucket].T
        if hide_later:
            values = values.masked_fill(relative > 0, -torch.inf)
        return values.unfold(1, keys, 1).flip(1)


def rotation(
    positions: Int[Tensor, "*batch n"], dim: int, like: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "*batch n dim"], Float[Tensor, "*batch n dim"]]:
    """Cosines and sines of rotary positions (arXiv:2104.09864), halves side by side."""
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, device=like.device).float() / dim)
    angles = positions[..., None].to(like.device, torch.float32) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(
    x: Float[Tensor, "*batch n head_dim"], by: Rotation
) -> Float[Tensor, "*batch n head_dim"]:
    """Rotate the first dims of queries or keys; the others pass."""
    cos, sin = by
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)
