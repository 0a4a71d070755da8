"""Suffix arrays over a corpus: the entries whose left context matches longest, with no vectors.

The array sorts entries by their *reversed* left context, so that all entries whose context ends
with the same tokens stand side by side, and every shorter match is an interval around a longer one
(as in infini-gram, arXiv:2401.17377, for the left side).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Int, UInt8

from nearest.corpus.tokens import Tokens
from nearest.index.ids import position_dtype
from nearest.index.neighbours import NO_ENTRY
from nearest.index.sample import SuffixArray, sample
from nearest.index.threads import in_threads

MAX_MATCH = 512  # tokens; a longer match says no more, and endless repetition stays affordable
_BLOCK = 1 << 20


class _TokenRun(Protocol):
    """A part of a corpus: its tokens, and the id of its first entry."""

    @property
    def tokens(self) -> Tokens: ...
    @property
    def first(self) -> int: ...


class Matches(NamedTuple):
    """Entries found for each query, longest match first; id -1 and length 0 where there are none.

    `longest` counts the entries that match as long as the first one does, found or sampled.
    """

    ids: Int[np.ndarray, "q most"]  # int64
    lengths: Int[np.ndarray, "q most"]  # int16, tokens
    longest: Int[np.ndarray, " q"]  # int64


def sort_suffixes(tokens: Tokens, valued: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Entries in the order of their reversed left contexts, each read back to its start token.

    What is sorted are bytes, two a token (three beyond 65,536 token ids): the array of their order
    is by far the largest, so it is filtered in place. At most 11 bytes a token are needed beside
    `tokens` (16 with three bytes; twice the array from 2^31 bytes on).

    Args:
        tokens: uint16 or uint32 token ids of whole documents, each beginning with the start token.
        valued: which positions are entries.

    Returns:
        int32 positions (int64 beyond 2^31 tokens).
    """
    import pydivsufsort

    width = 2 if int(tokens.max()) < 1 << 16 else 3 if int(tokens.max()) < 1 << 24 else 4
    order: Int[np.ndarray, "_"] = pydivsufsort.divsufsort(_reversed_bytes(tokens, width))
    filled = 0
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        positions = len(tokens) - 1 - block[block % width == 0] // width
        kept = positions[valued[positions]]
        order[filled : filled + len(kept)] = kept
        filled += len(kept)
    return order[:filled].astype(position_dtype(len(tokens)), copy=False)


def _reversed_bytes(tokens: Tokens, width: int) -> UInt8[np.ndarray, " bytes"]:
    """The tokens from the last to the first, `width` bytes each, the highest byte first."""
    found = np.empty((len(tokens), width), np.uint8)
    for stop in range(len(tokens), 0, -_BLOCK):
        part = tokens[max(0, stop - _BLOCK) : stop][::-1].astype(">u4")
        first = len(tokens) - stop
        found[first : first + len(part)] = part.view(np.uint8).reshape(-1, 4)[:, 4 - width :]
    return found.reshape(-1)


def longest_matches(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    most: int,
) -> Matches:
    """For each context, up to `most` entries whose left context shares its longest suffix.

    The longest matches come first, then the next shorter ones, down to one token. Of matches of one
    length that do not all fit, those are taken whose ids come first in a fixed random order: a
    sample that is the same however the corpus is divided into parts. A match counts at most
    MAX_MATCH tokens and never reaches back beyond a start token.

    Args:
        arrays: of a corpus's parts, one after another.
        start_token: what each document begins with.
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
        # Levels before queries: those that few queries have then take no memory.
        counts = np.empty((len(arrays), queries), np.int64)
        lengths = np.empty((len(arrays), most, queries), np.int16)
        lows, highs = (np.empty((len(arrays), most + 1, queries), np.int64) for _ in range(2))
        least = np.ones(queries, np.int64)
        for array, *levels in zip(arrays, counts, lengths, lows, highs, strict=True):
            _find(array.tokens, array.suffixes, start_token, context, ends[some], least, *levels)
        ids, owners = found.ids[some], np.full((queries, most), NO_ENTRY, dtype=np.int16)
        begins, stops = (np.zeros((len(arrays), 2, queries), np.int64) for _ in range(2))
        whole = np.zeros(queries, np.int64)
        chosen = owners, ids, found.lengths[some], found.longest[some]
        _choose(counts, lengths, lows, highs, *chosen, whole, begins, stops)
        for number, array in enumerate(arrays):
            _read(array.suffixes, array.first, number, owners, ids)
        wanted = np.where((stops > begins).any((0, 1)), most - whole, 0)
        sample(arrays, begins, stops, wanted, whole, ids)

    in_threads(work, len(ends))
    return found


def match_lengths(
    arrays: Sequence[_TokenRun],
    start_token: int,
    ids: Int[np.ndarray, "q k"],
    context: Tokens,
    ends: Int[np.ndarray, " q"],
) -> Int[np.ndarray, "q k"]:
    """Tokens of left context (int16) that each query shares with given entries; 0 for id -1."""
    lengths = np.zeros(ids.shape, dtype=np.int16)

    def work(some: slice) -> None:
        for array in arrays:
            part = array.tokens, array.first
            _measure(*part, start_token, ids[some], context, ends[some], lengths[some])

    in_threads(work, len(ids))
    return lengths


def values_of(
    arrays: Sequence[_TokenRun], ids: Int[np.ndarray, "*shape"]
) -> Int[np.ndarray, "*shape"]:
    """The token (int64) that follows each of some entries; -1 for id -1."""
    values = np.full(ids.shape, NO_ENTRY, dtype=np.int64)
    for array in arrays:
        _take(array.tokens, array.first, np.ascontiguousarray(ids).ravel(), values.reshape(-1))
    return values


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=True)
def shared_length(
    tokens: Any, position: Any, context: Any, end: Any, known: Any, limit: Any
) -> Any:
    """Length of the common suffix of tokens[: position + 1] and context[: end + 1], ≤ limit."""
    length = known
    while length < limit and length <= position and (
        tokens[position - length] == context[end - length]
    ):
        length += 1
    return length


@no_type_check
@numba.njit(nogil=True, cache=True)
def insertion(
    tokens: Any, suffixes: Any, context: Any, end: Any, limit: Any
) -> tuple[Any, Any]:
    """Where the context would stand in the array, and the longest match on either side of it.

    Entries that match as far as the limit begin there.
    """
    low, high = -1, len(suffixes)  # what is at low sorts before the context, at high not
    shared_low, shared_high = 0, 0
    while high - low > 1:
        middle = (low + high) // 2
        position = np.int64(suffixes[middle])
        shared = shared_length(tokens, position, context, end, min(shared_low, shared_high), limit)
        if shared == limit or (
            shared <= position
            and np.int64(tokens[position - shared]) > context[end - shared]
        ):
            high, shared_high = middle, shared
        else:
            low, shared_low = middle, shared
    return high, max(shared_low, shared_high)


@no_type_check
@numba.njit(nogil=True, cache=True)
def _edge(
    tokens: Any, suffixes: Any, context: Any, end: Any, length: Any, start: Any, step: Any
) -> Any:
    """First index from `start` on, going by `step` (±1), that matches fewer than `length` tokens.

    Matches shorten with the distance from the context's own place, so the edge is found by steps
    that double and then halve.
    """
    size = len(suffixes)
    inside, jump = start - step, 1
    while True:
        probe = inside + step * jump
        if probe < 0 or probe >= size:
            outside = -1 if step < 0 else size
            break
        if shared_length(tokens, np.int64(suffixes[probe]), context, end, 0, length) < length:
            outside = probe
            break
        inside = probe
        jump *= 2
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if shared_length(tokens, np.int64(suffixes[middle]), context, end, 0, length) < length:
            outside = middle
        else:
            inside = middle
    return outside


@no_type_check
@numba.njit(nogil=True, cache=True)
def _limit(start_token: Any, context: Any, end: Any) -> Any:
    """How far back a match can reach: to the context's start token, at most MAX_MATCH."""
    limit = 0
    while limit < MAX_MATCH and limit <= end:
        limit += 1
        if context[end - limit + 1] == start_token:
            break
    return limit


@no_type_check
@numba.njit(nogil=True, cache=True)
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
@numba.njit(nogil=True, cache=True)
def _take(tokens: Any, first: Any, ids: Any, values: Any) -> None:
    for i in range(len(ids)):
        entry = ids[i] - first
        if 0 <= entry < len(tokens) - 1:
            values[i] = tokens[entry + 1]


@no_type_check
@numba.njit(nogil=True, cache=True)
def _find(
    tokens: Any, suffixes: Any, start_token: Any, context: Any, ends: Any, least: Any,
    counts: Any, lengths: Any, lows: Any, highs: Any,
) -> None:
    """The matches of each query in one array by length, until there are as many as are wanted.

    Then `least` becomes their length: no array need be searched for shorter ones any more.
    Entries that match as long as level i says, or longer, are suffixes[lows[i + 1] : highs[i + 1]];
    lows[0] = highs[0] is where the query itself would stand.
    """
    most, size = len(lengths), len(suffixes)
    for i in range(len(ends)):
        end, limit = ends[i], _limit(start_token, context, ends[i])
        high, length = insertion(tokens, suffixes, context, end, limit)
        low, level = high, 0
        lows[0, i] = highs[0, i] = high
        while length >= least[i] and high - low < most:
            low = _edge(tokens, suffixes, context, end, length, low - 1, -1) + 1
            high = _edge(tokens, suffixes, context, end, length, high, 1)
            lengths[level, i] = length
            if high - low >= most:
                least[i] = length
            level += 1
            lows[level, i], highs[level, i] = low, high
            length = 0
            if low > 0:
                length = shared_length(tokens, np.int64(suffixes[low - 1]), context, end, 0, limit)
            if high < size:
                length = max(
                    length, shared_length(tokens, np.int64(suffixes[high]), context, end, 0, limit)
                )
        counts[i] = level


@no_type_check
@numba.njit(nogil=True, cache=True)
def _choose(
    counts: Any, lengths: Any, lows: Any, highs: Any, owners: Any, places: Any, shared: Any,
    longest: Any, whole: Any, begins: Any, stops: Any,
) -> None:
    """Which entries of which array each query gets, of what was found in all of them.

    The entries of a level that does not all fit are suffixes[begins : stops] of each array, before
    and after those that match longer, of which there are `whole`.
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
@numba.njit(nogil=True, cache=True)
def _read(suffixes: Any, first: Any, number: Any, owners: Any, ids: Any) -> None:
    """Put the entries of one array in the place of where they stand in it."""
    for i in range(len(ids)):
        for j in range(ids.shape[1]):
            if owners[i, j] == number:
                ids[i, j] = np.int64(suffixes[ids[i, j]]) + first
# fmt: on
