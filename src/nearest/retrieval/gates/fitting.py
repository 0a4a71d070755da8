"""Shared by all fits: a text as arrays, the best constant λ and shares, and the values tried."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.retrieval.distribution import Component, component_probs
from nearest.retrieval.gates.gate import Examples, View

TEMPERATURES = tuple(round(2 ** (i / 2), 2) for i in range(-4, 25))  # 0.25 … 4096, by √2
COARSE_TEMPERATURES = tuple(2.0**i for i in range(-2, 13))  # for gates, which adapt anyway
KS = (16, 64, 256, 1024)
LARGEST_LAM = 0.99  # a token that the memory lacks must not become impossible
FLOOR = 1e-20  # of a probability, so that its logarithm is finite
_STEPS = 40
_TOLERANCE = 1e-9
_ROUNDS = 200

# As configurations of stored gates hold it.
Temperature = Annotated[float, msgspec.Meta(gt=0, le=1e30)]


class Observed(NamedTuple):
    """n predictions for which the dense search found something, in the order of the text."""

    inputs: Float[np.ndarray, "n inputs"]  # float32
    probs: Float[np.ndarray, "n components"]  # float32, of the token that came
    lm_probs: Float[np.ndarray, " n"]  # float64
    documents: Int[np.ndarray, " n"]


def observe(
    examples: Iterable[Examples],
    inputs: Callable[[View], Float[np.ndarray, "q inputs"]],
    components: Sequence[Component],
) -> Observed:
    """A gate's inputs, and how its components predict the tokens that came.

    Raises:
        SettingError: there is no such prediction.
    """
    rows, parts = [], []
    for one in examples:
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


def nearest_distance(view: View) -> Float[np.ndarray, " q"]:
    """Smallest distance among each query's dense candidates (float32); +inf without any."""
    distances = view.candidates.distances[:, view.candidates.of("dense")]
    nearest: Float[np.ndarray, " q"] = distances.min(axis=1, initial=np.inf)
    return nearest


def best_lams(
    lm_probs: Float[np.ndarray, " n"], probs: Float[np.ndarray, "n components"]
) -> Float[np.ndarray, " components"]:
    """The λ of each component alone beside the model that has the lowest nll, at most LARGEST_LAM.

    The nll is convex in λ, so its slope −Σ (p − p_LM) / (p_LM + λ(p − p_LM)) is 0 in one place,
    which Newton's steps find, halved where they would leave the interval that holds it.
    """
    gains = probs - lm_probs[:, None]

    def slope(lams: Float[np.ndarray, " components"]) -> tuple[np.ndarray, np.ndarray]:
        mixed = lm_probs[:, None] + lams * gains
        ratio = np.where(gains > 0, np.inf, 0.0)  # where λ·0 + (1 − λ)·0 is divided by
        np.divide(gains, mixed, out=ratio, where=mixed > 0)
        return ratio.sum(axis=0), np.einsum("nc,nc->c", ratio, ratio)

    low, high = np.zeros(probs.shape[1]), np.full(probs.shape[1], LARGEST_LAM)
    at_low, at_high = slope(low)[0] <= 0, slope(high)[0] >= 0
    lams = (low + high) / 2
    for _ in range(_STEPS):
        rising, curvature = slope(lams)
        low, high = np.where(rising > 0, lams, low), np.where(rising > 0, high, lams)
        step = np.divide(rising, curvature, out=np.zeros_like(rising), where=curvature > 0)
        inside = (lams + step > low) & (lams + step < high)
        moved = np.where(inside, lams + step, (low + high) / 2)
        done = np.abs(moved - lams) < _TOLERANCE
        lams = moved
        if (done | at_low | at_high).all():
            break
    return np.where(at_low, 0.0, np.where(at_high, LARGEST_LAM, lams))


def nll(
    lm_probs: Float[np.ndarray, " n"],
    probs: Float[np.ndarray, "n components"],
    lams: Float[np.ndarray, " components"],
) -> Float[np.ndarray, " components"]:
    """Summed negative log-likelihood in nats of each component alone beside the model."""
    mixed = lm_probs[:, None] + lams * (probs - lm_probs[:, None])
    total: Float[np.ndarray, " components"] = -np.log(np.maximum(mixed, FLOOR)).sum(axis=0)
    return total


def best_shares(
    probs: Float[np.ndarray, "n choices"], rounds: int = _ROUNDS
) -> Float[np.ndarray, " choices"]:
    """Constant shares, summing to 1, of the mixture under which n tokens are likeliest.

    Expectation maximisation; the likelihood is concave in the shares, so it nears the maximum. A
    row may be scaled by any factor.
    """
    shares = np.full(probs.shape[1], 1 / probs.shape[1])
    for _ in range(rounds):
        mixed = np.maximum(probs @ shares, FLOOR)
        shares = shares * (probs / mixed[:, None]).mean(axis=0)
        shares = shares / shares.sum()
    return shares


def mixed_nll(
    probs: Float[np.ndarray, "n choices"], shares: Float[np.ndarray, " choices"]
) -> float:
    """Summed negative log-likelihood in nats of several distributions together."""
    return float(-np.log(np.maximum(probs @ shares, FLOOR)).sum())
