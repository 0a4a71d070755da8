"""Cross-entropy over a large vocabulary, without further arrays of the logits' size."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
_CPU_ROWS = 16  # their logits stay in the caches
_GPU_NUMBERS = 1 << 26  # 256 MB of float32: a few kernel launches for any batch


def next_token_loss(
    logits: Float[Tensor, "batch n vocab"],
    labels: Int[Tensor, "batch n"],
    items: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the labels, in nats; float32 or, of float64 logits, float64.

    Args:
        logits: of each position.
        labels: the token that each is to predict; IGNORED where none.
        items: what the sum is divided by, where it is not the number of labels: transformers'
            `num_items_in_batch`, so that batches of gradient accumulation weigh alike.
    """
    total = token_losses(logits, labels).sum()
    return total / ((labels != IGNORED).sum() if items is None else items)


def token_losses(
    logits: Float[Tensor, "batch n vocab"], labels: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch n"]:
    """Negative log-likelihood of each label in nats, 0 where it is IGNORED."""
    nll: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten())  # type: ignore[no-untyped-call]
    return nll.reshape(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Negative log-likelihood of each row, 0 where it is ignored.

    Torch's own keeps log-probabilities for the gradient, as large as the logits; here the gradient
    is made of the logits themselves, softmax − one-hot, a block of rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Of [rows, vocab] logits and [rows] labels; summed in float32 or better."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        tops = logits.amax(1, keepdim=True).to(wide)
        rows = _block_rows(logits)
        blocks = zip(logits.split(rows), tops.split(rows), strict=True)
        sums = torch.cat([(block.to(wide) - top).exp_().sum(1) for block, top in blocks])
        seen = labels != IGNORED
        right = logits.gather(1, labels.where(seen, 0)[:, None]).to(wide)
        ctx.save_for_backward(logits, labels, tops[:, 0] + sums.log())
        return (sums.log() - (right - tops)[:, 0]).where(seen, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the logits, in their dtype."""
        logits, labels, totals = ctx.saved_tensors
        seen = labels != IGNORED
        of_rows = gradient.where(seen, 0.0)[:, None]
        targets = labels.where(seen, 0)[:, None]
        minus_one = totals.new_full((1, 1), -1.0)
        found = torch.empty_like(logits)
        step = _block_rows(logits)
        for begin in range(0, len(logits), step):
            rows = slice(begin, begin + step)
            probs = (logits[rows].to(totals.dtype) - totals[rows, None]).exp_()
            probs.scatter_add_(1, targets[rows], minus_one.expand(len(probs), 1))
            found[rows] = probs.mul_(of_rows[rows])
        return found, None


def _block_rows(logits: Tensor) -> int:
    """Rows of [rows, vocab] logits to work on at once: few on CPUs, nearly all on GPUs."""
    if logits.device.type == "cpu":
        return _CPU_ROWS
    return max(1, _GPU_NUMBERS // logits.shape[1])
