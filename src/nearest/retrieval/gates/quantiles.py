"""A gate's threshold: which of its figures are large beside those of the tuning text."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from nearest.retrieval.gates.gate import View

_STEPS = 100


def quantiles_of(figures: Float[np.ndarray, " n"]) -> Float[np.ndarray, " quantiles"]:
    """At even steps from 0 to 1 (float32)."""
    quantiles: Float[np.ndarray, " quantiles"] = np.quantile(figures, np.linspace(0, 1, _STEPS + 1))
    return quantiles.astype(np.float32)


def check_quantiles(quantiles: Float[np.ndarray, " quantiles"]) -> None:
    """Refuse what `quantiles_of` cannot have given (ValueError)."""
    known = quantiles.shape == (_STEPS + 1,) and quantiles.dtype == np.float32
    if not known or not (np.diff(quantiles) >= 0).all():
        raise ValueError(f"quantiles are {_STEPS + 1} ascending float32")


def worth_searching(
    view: View,
    figures: Callable[[View], Float[np.ndarray, " q"]],
    quantiles: Float[np.ndarray, " quantiles"],
    skip: float,
) -> Bool[np.ndarray, " q"]:
    """Which queries' figures reach the quantile `skip`; at 0 all do, at 1 none.

    Where many are equal, they reach it together: what cannot be told apart is not given up.
    """
    if skip <= 0 or skip >= 1:  # then nothing need be computed
        return np.full(len(view.candidates.ids), skip <= 0)
    threshold = np.interp(skip, np.linspace(0, 1, len(quantiles)), quantiles)
    worth: Bool[np.ndarray, " q"] = figures(view) >= threshold
    return worth
