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
from nearest.index.threads import in_threads

SAMPLED = 256  # entries of an n-gram in one array, at most, whose successors are looked at


class Ngrams(NamedTuple):
    """Figures of the last 1, 2, … tokens of each query's context (int64).

    `fertility` is the number of distinct successors. It is exact for n-grams with at most SAMPLED
    entries in each array, else that of an even sample in the arrays' order. An n-gram that would
    reach back beyond the context's start token has none of either.
    """

    counts: Int[np.ndarray, "q n"]
    fertility: Int[np.ndarray, "q n"]


class Successors(NamedTuple):
    """What one array knows of n-grams: how many entries, and what follows them (int32, else -1)."""

    counts: Int[np.ndarray, "q n"]
    sampled: Int[np.ndarray, "q n sampled"]


def successors(
    tokens: Tokens,
    suffixes: Int[np.ndarray, " m"],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    longest: int,
) -> Successors:
    """Entries of the n-grams that end each context, n = 1 … longest, and what follows them.

    Args:
        tokens, suffixes, start_token, context, ends: as in `suffix.longest_matches`.
        longest: the largest n.
    """
    counts = np.zeros((len(ends), longest), dtype=np.int64)
    sampled = np.full((len(ends), longest, SAMPLED), -1, dtype=np.int32)

    def work(part: slice) -> None:
        _look_up(tokens, suffixes, start_token, context, ends[part], counts[part], sampled[part])

    in_threads(work, len(ends))
    return Successors(counts, sampled)


def joined_ngrams(found: Sequence[Successors]) -> Ngrams:
    """What several arrays know of the same n-grams."""
    counts = np.sum([part.counts for part in found], axis=0)
    sampled = np.sort(np.concatenate([part.sampled for part in found], axis=2), axis=2)
    # Of equal tokens the first counts; -1 sorts first and is none.
    fertility = (sampled[..., 0] >= 0) + (np.diff(sampled, axis=2) > 0).sum(axis=2)
    return Ngrams(counts, fertility.astype(np.int64))


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
    tokens: Any, suffixes: Any, start_token: Any, context: Any, ends: Any, counts: Any, sampled: Any
) -> None:
    for i in range(len(ends)):
        low, high = 0, len(suffixes)
        for depth in range(counts.shape[1]):
            at = ends[i] - depth
            if at < 0 or (depth > 0 and context[at + 1] == start_token):
                break
            low = _bound(tokens, suffixes, low, high, depth, context[at])
            high = _bound(tokens, suffixes, low, high, depth, context[at] + 1)
            count = high - low
            if count == 0:
                break
            counts[i, depth] = count
            want = min(count, sampled.shape[2])
            for j in range(want):
                sampled[i, depth, j] = tokens[np.int64(suffixes[low + j * count // want]) + 1]
# fmt: on
