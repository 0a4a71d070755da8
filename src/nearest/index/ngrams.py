"""How often a corpus has the last tokens of a context, and by how many tokens they are followed.

Read off the suffix array, in which all entries whose context ends with the same tokens stand side
by side.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.neighbours import NO_ENTRY
from nearest.index.sample import SuffixArray, sample
from nearest.index.suffix import values_of
from nearest.index.threads import in_threads

SAMPLED = 256  # entries of an n-gram, at most, whose successors are looked at


class Ngrams(NamedTuple):
    """Figures of the last 1, 2, … tokens of each query's context (int64).

    `fertility` is the number of distinct successors: of all entries of an n-gram, or of a sample of
    SAMPLED. An n-gram that would reach back beyond the context's start token has none of either.
    """

    counts: Int[np.ndarray, "q n"]
    fertility: Int[np.ndarray, "q n"]


def ngrams(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    longest: int,
) -> Ngrams:
    """Entries of the n-grams that end each context, n = 1 … longest, and how varied they go on.

    Args:
        arrays, start_token, context, ends: as in `suffix.longest_matches`.
        longest: the largest n.
    """
    counts, fertility = (np.zeros((len(ends), longest), dtype=np.int64) for _ in range(2))

    def work(some: slice) -> None:
        queries = len(ends[some])
        lows, highs = (np.zeros((len(arrays), longest, queries), np.int64) for _ in range(2))
        for array, *found in zip(arrays, lows, highs, strict=True):
            _look_up(array.tokens, array.suffixes, start_token, context, ends[some], *found)
        counts[some] = (highs - lows).sum(0).T
        for n, wanted in enumerate(np.minimum(counts[some], SAMPLED).T):
            ids = np.full((queries, SAMPLED), NO_ENTRY, dtype=np.int64)
            own = slice(n, n + 1)
            sample(arrays, lows[:, own], highs[:, own], wanted, np.zeros_like(wanted), ids)
            after = np.sort(values_of(arrays, ids), axis=1)
            # Of equal tokens the first counts; -1 sorts first and is none.
            fertility[some, n] = (after[:, 0] >= 0) + (np.diff(after, axis=1) > 0).sum(axis=1)

    in_threads(work, len(ends))
    return Ngrams(counts, fertility)


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=True)
def _bound(tokens: Any, suffixes: Any, low: Any, high: Any, depth: Any, token: Any) -> Any:
    """First index in [low, high) whose token `depth` places back is `token` or greater.

    All between low and high have the tokens after it in common.
    """
    while low < high:
        middle = (low + high) // 2
        position = np.int64(suffixes[middle])
        if position >= depth and np.int64(tokens[position - depth]) >= token:
            high = middle
        else:
            low = middle + 1
    return low


@no_type_check
@numba.njit(nogil=True, cache=True)
def _look_up(
    tokens: Any, suffixes: Any, start_token: Any, context: Any, ends: Any, lows: Any, highs: Any
) -> None:
    """Where the entries of each query's n-grams stand: suffixes[lows[n - 1] : highs[n - 1]]."""
    for i in range(len(ends)):
        low, high = 0, len(suffixes)
        for depth in range(len(lows)):
            at = ends[i] - depth
            if at < 0 or (depth > 0 and context[at + 1] == start_token):
                break
            low = _bound(tokens, suffixes, low, high, depth, context[at])
            high = _bound(tokens, suffixes, low, high, depth, context[at] + 1)
            if low == high:
                break
            lows[depth, i], highs[depth, i] = low, high
# fmt: on
