"""Predictions of rows of different sequences with their memories.

What a sequence carries from one prediction to the next (`State`) goes in and comes out; a
prediction can be asked which entries spoke for a token, so that provenance says what was mixed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.encode.view import lm_view
from nearest.index.neighbours import NO_ENTRY
from nearest.index.suffix import MAX_MATCH
from nearest.retrieval.candidates import KINDS, Candidates
from nearest.retrieval.distribution import Weights, vocabulary_log_probs
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.gates.guard import gained, guarded
from nearest.retrieval.lookup import Lookup, stacked
from nearest.retrieval.queries import Queries

_BETWEEN = -1  # no token: a context ends where the next row's begins


class Carried(NamedTuple):
    """What one memory's method carries: pointers, and how much it has gained (nats)."""

    pointers: Int[np.ndarray, " p"]
    gained: float


State = tuple[Carried, ...]  # of each memory that is used

_NOTHING = Carried(np.full(1, NO_ENTRY, dtype=np.int64), 0.0)


def beginning(ensemble: Ensemble) -> State:
    """The state before a sequence's first prediction."""
    return (_NOTHING,) * len(ensemble.used)


class Spoke(NamedTuple):
    """An entry that spoke for a token: its memory's number, and what it added to the probability.

    `kind` says how it was found: dense, pointers or suffix. `length` is the left context that it
    shares with the sequence, in tokens, where the method measures it.
    """

    memory: int
    entry: int
    weight: float
    kind: str
    length: int
    distance: float


class _Part(NamedTuple):
    lookup: Lookup
    number: int  # of the memory
    weight: float
    candidates: Candidates
    weights: Weights
    gated: Float[Tensor, "rows vocab"]
    gains: Float[np.ndarray, " rows"]


class Prediction:
    """Log-probabilities of rows with the memories, and what they were made of."""

    def __init__(self, ensemble: Ensemble, base: Float[Tensor, "rows vocab"]) -> None:
        self._ensemble = ensemble
        self.base = base
        self._parts: list[_Part] = []
        self.log_probs = base

    @classmethod
    def of(
        cls,
        ensemble: Ensemble,
        queries: Queries,
        states: Sequence[State],
        base: Float[Tensor, "rows vocab"],
    ) -> "Prediction":
        """Predict the next token of each row.

        Args:
            ensemble: the memories, their methods and weights; none at all for the model alone.
            queries: hidden state and context of each row (`row_queries`).
            states: what each row carries.
            base: the model's log-probabilities, in nats.
        """
        made = cls(ensemble, base)
        if ensemble.needs_lm:
            queries = queries._replace(lm=lm_view(base))
        numbers = [n for n, weight in enumerate(ensemble.weights) if weight]
        predicted = []
        for n, ((lookup, weight), number) in enumerate(zip(ensemble.used, numbers, strict=True)):
            carried = [state[n] for state in states]
            candidates = lookup.candidates(queries, stacked([one.pointers for one in carried]))
            weights = lookup.weights(queries, candidates)
            gated = mixed = vocabulary_log_probs(base, weights, candidates.values)
            gains = np.array([one.gained for one in carried])
            if lookup.settings.guard:
                mixed = guarded(base, gated, torch.from_numpy(gains)[:, None])
            predicted.append(mixed)
            made._parts.append(_Part(lookup, number, weight, candidates, weights, gated, gains))
        made.log_probs = ensemble.mixed(predicted, base)
        return made

    def after(self, row: int, token: int) -> State:
        """What a row carries once a token has come."""
        after = []
        for part in self._parts:
            pointers, gain = _NOTHING
            if part.lookup.keeps_state:
                one = part.candidates.rows(slice(row, row + 1))
                pointers = part.lookup.follow(one, np.array([token]))[0]
            if part.lookup.settings.guard:
                base, mixed = self.base[row, token : token + 1], part.gated[row, token : token + 1]
                gain = float(part.gains[row]) + float(gained(base, mixed))
            after.append(Carried(pointers, gain))
        return tuple(after)

    def spoke(self, row: int, token: int) -> list[Spoke]:
        """The entries that spoke for a token, strongest first; weights sum to what they added."""
        found = []
        for part in self._parts:
            values, added = part.candidates.values[row], part.weights.candidates[row]
            columns = np.flatnonzero((values == token) & (added > 0))
            share = part.weight
            if part.lookup.settings.guard:
                share /= 1 + np.exp(-part.gains[row])
            bounds = np.cumsum(part.candidates.columns)
            kinds = np.searchsorted(bounds, columns, side="right")
            for column, kind in zip(columns.tolist(), kinds.tolist(), strict=True):
                found.append(
                    Spoke(
                        part.number,
                        int(part.candidates.ids[row, column]),
                        float(share * added[column]),
                        KINDS[kind],
                        int(part.candidates.lengths[row, column]),
                        float(part.candidates.distances[row, column]),
                    )
                )
        return sorted(found, key=lambda one: -one.weight)


def row_queries(keys: Float[np.ndarray, "rows dim"], contexts: Sequence[Sequence[int]]) -> Queries:
    """Different sequences as one batch of queries.

    Args:
        keys: float32 hidden states at each row's last position.
        contexts: the tokens of each row; beyond the last MAX_MATCH nothing is compared.
    """
    joined: list[int] = []
    ends = []
    for context in contexts:
        joined += context[-MAX_MATCH - 1 :]
        ends.append(len(joined) - 1)
        joined.append(_BETWEEN)
    return Queries(keys, np.array(joined, np.int64), np.array(ends, np.int64))
