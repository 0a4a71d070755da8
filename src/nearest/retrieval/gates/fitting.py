"""What fits of published gates share: a text as arrays, and the best constant shares."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.retrieval.distribution import Component, component_probs
from nearest.retrieval.gates.gate import View
from nearest.retrieval.gates.seen import Seen

TEMPERATURES = tuple(2.0**i for i in range(-2, 13))  # 0.25 … 4096
LARGEST_LAM = 0.99  # a token that the memory lacks must not become impossible
_HALVINGS = 40
_ROUNDS = 50
_FLOOR = 1e-20  # of a probability, so that its logarithm is finite


class Observed(NamedTuple):
    """n predictions for which the dense search found something, in the order of the text."""

    inputs: Float[np.ndarray, "n inputs"]  # float32
    probs: Float[np.ndarray, "n components"]  # float32, of the token that came
    lm_probs: Float[np.ndarray, " n"]  # float64
    documents: Int[np.ndarray, " n"]


def observe(
    seen: Iterable[Seen],
    inputs: Callable[[View], Float[np.ndarray, "q inputs"]],
    components: Sequence[Component],
) -> Observed:
    """What a gate looks at, and how its components predict the tokens that came.

    Raises:
        SettingError: there is no such prediction.
    """
    rows, parts = [], []
    for one in seen:
        found = one.view.candidates.has("dense")
        probs = component_probs(one.view.candidates, components, one.targets)
        part = Observed(
            inputs(one.view).astype(np.float32),
            probs.astype(np.float32),
            np.exp(one.lm_log_probs.astype(float)),
            one.documents,
        )
        rows.append(one.rows[found])
        parts.append(Observed(*(array[found] for array in part)))
    if not sum(map(len, rows)):
        raise SettingError(
            "a gate cannot be fitted, because the memory found nothing for any prediction of the "
            "tuning text: give text with at least one token, and let searches be made"
        )
    # The same text in other batches, or with its documents side by side, gives the same gate.
    order = np.argsort(np.concatenate(rows), kind="stable")
    return Observed(*(np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))


def temperature_of(config: Mapping[str, Any]) -> float:
    """The temperature of a stored gate; ValueError when it is none."""
    temperature = float(config["temperature"])
    if not 0 < temperature < np.inf:
        raise ValueError(f"a temperature of {temperature}")
    return temperature


def nearest_distance(view: View) -> Float[np.ndarray, " q"]:
    """Of each query's dense candidates the smallest distance (float32), +inf without any."""
    distances = view.candidates.distances[:, view.candidates.of("dense")]
    nearest: Float[np.ndarray, " q"] = distances.min(axis=1, initial=np.inf)
    return nearest


def best_lams(
    lm_probs: Float[np.ndarray, " n"], probs: Float[np.ndarray, "n components"]
) -> Float[np.ndarray, " components"]:
    """The λ of each component alone beside the model that has the lowest nll, at most LARGEST_LAM.

    The nll is convex in λ, so its slope −Σ (p − p_LM) / (p_LM + λ(p − p_LM)) is 0 in one place.
    """
    gains = probs - lm_probs[:, None]
    low, high = np.zeros(probs.shape[1]), np.full(probs.shape[1], LARGEST_LAM)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mixed = lm_probs[:, None] + middle * gains
        rising = np.divide(gains, mixed, out=np.zeros_like(gains), where=mixed > 0).sum(axis=0) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    # An optimum at either end is met exactly.
    return np.where(low == 0, 0.0, np.where(high == LARGEST_LAM, LARGEST_LAM, (low + high) / 2))


def nll(
    lm_probs: Float[np.ndarray, " n"],
    probs: Float[np.ndarray, "n components"],
    lams: Float[np.ndarray, " components"],
) -> Float[np.ndarray, " components"]:
    """Summed negative log-likelihood in nats of each component alone beside the model."""
    mixed = lm_probs[:, None] + lams * (probs - lm_probs[:, None])
    total: Float[np.ndarray, " components"] = -np.log(np.maximum(mixed, _FLOOR)).sum(axis=0)
    return total


def best_shares(probs: Float[np.ndarray, "n choices"]) -> Float[np.ndarray, " choices"]:
    """Constant shares of several distributions with the lowest nll, by expectation maximisation."""
    shares = np.full(probs.shape[1], 1 / probs.shape[1])
    for _ in range(_ROUNDS):
        mixed = np.maximum(probs @ shares, _FLOOR)
        shares = shares * (probs / mixed[:, None]).mean(axis=0)
        shares = shares / shares.sum()
    return shares


def mixed_nll(
    probs: Float[np.ndarray, "n choices"], shares: Float[np.ndarray, " choices"]
) -> float:
    """Summed negative log-likelihood in nats of several distributions together."""
    return float(-np.log(np.maximum(probs @ shares, _FLOOR)).sum())
