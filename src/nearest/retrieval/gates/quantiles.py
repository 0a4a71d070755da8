"""A gate's threshold: which of its figures are among the smallest of the tuning text's."""

import numpy as np
from jaxtyping import Bool, Float

_STEPS = 100


def quantiles_of(figures: Float[np.ndarray, " n"]) -> Float[np.ndarray, " quantiles"]:
    """At even steps from 0 to 1 (float32)."""
    return np.quantile(figures, np.linspace(0, 1, _STEPS + 1)).astype(np.float32)


def check_quantiles(quantiles: Float[np.ndarray, " quantiles"]) -> None:
    """Refuse what `quantiles_of` cannot have given (ValueError)."""
    if quantiles.ndim != 1 or len(quantiles) < 2 or not (np.diff(quantiles) >= 0).all():
        raise ValueError("quantiles do not ascend")


def above_quantile(
    figures: Float[np.ndarray, " q"], quantiles: Float[np.ndarray, " quantiles"], share: float
) -> Bool[np.ndarray, " q"]:
    """Which figures lie above the quantile of this share; all of share 0, none of share 1."""
    if share <= 0 or share >= 1:
        return np.full(len(figures), share <= 0)
    above: Bool[np.ndarray, " q"] = figures > np.interp(
        share, np.linspace(0, 1, len(quantiles)), quantiles
    )
    return above
