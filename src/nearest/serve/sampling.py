"""The choice of a token from a distribution. Pure functions; randomness comes as an argument."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearest.serve.work import Wanted

_COLDEST = 1e-300  # a temperature below has no inverse
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
    below = log_probs.double() - log_probs.max()  # 0 at the likeliest, which no temperature moves
    probs = torch.softmax(below / max(temperature, _COLDEST), dim=-1)
    drawn = float(rng.random())
    if top_p >= 1:
        return _inverse(probs, drawn)
    likely, tokens = probs.topk(min(_LIKELY, len(probs)))
    if float(likely.sum()) < top_p:
        likely, tokens = probs.sort(descending=True)
    before = likely.cumsum(0) - likely
    return int(tokens[_inverse(likely[before < top_p], drawn)])


def choose_each(
    log_probs: Float[Tensor, "rows vocab"],
    numbers: Sequence[int],
    wanted: Sequence[Wanted],
    rngs: Sequence[np.random.Generator],
) -> list[int | Exception]:
    """A token for each of some sequences, of which `numbers` are the rows, or why there is none."""
    greedy = [one.temperature == 0 for one in wanted]
    likeliest_tokens = log_probs.argmax(-1).tolist() if any(greedy) else []
    chosen: list[int | Exception] = []
    for number, is_greedy, one, rng in zip(numbers, greedy, wanted, rngs, strict=True):
        try:
            chosen.append(
                likeliest_tokens[number]
                if is_greedy
                else choose(log_probs[number], one.temperature, one.top_p, rng)
            )
        except Exception as error:
            chosen.append(error)
    return chosen


def _inverse(probs: Float[Tensor, " n"], drawn: float) -> int:
    """The first index at which the cumulated probability exceeds the drawn fraction of all."""
    sums = probs.cumsum(0)
    index = int(torch.searchsorted(sums, drawn * sums[-1], right=True))
    last = int(probs.nonzero()[-1])
    return min(index, last)


def likeliest(
    log_probs: Float[Tensor, "rows vocab"], counts: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """Each row's `counts[row]` likeliest tokens and their log-probabilities, likeliest first."""
    most = min(max(counts, default=0), log_probs.shape[-1])
    if not most:
        return [[] for _ in counts]
    values, tokens = log_probs.topk(most)
    return [
        list(zip(row_tokens[:count], row_values[:count], strict=True))
        for row_tokens, row_values, count in zip(
            tokens.tolist(), values.tolist(), counts, strict=True
        )
    ]
