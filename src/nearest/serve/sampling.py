"""The choice of a token from a distribution. Pure functions; randomness comes as an argument."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_LIKELY = 1024  # tokens that hold top_p of the probability nearly always


def choose(
    log_probs: Float[Tensor, " vocab"],
    temperature: float,
    top_p: float,
    rng: np.random.Generator,
) -> int:
    """A token from one row of log-probabilities; the likeliest at temperature 0.

    Nucleus sampling (arXiv:1904.09751): the likeliest tokens whose probabilities reach `top_p`.
    One uniform number is drawn a token, so that a seed gives the same text whatever else is sampled
    at the same time.
    """
    if temperature == 0:
        return int(log_probs.argmax())
    probs = torch.softmax(log_probs.double() / temperature, dim=-1)
    drawn = float(rng.random())
    if top_p >= 1:
        return _inverse(probs, drawn)
    likely, tokens = probs.topk(min(_LIKELY, len(probs)))
    if float(likely.sum()) < top_p:
        likely, tokens = probs.sort(descending=True)
    before = likely.cumsum(0) - likely
    return int(tokens[_inverse(likely[before < top_p], drawn)])


def _inverse(probs: Float[Tensor, " n"], drawn: float) -> int:
    """The first index at which the cumulated probability exceeds the drawn fraction of all."""
    sums = probs.cumsum(0)
    index = int(torch.searchsorted(sums, drawn * sums[-1], right=True))
    last = int(probs.nonzero()[-1])
    return min(index, last)


def likeliest(log_probs: Float[Tensor, " vocab"], count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens and their log-probabilities, likeliest first."""
    if not count:
        return []
    values, tokens = log_probs.topk(min(count, len(log_probs)))
    return list(zip(tokens.tolist(), values.tolist(), strict=True))
