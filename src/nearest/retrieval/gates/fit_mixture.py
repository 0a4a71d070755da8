"""Fit the mixture gate on held-out text, seen with every search, with none, and with some."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearest.retrieval.distribution import Component, component_probs
from nearest.retrieval.gates.gate import LEFT_TO_LM, View
from nearest.retrieval.gates.mixture import (
    MixtureGate,
    SearchGuess,
    available,
    components_for,
    voted_among,
)
from nearest.retrieval.gates.network import Network
from nearest.retrieval.gates.quantiles import quantiles_of
from nearest.retrieval.gates.seen import Seen
from nearest.retrieval.gates.training import check_enough, cross_fitted, folds_of

_LARGEST_GAIN = 3.0  # nats; a rare enormous gain says little about the next
_UNIT_BATCHES = 20
_FLOOR = 1e-20  # of a probability, so that its logarithm is finite


@dataclass(frozen=True)
class Trial:
    """Stands in for the gate while its training text is looked up: searches so many at random."""

    kinds: tuple[str, ...]
    searched: float
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def components(self) -> tuple[Component, ...]:
        """Such that everything the gate will look at is measured."""
        return components_for(self.kinds, 1.0)

    @property
    def needs_lm(self) -> bool:
        """As the gate."""
        return True

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Nothing is predicted with it."""
        return np.zeros((len(view.candidates.ids), len(self.components)))

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """At random, whatever `skip` is."""
        return self.rng.random(len(before.candidates.ids)) < self.searched


class _Data(NamedTuple):
    """Everything about n predictions that fitting needs; probabilities with the model's first.

    Those of components hold what the gate leaves to the model of each.
    """

    rows: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    features: Float[np.ndarray, "n features"]
    before: Float[np.ndarray, "n features_before"]
    probs: Float[np.ndarray, "n components_and_lm"]
    available: Bool[np.ndarray, "n components_and_lm"]


def fit_mixture(
    kinds: Sequence[str], views: Sequence[Iterable[Seen]], unit: float, asks: bool
) -> MixtureGate:
    """Fit a mixture over kinds.

    Args:
        kinds: of the method.
        views: the same text, seen in one way or several. For a method that asks whether to search,
            the first with every search made and the second with none.
        unit: see `components_for`.
        asks: whether the gate decides about searches.

    Raises:
        SettingError: the text is too short.
    """
    components = components_for(kinds, unit)
    voted = voted_among(components, unit)
    untrained = MixtureGate(tuple(kinds), components, voted, _NOTHING)
    seen = [_collect(untrained, view) for view in views]
    check_enough(len(seen[0].rows))
    data = _Data(*(np.concatenate(parts) for parts in zip(*seen, strict=True)))
    probs, masked = torch.from_numpy(data.probs), torch.from_numpy(~data.available)
    folds = folds_of(seen[0].documents)

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        shares = logits.masked_fill(masked[rows], -torch.inf).softmax(-1)
        return -((shares * probs[rows]).sum(-1) + _FLOOR).log().mean()

    mix = cross_fitted(data.features, loss, len(components) + 1, np.tile(folds, len(seen)))
    gate = MixtureGate(tuple(kinds), components, voted, mix)
    if not asks:
        return gate
    every, none = (_log_probs(mix, one) for one in seen[:2])
    gains = torch.from_numpy(np.clip(every - none, -_LARGEST_GAIN, _LARGEST_GAIN))

    def error(rows: Tensor, guesses: Tensor) -> Tensor:
        return ((guesses[:, 0] - gains[rows]) ** 2).mean()

    network = cross_fitted(seen[0].before, error, 1, folds)
    guesses = network(seen[0].before)[:, 0]
    search = SearchGuess(network, quantiles_of(guesses))
    return MixtureGate(tuple(kinds), components, voted, mix, search)


_NOTHING = Network(np.zeros(0, np.float32), np.zeros(0, np.float32), (), ())


def distance_unit(seen: Iterable[Seen]) -> float:
    """How much farther the candidate in the middle is than the nearest: median over queries.

    Of the first batches only; 1 where no query has two candidates, or all are equally near.
    """
    gaps = []
    for one, _ in zip(seen, range(_UNIT_BATCHES), strict=False):
        distances = np.sort(one.view.candidates.distances, axis=1)
        count = np.isfinite(distances).sum(axis=1)
        some = count > 1
        middle = distances[some, count[some] // 2]
        gaps.append(middle - distances[some, 0])
    unit = float(np.median(np.concatenate(gaps))) if gaps and sum(map(len, gaps)) else 0.0
    return unit if unit > 0 else 1.0


def _collect(gate: MixtureGate, seen: Iterable[Seen]) -> _Data:
    parts = []
    for one in seen:
        probs = component_probs(one.view.candidates, gate.components, one.targets)
        lm = np.exp(one.lm_log_probs)[:, None]
        probs = (1 - LEFT_TO_LM) * probs + LEFT_TO_LM * lm
        has = available(one.view, gate.components)
        parts.append(
            _Data(
                one.rows,
                one.documents,
                gate.features(one.view),
                gate.features_before(one.view),
                np.concatenate([lm, probs], axis=1).astype(np.float32),
                np.concatenate([np.ones_like(has[:, :1]), has], axis=1),
            )
        )
    whole = _Data(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    order = np.argsort(whole.rows)
    return _Data(*(part[order] for part in whole))


def _log_probs(mix: Network, data: _Data) -> Float[np.ndarray, " n"]:
    """Log-probability that the gated mixture gives each token."""
    logits = np.where(data.available, mix(data.features), -np.inf)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    log_probs: Float[np.ndarray, " n"] = np.log((shares * data.probs).sum(axis=1) + _FLOOR)
    return log_probs
