"""Summary statistics of candidates, and of their distribution over tokens, as inputs of gates."""

from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Float

from nearest.machine import code_can_be_cached
from nearest.retrieval.candidates import Candidates, spans_of

VOTES = ("top probability", "entropy", "log distinct tokens")


def kind_figures(candidates: Candidates, kinds: Sequence[str]) -> Float[np.ndarray, "q kinds 3"]:
    """Of each kind the number of candidates, the nearest's distance, and the longest match.

    All are 0 where a query has no candidate of the kind (float32).
    """
    begins, stops = spans_of(candidates.columns, tuple((kind,) for kind in kinds))
    found = np.zeros((len(candidates.ids), len(kinds), 3), dtype=np.float32)
    _figures(candidates.distances, candidates.lengths, begins, stops, found)
    return found


# fmt: off
@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _figures(distances: Any, lengths: Any, begins: Any, stops: Any, found: Any) -> None:
    for i in range(len(distances)):
        for n in range(len(begins)):
            count, nearest, longest = 0, np.float32(np.inf), 0
            for j in range(begins[n], stops[n]):
                if distances[i, j] < np.inf:
                    count += 1
                    nearest = min(nearest, distances[i, j])
                longest = max(longest, lengths[i, j])
            if count:
                found[i, n, 0], found[i, n, 1], found[i, n, 2] = count, nearest, longest


@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached())
def new_table(most: Any) -> Any:
    """Room to count rows of up to so many candidates: `table` of `count_row`.

    A hash table of tokens and their weights; a slot counts in the row in which it was taken.
    """
    size = 1
    while size < 2 * most:
        size *= 2
    return (
        np.empty(size, dtype=np.int64), np.empty(size, dtype=np.float32),
        np.full(size, -1, dtype=np.int64), np.empty(most, dtype=np.int64),
    )


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def count_row(number: Any, weights: Any, values: Any, table: Any, found: Any) -> None:
    """VOTES of one row; no two rows that are counted with one table have the same number."""
    tokens, totals, row_of, taken = table
    size = len(tokens)
    distinct = 0
    for j in range(len(weights)):
        token, weight = values[j], weights[j]
        if token < 0 or not weight > 0:
            continue
        slot = (token * 2654435761) & (size - 1)
        while row_of[slot] == number and tokens[slot] != token:
            slot = (slot + 1) & (size - 1)
        if row_of[slot] != number:
            row_of[slot], tokens[slot], totals[slot] = number, token, 0
            taken[distinct] = slot
            distinct += 1
        totals[slot] += weight
    top = entropy = np.float32(0)
    for j in range(distinct):
        total = totals[taken[j]]
        top = max(top, total)
        entropy -= total * np.log(total)
    found[0], found[1], found[2] = top, entropy, np.log(1 + distinct)

# fmt: on
