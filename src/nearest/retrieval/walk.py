"""Documents advance side by side: each step predicts the next token of all that go on.

A prediction that follows pointers needs the one before it in its document, and no other: so the
result does not depend on which documents stand beside it, while their searches are made together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from nearest.retrieval.candidates import Candidates
from nearest.retrieval.lookup import Lookup, stacked
from nearest.retrieval.queries import Queries

_AT_ONCE = 512  # queries: their candidates fit the caches, and searches fill the threads

_NOTHING = np.empty(0, dtype=np.int64)

# By document number: the pointers that a document carries to its next token.
Trails = dict[int, Int[np.ndarray, "_"]]


class Step(NamedTuple):
    """Candidates of some queries."""

    rows: Int[np.ndarray, " r"]  # which queries
    candidates: Candidates


def walk(
    lookup: Lookup,
    queries: Queries,
    documents: Int[np.ndarray, " q"],
    targets: Int[np.ndarray, " q"],
    trails: Trails,
) -> Iterator[Step]:
    """Candidates of every query, in an order that lets pointers follow the tokens that came.

    Args:
        lookup: the method.
        queries: of documents one after another, each document's in the order of its positions.
        documents: the number of each query's document.
        targets: the token that came after each query.
        trails: pointers of a document that an earlier call began; left for the next call is what
            the last document has.
    """
    if not lookup.keeps_state:
        for start in range(0, len(targets), _AT_ONCE):
            rows = np.arange(start, min(start + _AT_ONCE, len(targets)))
            yield Step(rows, lookup.candidates(queries.rows(slice(rows[0], rows[-1] + 1))))
        return
    numbers, first, lengths = np.unique(documents, return_index=True, return_counts=True)
    longest = np.argsort(-lengths, kind="stable")
    for start in range(0, len(numbers), _AT_ONCE):
        lanes = longest[start : start + _AT_ONCE]
        yield from _side_by_side(
            lookup, queries, targets, numbers[lanes], first[lanes], lengths[lanes], trails
        )
    last = int(documents[-1])
    for number in set(trails) - {last}:
        del trails[number]


def _side_by_side(
    lookup: Lookup,
    queries: Queries,
    targets: Int[np.ndarray, " q"],
    numbers: Int[np.ndarray, " lanes"],
    first: Int[np.ndarray, " lanes"],
    lengths: Int[np.ndarray, " lanes"],  # descending
    trails: Trails,
) -> Iterator[Step]:
    pointers = stacked([trails.pop(int(number), _NOTHING) for number in numbers])
    for time in range(int(lengths[0])):
        going = int(np.searchsorted(-lengths, -time))  # lanes longer than `time`
        rows = first[:going] + time
        candidates = lookup.candidates(queries.rows(rows), pointers[:going])
        yield Step(rows, candidates)
        followed = lookup.follow(candidates, targets[rows])
        for lane in np.flatnonzero(lengths[:going] == time + 1):
            trails[int(numbers[lane])] = followed[lane]
        pointers = followed
