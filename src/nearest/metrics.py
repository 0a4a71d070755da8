"""Figures from per-document losses: perplexities, and intervals by document bootstrap.

Documents are drawn with replacement, because tokens of one document are not independent of each
other. Two methods are compared by resampling their difference on the same documents.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real

_RESAMPLES = 2_000
_SEED = 0
_DRAWN_AT_ONCE = 2**18


class Interval(NamedTuple):
    """A 95 % interval; None at both ends where one document gives none."""

    low: float | None
    high: float | None


def bootstrap_interval(
    totals: Float[np.ndarray, " documents"], counts: Real[np.ndarray, " documents"]
) -> Interval:
    """95 % percentile interval of Σ totals / Σ counts over resampled documents.

    With the nll of each document and its number of tokens this is the interval of the mean nll;
    with differences of nll it is the paired interval. No ends for fewer than two documents
    in which anything is predicted.
    """
    scored = counts > 0
    totals, counts = totals[scored], counts[scored]
    documents = len(totals)
    if documents < 2 or not np.isfinite(totals).all():
        return Interval(None, None)
    rng = np.random.default_rng(_SEED)
    ratios = np.empty(_RESAMPLES)
    at_once = max(1, _DRAWN_AT_ONCE // documents)
    for i in range(0, _RESAMPLES, at_once):
        some = ratios[i : i + at_once]
        drawn = rng.integers(documents, size=(len(some), documents))
        some[:] = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return Interval(*np.quantile(ratios, [0.025, 0.975]).tolist())


def perplexity(total_nll: float, units: float) -> float:
    """exp(nll a unit): a token, a word or a byte gives three different numbers.

    Infinite where the text is impossible, or too improbable for a float.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(total_nll / units)))


def bits_per_byte(total_nll: float, text_bytes: int) -> float:
    """Nats in all → bits a UTF-8 byte of the text."""
    return float(total_nll / np.log(2) / text_bytes)
