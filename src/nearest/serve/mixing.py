"""Predictions of rows of different sequences with their memories.

What a sequence carries from one prediction to the next goes in and comes out; a prediction can be
asked which entries spoke for a token, so that provenance says what was mixed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearest.encode.view import lm_view
from nearest.index.neighbours import NO_ENTRY
from nearest.index.suffix import MAX_MATCH
from nearest.retrieval.candidates import KINDS
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.queries import Queries
from nearest.retrieval.step import Prediction, State, advance, step
from nearest.serve.passes import Read

_BETWEEN = -1  # no token: a context ends where the next row's begins

States = tuple[State, ...]  # of one sequence, for each memory that is used


def beginning(ensemble: Ensemble) -> States:
    """The states before a sequence's first prediction."""
    return (State.start(1),) * len(ensemble.used)


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


class Mixture:
    """Log-probabilities of rows with their memories, and what they were made of.

    Attributes:
        base: of the model, in nats.
        log_probs: of model and memories together.
        alone: of the model that reads the text alone; `base` where it does, or where that is not
            known.
        read: what it read beside the text, of each row.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        queries: Queries,
        states: Sequence[States],
        base: Float[Tensor, "rows vocab"],
        alone: Float[Tensor, "rows vocab"] | None = None,
        read: Sequence[Read | None] = (),
    ) -> None:
        """Predict the next token of each row.

        Args:
            ensemble: the memories, their methods and weights; none at all for the model alone.
            queries: hidden state and context of each row (`row_queries`).
            states: what each row carries.
            base: the model's log-probabilities, in nats.
            alone, read: as the attributes; by default nothing is read beside the texts.
        """
        if ensemble.needs_lm:
            queries = queries._replace(lm=lm_view(base))
        self.base = base
        self.alone = base if alone is None else alone
        self.read = read or [None] * len(base)
        self._ensemble = ensemble
        self._numbers = [number for number, weight in enumerate(ensemble.weights) if weight]
        self._weights = [weight for _, weight in ensemble.used]
        self._predictions: list[Prediction] = [
            step(lookup, queries, State.joined([state[n] for state in states]))
            for n, (lookup, _) in enumerate(ensemble.used)
        ]
        predicted = [prediction.log_probs(base) for prediction in self._predictions]
        self.log_probs = ensemble.mixed(predicted, base)

    def after(self, rows: Sequence[int], tokens: Sequence[int]) -> list[States]:
        """What some rows carry once their tokens have come."""
        if not self._ensemble.keeps_state:
            return [beginning(self._ensemble)] * len(rows)
        numbers, chosen = np.array(rows), np.array(tokens)
        base = self.base[torch.from_numpy(numbers), torch.from_numpy(chosen)]
        states = [
            advance(prediction.rows(numbers), chosen, base) for prediction in self._predictions
        ]
        return [tuple(one.rows(slice(n, n + 1)) for one in states) for n in range(len(rows))]

    def spoke(self, row: int, token: int) -> list[Spoke]:
        """The entries that spoke for a token, strongest first; weights sum to what they added."""
        found = []
        for number, weight, prediction in zip(
            self._numbers, self._weights, self._predictions, strict=True
        ):
            candidates = prediction.candidates
            added = prediction.weights.candidates[row] * (weight * prediction.trust[row])
            of_token = (candidates.values[row] == token) & (added > 0)
            columns = np.flatnonzero(of_token & (candidates.ids[row] != NO_ENTRY))
            kinds = np.searchsorted(np.cumsum(candidates.columns), columns, side="right")
            found += [
                Spoke(
                    number,
                    int(candidates.ids[row, column]),
                    float(added[column]),
                    KINDS[kind],
                    int(candidates.lengths[row, column]),
                    float(candidates.distances[row, column]),
                )
                for column, kind in zip(columns.tolist(), kinds.tolist(), strict=True)
            ]
        return sorted(found, key=lambda one: -one.weight)

    def of_text(self, row: int, token: int) -> float:
        """What earlier places of the text itself added to a token's probability."""
        return float(
            sum(
                prediction.weights.candidates[row, spoke].sum() * weight * prediction.trust[row]
                for weight, prediction in zip(self._weights, self._predictions, strict=True)
                for spoke in [
                    (prediction.candidates.values[row] == token)
                    & (prediction.candidates.ids[row] == NO_ENTRY)
                ]
            )
        )


def row_queries(
    keys: Float[np.ndarray, "rows dim"],
    contexts: Sequence[Sequence[int]],
    reach: int = MAX_MATCH + 1,
) -> Queries:
    """Different sequences as one batch of queries.

    Args:
        keys: float32 hidden states at each row's last position.
        contexts: the tokens of each row.
        reach: how many tokens back a method looks.
    """
    joined: list[int] = []
    ends = []
    for context in contexts:
        joined += context[-reach:]
        ends.append(len(joined) - 1)
        joined.append(_BETWEEN)
    return Queries(keys, np.array(joined, np.int64), np.array(ends, np.int64))
