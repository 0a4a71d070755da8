"""Run a method over a text: its predictions, the memory's part in them, and its costs."""

import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.index.neighbours import NO_ENTRY
from nearest.models.scoring import ScoredBlock
from nearest.retrieval.candidates import MEMORY_KINDS
from nearest.retrieval.distribution import token_probs
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.step import State, Step, steps


class Details(NamedTuple):
    """What the memory contributed to each of n predictions.

    Attributes:
        lams: weight that it was given, with places of the text itself, after the guard.
        distances: of the nearest candidate; +inf without any.
        entries: with the largest weight; -1 where none has weight.
        shares: that weight.
        memories: the number of each one's memory.
    """

    lams: Float[np.ndarray, " n"]
    distances: Float[np.ndarray, " n"]
    entries: Int[np.ndarray, " n"]
    shares: Float[np.ndarray, " n"]
    memories: Int[np.ndarray, " n"]

    @classmethod
    def empty(cls, n: int) -> "Details":
        """Details of a memory that contributes nothing."""
        return cls(
            np.zeros(n),
            np.full(n, np.inf, np.float32),
            np.full(n, NO_ENTRY, np.int64),
            np.zeros(n),
            np.zeros(n, np.int64),
        )


class MethodRun:
    """Runs one method over a text, and adds up its costs.

    Attributes:
        seconds: spent by the method itself, without the model.
        tokens, searches: how many it predicted, and made.
        given: weight that its gate gave to the memory, over all tokens, before any guard.
        right: of that, what fell on the tokens that came.
        elsewhere: what the same candidates gave to tokens that came elsewhere in the text.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self.seconds = 0.0
        self.tokens = self.searches = 0
        self.given = self.right = self.elsewhere = 0.0
        self._states: dict[int, State] = {}

    def log_probs(self, block: ScoredBlock, details: Details | None = None) -> Float[Tensor, " n"]:
        """Log-probabilities of the tokens that came, base and memory together.

        `details`, where given, are filled in, in time that is not counted as the method's.
        """
        started, aside = time.perf_counter(), 0.0
        log_probs = torch.empty_like(block.lm_log_probs)
        others = np.roll(block.targets, len(block.targets) // 2)
        for one in steps(
            self.lookup,
            block.queries,
            block.sequences,
            block.targets,
            block.lm_log_probs,
            self._states,
        ):
            prediction = one.prediction
            log_probs[one.rows] = one.log_probs
            self.searches += int(prediction.candidates.searched.sum())
            observed = time.perf_counter()
            self.given += float((1 - prediction.weights.lm).sum())
            self.right += float(one.right.sum())
            chance = token_probs(prediction.weights, prediction.candidates, others[one.rows])
            self.elsewhere += float(chance.sum())
            if details is not None:
                _fill(details, one)
            aside += time.perf_counter() - observed
        self.tokens += len(log_probs)
        self.seconds += time.perf_counter() - started - aside
        return log_probs


class EnsembleRun:
    """Runs one method in several memories over a text; figures as of a `MethodRun`."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self._runs = [MethodRun(lookup) for lookup, _ in ensemble.used]
        self._numbers = [n for n, weight in enumerate(ensemble.weights) if weight]
        self._weights = [weight for _, weight in ensemble.used]

    @property
    def seconds(self) -> float:
        """Seconds spent by all memories."""
        return sum(run.seconds for run in self._runs)

    @property
    def tokens(self) -> int:
        """Predictions, one a token and memory that is used."""
        return sum(run.tokens for run in self._runs)

    @property
    def searches(self) -> int:
        """Dense searches that were made for them."""
        return sum(run.searches for run in self._runs)

    @property
    def judged(self) -> tuple[float, float, float]:
        """Weight given to the memories, and of it what was `right` and `elsewhere`."""
        pairs = list(zip(self._runs, self._weights, strict=True))
        return (
            sum(weight * run.given for run, weight in pairs),
            sum(weight * run.right for run, weight in pairs),
            sum(weight * run.elsewhere for run, weight in pairs),
        )

    def log_probs(self, block: ScoredBlock, details: Details | None = None) -> Float[Tensor, " n"]:
        """Log-probabilities of the tokens that came, base and memories together."""
        each = [Details.empty(len(block.targets)) for _ in self._runs]
        predicted = self.of_memories(block, each if details is not None else None)
        if details is not None:
            for number, weight, own in zip(self._numbers, self._weights, each, strict=True):
                details.lams[:] += weight * own.lams
                np.minimum(details.distances, own.distances, out=details.distances)
                stronger = weight * own.shares > details.shares
                details.entries[stronger] = own.entries[stronger]
                details.shares[stronger] = weight * own.shares[stronger]
                details.memories[stronger] = number
        return self.ensemble.mixed(predicted, block.lm_log_probs)

    def of_memories(
        self, block: ScoredBlock, details: list[Details] | None = None
    ) -> list[Float[Tensor, " n"]]:
        """Log-probabilities of the tokens that came, with each memory that is used."""
        return [
            run.log_probs(block, None if details is None else details[i])
            for i, run in enumerate(self._runs)
        ]


def heaviest_entries(
    ids: Int[np.ndarray, "q c"], weights: Float[np.ndarray, "q c"]
) -> tuple[Int[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """The entry of each row with the largest total weight, and that weight; -1 and 0 if none.

    An entry may stand in a row several times. Ties go to the lowest id.
    """
    weights = np.where(ids == NO_ENTRY, 0, weights)  # of places of the text itself
    if not ids.shape[1]:
        return np.full(len(ids), NO_ENTRY, dtype=np.int64), np.zeros(len(ids))
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, 1)
    sums = np.cumsum(np.take_along_axis(weights, order, 1), axis=1, dtype=np.float64)
    last = np.append(ids[:, 1:] != ids[:, :-1], np.ones((len(ids), 1), dtype=bool), axis=1)
    ended = np.maximum.accumulate(np.where(last, sums, 0.0), axis=1)
    before = np.append(np.zeros((len(ids), 1)), ended[:, :-1], axis=1)
    totals = np.where(last, sums - before, 0.0)
    best, rows = totals.argmax(axis=1), np.arange(len(ids))
    largest = totals[rows, best]
    return np.where(largest > 0, ids[rows, best], NO_ENTRY), largest


def _fill(details: Details, one: Step) -> None:
    candidates, weights, trust = (
        one.prediction.candidates,
        one.prediction.weights,
        one.prediction.trust,
    )
    details.lams[one.rows] = (1 - weights.lm) * trust
    of_memory = candidates.distances[:, candidates.of(*MEMORY_KINDS)]
    details.distances[one.rows] = of_memory.min(axis=1, initial=np.inf)
    entries, shares = heaviest_entries(candidates.ids, weights.candidates)
    details.entries[one.rows], details.shares[one.rows] = entries, shares * trust
