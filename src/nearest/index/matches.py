"""The entries whose left context shares the longest suffix with a query's, without vectors."""

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.neighbours import NO_ENTRY
from nearest.index.sample import sample
from nearest.index.suffix import (
    MAX_MATCH,
    SuffixArray,
    count,
    insertion,
    position_at,
    shared_length,
)
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached


class TokenRun(NamedTuple):
    """A shard of a corpus: its tokens, and the id of its first entry."""

    tokens: Tokens
    first: int = 0


class Matches(NamedTuple):
    """The entries that match each query, longest first; missing ones have id -1 and length 0.

    `longest` counts all entries that match as long as the first one, whether sampled or not.
    """

    ids: Int[np.ndarray, "q most"]  # int64
    lengths: Int[np.ndarray, "q most"]  # int16, tokens
    longest: Int[np.ndarray, " q"]  # int64


def longest_matches(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    most: int,
) -> Matches:
    """Up to `most` entries for each context, whose left contexts share the longest suffix with it.

    Longest matches come first, down to one token. If matches of one length do not all fit, those
    that come first in the random order of ids are taken: a sample that does not depend on how the
    corpus is divided into shards. A match has at most MAX_MATCH tokens and ends at a start token.

    Args:
        arrays: the shards of a corpus, in order.
        start_token: the first token of each document.
        context: int64 token ids.
        ends: query i is context[: ends[i] + 1].
        most: number of entries wanted.
    """
    shape = len(ends), most
    found = Matches(
        np.full(shape, NO_ENTRY, dtype=np.int64),
        np.zeros(shape, dtype=np.int16),
        np.zeros(len(ends), dtype=np.int64),
    )

    def work(some: slice) -> None:
        queries = len(ends[some])
        # Levels before queries: pages of levels that few queries reach stay untouched.
        counts = np.empty((len(arrays), queries), np.int64)
        lengths = np.empty((len(arrays), most, queries), np.int16)
        lows, highs = (np.empty((len(arrays), most + 1, queries), np.int64) for _ in range(2))
        least = np.ones(queries, np.int64)
        for array, *levels in zip(arrays, counts, lengths, lows, highs, strict=True):
            _find(array.tokens, array.skipping, start_token, context, ends[some], least, *levels)
        ids, owners = found.ids[some], np.full((queries, most), NO_ENTRY, dtype=np.int16)
        begins, stops = (np.zeros((len(arrays), 2, queries), np.int64) for _ in range(2))
        whole, wanted = np.zeros((2, queries), np.int64)
        chosen = owners, ids, found.lengths[some], found.longest[some]
        _choose(counts, lengths, lows, highs, *chosen, whole, wanted, begins, stops)
        for number, array in enumerate(arrays):
            _read(array.skipping, array.first, number, owners, ids)
        sample(arrays, begins, stops, wanted, whole, ids)

    in_threads(work, len(ends))
    return found


def match_lengths(
    arrays: Sequence[TokenRun],
    start_token: int,
    ids: Int[np.ndarray, "q k"],
    context: Tokens,
    ends: Int[np.ndarray, " q"],
) -> Int[np.ndarray, "q k"]:
    """Number of left-context tokens (int16) that query i shares with ids[i, j]; 0 for id -1."""
    lengths = np.zeros(ids.shape, dtype=np.int16)

    def work(some: slice) -> None:
        for array in arrays:
            part = array.tokens, array.first
            _measure(*part, start_token, ids[some], context, ends[some], lengths[some])

    in_threads(work, len(ids))
    return lengths


def values_of(
    arrays: Sequence[TokenRun], ids: Int[np.ndarray, "*shape"]
) -> Int[np.ndarray, "*shape"]:
    """The token (int64) that follows each entry; -1 for id -1."""
    values = np.full(ids.shape, NO_ENTRY, dtype=np.int64)
    for array in arrays:
        _take(array.tokens, array.first, np.ascontiguousarray(ids).ravel(), values.reshape(-1))
    return values


# fmt: off
@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _edge(
    tokens: Any, array: Any, context: Any, end: Any, length: Any, start: Any, step: Any
) -> Any:
    """First index from `start` on, going by `step` (±1), that matches fewer than `length` tokens.

    Matches get shorter with the distance from the context's place, so steps double, then halve.
    """
    size = count(array)
    inside, jump = start - step, 1
    while True:
        probe = inside + step * jump
        if probe < 0 or probe >= size:
            outside = -1 if step < 0 else size
            break
        if shared_length(tokens, position_at(array, probe), context, end, 0, length) < length:
            outside = probe
            break
        inside = probe
        jump *= 2
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if shared_length(tokens, position_at(array, middle), context, end, 0, length) < length:
            outside = middle
        else:
            inside = middle
    return outside


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _limit(start_token: Any, context: Any, end: Any) -> Any:
    """Longest possible match: back to the context's start token, at most MAX_MATCH."""
    limit = 0
    while limit < MAX_MATCH and limit <= end:
        limit += 1
        if context[end - limit + 1] == start_token:
            break
    return limit


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _measure(
    tokens: Any, first: Any, start_token: Any, ids: Any, context: Any, ends: Any, lengths: Any
) -> None:
    for i in range(len(ids)):
        limit = _limit(start_token, context, ends[i])
        for j in range(ids.shape[1]):
            entry = ids[i, j] - first
            if 0 <= entry < len(tokens):
                lengths[i, j] = shared_length(tokens, entry, context, ends[i], 0, limit)


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _take(tokens: Any, first: Any, ids: Any, values: Any) -> None:
    for i in range(len(ids)):
        entry = ids[i] - first
        if 0 <= entry < len(tokens) - 1:
            values[i] = tokens[entry + 1]


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _find(
    tokens: Any, array: Any, start_token: Any, context: Any, ends: Any, least: Any,
    counts: Any, lengths: Any, lows: Any, highs: Any,
) -> None:
    """Find each query's matches in one array, level by level, until there are enough.

    `least` then becomes their length, so that no other array is searched for shorter ones. Entries
    that match lengths[i] tokens or more have the places lows[i + 1] to highs[i + 1]; lows[0] =
    highs[0] is where the query itself would stand.
    """
    most, size = len(lengths), count(array)
    for i in range(len(ends)):
        end, limit = ends[i], _limit(start_token, context, ends[i])
        high, length = insertion(tokens, array, context, end, limit)
        low, level = high, 0
        lows[0, i] = highs[0, i] = high
        while length >= least[i] and high - low < most:
            low = _edge(tokens, array, context, end, length, low - 1, -1) + 1
            high = _edge(tokens, array, context, end, length, high, 1)
            lengths[level, i] = length
            if high - low >= most:
                least[i] = length
            level += 1
            lows[level, i], highs[level, i] = low, high
            length = 0
            if low > 0:
                length = shared_length(tokens, position_at(array, low - 1), context, end, 0, limit)
            if high < size:
                length = max(
                    length, shared_length(tokens, position_at(array, high), context, end, 0, limit)
                )
        counts[i] = level


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _choose(
    counts: Any, lengths: Any, lows: Any, highs: Any, owners: Any, places: Any, shared: Any,
    longest: Any, whole: Any, wanted: Any, begins: Any, stops: Any,
) -> None:
    """Choose each query's entries from the levels found in all arrays, longest first.

    The first `whole` entries are those of levels that fit. Of the level that does not fit `wanted`
    are to be sampled: in each array its entries have the places from begins to stops, in two runs
    around the longer matches.
    """
    most = owners.shape[1]
    levels = np.zeros(len(counts), np.int64)  # the next of each array
    for i in range(len(owners)):
        levels[:] = 0
        taken = 0
        while taken < most:
            length = 0
            for a in range(len(counts)):
                if levels[a] < counts[a, i]:
                    length = max(length, lengths[a, levels[a], i])
            if length == 0:
                break
            total = 0
            for a in range(len(counts)):
                level = levels[a]
                if level < counts[a, i] and lengths[a, level, i] == length:
                    total += lows[a, level, i] - lows[a, level + 1, i]
                    total += highs[a, level + 1, i] - highs[a, level, i]
            if taken == 0:
                longest[i] = total
            want = most - taken
            if total > want:
                shared[i, taken:] = length
                wanted[i] = want
            for a in range(len(counts)):
                level = levels[a]
                if level < counts[a, i] and lengths[a, level, i] == length:
                    for run, begin, stop in (
                        (0, lows[a, level + 1, i], lows[a, level, i]),
                        (1, highs[a, level, i], highs[a, level + 1, i]),
                    ):
                        if total > want:
                            begins[a, run, i], stops[a, run, i] = begin, stop
                            continue
                        for place in range(begin, stop):
                            owners[i, taken] = a
                            places[i, taken] = place
                            shared[i, taken] = length
                            taken += 1
                    levels[a] += 1
            if total > want:
                break
        whole[i] = taken


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _read(array: Any, first: Any, number: Any, owners: Any, ids: Any) -> None:
    """Replace places in one array by entry ids."""
    for i in range(len(ids)):
        for j in range(ids.shape[1]):
            if owners[i, j] == number:
                ids[i, j] = position_at(array, ids[i, j]) + first
# fmt: on
