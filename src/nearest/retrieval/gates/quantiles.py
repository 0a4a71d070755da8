"""A gate's threshold: which of its figures are large beside those of the tuning text."""

import numpy as np
from jaxtyping import Bool, Float

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


def above_quantile(
    figures: Float[np.ndarray, " q"], quantiles: Float[np.ndarray, " quantiles"], share: float
) -> Bool[np.ndarray, " q"]:
    """Which figures reach the quantile of this share; all of share 0, none of share 1.

    Where many are equal, they reach it together: what cannot be told apart is not given up.
    """
    if share <= 0 or share >= 1:
        return np.full(len(figures), share <= 0)
    above: Bool[np.ndarray, " q"] = figures >= np.interp(
        share, np.linspace(0, 1, len(quantiles)), quantiles
    )
    return above
