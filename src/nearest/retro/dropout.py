"""Dropout that is quick on CPUs too."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_CHANCES = 1 << 16  # a share is rounded to one of so many


def drop(x: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """Zero a random `share` of x, and scale the rest so that the mean stays.

    On CPUs torch draws a double for each number, which takes longer than all the rest of it; four
    are decided here by one random word.
    """
    dropped = round(share * _CHANCES)
    if x.device.type != "cpu" or not 0 < dropped < _CHANCES:
        return F.dropout(x, share)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = numbers >= dropped - _CHANCES // 2
    return x * kept.to(x.dtype).mul_(_CHANCES / (_CHANCES - dropped))


class Dropout(nn.Dropout):
    """`drop` while training."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that nn.Dropout gives it)
        """x, or x with a share of zeros."""
        return drop(input, self.p) if self.training else input
