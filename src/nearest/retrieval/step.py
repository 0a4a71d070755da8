"""The one way to predict: candidates → weights → gate → guard, with state in and state out.

`step` predicts the next token of q sequences, `advance` takes the tokens that came:

    state = State.start(q)
    prediction = step(lookup, queries, state)                # one query of each sequence
    log_probs = prediction.log_probs(lm_log_probs)           # (q, vocab), base and memory together
    state = advance(prediction, tokens, lm_log_probs_of_tokens)

Nothing is kept between the calls. So the sequences of a batch may change from one step to the next
(`State.rows`, `State.joined`), as in a server that batches requests of its own; beams and drafts
that are taken back keep the state of the prefix that they go on from. `steps` does all of this for
text whose tokens are known.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.index.neighbours import NO_ENTRY
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import (
    Weights,
    mixed_log_probs,
    token_probs,
    vocabulary_log_probs,
)
from nearest.retrieval.gates.guard import gained_before, gains_of, guarded
from nearest.retrieval.lookup import Ahead, Lookup
from nearest.retrieval.queries import Queries

UNKNOWN = -1  # the target of a query whose next token has not come yet
_AT_ONCE = 512  # queries: their candidates fit the caches, and searches fill the threads


class State(NamedTuple):
    """What each of q sequences carries from one prediction to the next.

    Attributes:
        pointers: entries that the next prediction may go on from (RetoMaton); -1 fills a row.
        gained: nats by which the memory has predicted the sequence better than the base model so
            far, which is what the guard weighs them by; 0 without a guard.
    """

    pointers: Int[np.ndarray, "q p"]
    gained: Float[np.ndarray, " q"]

    @classmethod
    def start(cls, sequences: int) -> "State":
        """The state of sequences of which nothing was predicted yet."""
        return cls(np.empty((sequences, 0), dtype=np.int64), np.zeros(sequences))

    @classmethod
    def joined(cls, states: Sequence["State"]) -> "State":
        """The states of several calls as those of one."""
        if len(states) == 1:
            return states[0]
        width = max(state.pointers.shape[1] for state in states)
        pointers = np.full((sum(len(s.gained) for s in states), width), NO_ENTRY, dtype=np.int64)
        row = 0
        for state in states:
            count, own = state.pointers.shape
            pointers[row : row + count, :own] = state.pointers
            row += count
        return cls(pointers, np.concatenate([state.gained for state in states]))

    def rows(self, rows: slice | Int[np.ndarray, " r"]) -> "State":
        """The states of some sequences."""
        return State(self.pointers[rows], self.gained[rows])


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method says of the next tokens of q sequences.

    Attributes:
        lookup: the method.
        queries: one of each sequence.
        candidates: the entries that were found.
        gained: as in `State`, before this prediction.
    """

    lookup: Lookup
    queries: Queries
    candidates: Candidates
    gained: Float[np.ndarray, " q"]

    @cached_property
    def weights(self) -> Weights:
        """What each candidate adds to the probability of its value, before any guard."""
        return self.lookup.weights(self.queries, self.candidates)

    @property
    def trust(self) -> Float[np.ndarray, " q"]:
        """The guard's weight of the mixture with the memory; 1 without a guard (float64)."""
        if not self.lookup.settings.guard:
            return np.ones(len(self.gained))
        return _sigmoid(self.gained)

    def log_probs(self, lm_log_probs: Float[Tensor, "q vocab"]) -> Float[Tensor, "q vocab"]:
        """Log-probabilities of every token in nats, on the device of the model's own."""
        weights = self.weights
        if self.lookup.settings.guard:  # what it does not trust goes to the model
            distrust = _sigmoid(-self.gained)
            trusted = weights.candidates * self.trust[:, None].astype(np.float32)
            weights = Weights(trusted, self.trust * weights.lm + distrust)
        return vocabulary_log_probs(lm_log_probs, weights, self.candidates.values)

    def row(self, number: int) -> "Prediction":
        """One of the predictions."""
        return self if len(self.gained) == 1 else self.rows(slice(number, number + 1))

    def rows(self, rows: slice | Int[np.ndarray, " r"]) -> "Prediction":
        """Some of the predictions."""
        part = Prediction(
            self.lookup, self.queries.rows(rows), self.candidates.rows(rows), self.gained[rows]
        )
        if "weights" in vars(self):
            vars(part)["weights"] = Weights(self.weights.candidates[rows], self.weights.lm[rows])
        return part


@dataclass(frozen=True, eq=False)
class Step:
    """Predictions of tokens that are known.

    Attributes:
        rows: the numbers of the queries in the text.
        prediction: of these queries.
        targets: the tokens that came; UNKNOWN for one that has not.
        lm_log_probs: the model's log-probability of each, in nats.
    """

    rows: Int[np.ndarray, " r"]
    prediction: Prediction
    targets: Int[np.ndarray, " r"]
    lm_log_probs: Float[Tensor, " r"]

    @cached_property
    def right(self) -> Float[np.ndarray, " r"]:
        """The probability that the candidates give to the target in all, before any guard."""
        return token_probs(self.prediction.weights, self.prediction.candidates, self.targets)

    @cached_property
    def _unguarded(self) -> Float[Tensor, " r"]:
        left = torch.from_numpy(self.prediction.weights.lm)
        return mixed_log_probs(self.lm_log_probs, torch.from_numpy(self.right), left)

    @cached_property
    def gains(self) -> Float[np.ndarray, " r"]:
        """Nats by which the memory predicts each target better than the base model (float64)."""
        return gains_of(self.lm_log_probs, self.right, self.prediction.weights.lm)

    @property
    def log_probs(self) -> Float[Tensor, " r"]:
        """Log-probability of each target, base and memory together, in nats."""
        if not self.prediction.lookup.settings.guard:
            return self._unguarded
        before = torch.from_numpy(self.prediction.gained)
        return guarded(self.lm_log_probs, self._unguarded, before)

    def after(self) -> State:
        """The state of each sequence after its target."""
        prediction = self.prediction
        total = prediction.gained
        if prediction.lookup.settings.guard:
            total = total + self.gains
        if not prediction.lookup.keeps_state:
            return State.start(len(total))._replace(gained=total)
        return State(prediction.lookup.follow(prediction.candidates, self.targets), total)


def _sigmoid(x: Float[np.ndarray, " q"]) -> Float[np.ndarray, " q"]:
    """1 / (1 + exp(−x)); |x| is no larger than some thousands, where exp gives 0 or infinity."""
    with np.errstate(over="ignore"):
        sigmoid: Float[np.ndarray, " q"] = 1 / (1 + np.exp(-x))
    return sigmoid


def step(lookup: Lookup, queries: Queries, state: State, ahead: Ahead | None = None) -> Prediction:
    """Predict the next token of each of q sequences.

    Args:
        lookup: the method, in one memory.
        queries: q of them, one of each sequence.
        state: of the q sequences; `State.start` where they begin.
        ahead: what `Lookup.ahead` gave for the queries, if it was asked.
    """
    candidates = lookup.candidates(queries, state.pointers, ahead)
    return Prediction(lookup, queries, candidates, state.gained)


def advance(
    prediction: Prediction, tokens: Int[np.ndarray, " q"], lm_log_probs: Float[Tensor, " q"]
) -> State:
    """The state after the tokens that came; `lm_log_probs` are the model's of them, in nats."""
    return Step(np.arange(len(tokens)), prediction, tokens, lm_log_probs).after()


def steps(
    lookup: Lookup,
    queries: Queries,
    sequences: Int[np.ndarray, " q"],
    targets: Int[np.ndarray, " q"],
    lm_log_probs: Float[Tensor, " q"],
    states: dict[int, State],
) -> Iterator[Step]:
    """Every query of known text exactly once, in an order that lets state follow the text.

    Sequences with pointers advance side by side, so that their searches are made together, and
    what needs no pointers is looked up for many positions at once; a prediction depends on its own
    sequence alone. Without pointers many positions are taken at once.

    Args:
        lookup: the method, in one memory.
        queries: of sequences one after another, each sequence's in the order of its positions.
        sequences: the number of each query's sequence, ascending.
        targets: the token that came after each query; UNKNOWN, at the end of a sequence, for one
            that has not come yet.
        lm_log_probs: the model's log-probability of each target, in nats.
        states: of sequences that an earlier call began, by number. Left for the next call is that
            of the last sequence.
    """
    if not len(targets):
        return
    predicted = partial(_predicted, lookup, queries, targets, lm_log_probs)
    if (targets == UNKNOWN).all():  # the next token of each sequence, while texts are written
        begun = [states.pop(number, State.start(1)) for number in sequences.tolist()]
        yield predicted(np.arange(len(targets)), slice(None), State.joined(begun))
        return
    if lookup.keeps_state:
        yield from _side_by_side(lookup, queries, sequences, states, predicted)
    else:
        yield from _in_blocks(lookup, sequences, states, predicted)
    for number in set(states) - {int(sequences[-1])}:
        del states[number]


def _predicted(
    lookup: Lookup,
    queries: Queries,
    targets: Int[np.ndarray, " q"],
    lm_log_probs: Float[Tensor, " q"],
    rows: Int[np.ndarray, " r"],
    part: slice | Int[np.ndarray, " r"],
    state: State,
    ahead: Ahead | None = None,
) -> Step:
    """Some of the queries: `part` selects those that `rows` number."""
    prediction = step(lookup, queries.rows(part), state, ahead)
    return Step(rows, prediction, targets[part], lm_log_probs[part])


def _side_by_side(
    lookup: Lookup,
    queries: Queries,
    sequences: Int[np.ndarray, " q"],
    states: dict[int, State],
    predicted: Callable[..., Step],
) -> Iterator[Step]:
    numbers, first, lengths = np.unique(sequences, return_index=True, return_counts=True)
    longest = np.argsort(-lengths, kind="stable")
    numbers, first, lengths = numbers[longest], first[longest], lengths[longest]
    for start in range(0, len(numbers), _AT_ONCE):
        lanes = slice(start, start + _AT_ONCE)
        begun = [states.pop(number, State.start(1)) for number in numbers[lanes].tolist()]
        state, left = State.joined(begun), lengths[lanes]
        for time, rows, ahead in _ahead(lookup, queries, first[lanes], left):
            one = predicted(rows, rows, state.rows(slice(len(rows))), ahead)
            yield one
            if (one.targets == UNKNOWN).all():
                break
            state = one.after()
            for lane in np.flatnonzero(left[: len(rows)] == time + 1):
                states[int(numbers[start + lane])] = state.rows(slice(lane, lane + 1))


def _ahead(
    lookup: Lookup,
    queries: Queries,
    first: Int[np.ndarray, " lanes"],
    lengths: Int[np.ndarray, " lanes"],
) -> Iterator[tuple[int, Int[np.ndarray, " r"], Ahead]]:
    """Each time with its queries, one of each lane that is so long, and what is known of them.

    Lanes stand longest first.
    """
    time = 0
    while time < lengths[0]:
        going = int(np.searchsorted(-lengths, -time))  # lanes longer than `time`
        times = range(time, min(time + max(1, _AT_ONCE // going), int(lengths[0])))
        each = [first[: np.searchsorted(-lengths, -one)] + one for one in times]
        found, done = lookup.ahead(queries.rows(np.concatenate(each))), 0
        for one, rows in zip(times, each, strict=True):
            yield one, rows, found.rows(slice(done, done + len(rows)))
            done += len(rows)
        time = times.stop


def _in_blocks(
    lookup: Lookup,
    sequences: Int[np.ndarray, " q"],
    states: dict[int, State],
    predicted: Callable[..., Step],
) -> Iterator[Step]:
    totals = {number: float(state.gained[0]) for number, state in states.items()}
    for start in range(0, len(sequences), _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, len(sequences)))
        rows = np.arange(part.start, part.stop)
        one = predicted(rows, part, State.start(len(rows)))
        if lookup.settings.guard:
            numbers = sequences[part]
            begun = [totals.get(number, 0.0) for number in numbers.tolist()]
            before = gained_before(torch.from_numpy(one.gains), numbers).numpy() + begun
            one.prediction.gained[:] = before  # candidates and weights do not depend on it
            totals |= zip(numbers.tolist(), (before + one.gains).tolist(), strict=True)
        yield one
    if lookup.settings.guard:
        last = int(sequences[-1])
        states[last] = State.start(1)._replace(gained=np.array([totals[last]]))
