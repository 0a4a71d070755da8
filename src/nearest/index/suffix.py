"""Suffix arrays over a corpus: the entries whose left context matches longest, with no vectors.

The array sorts entries by their *reversed* left context, so that all entries whose context ends
with the same tokens stand side by side, and every shorter match is an interval around a longer one
(as in infini-gram, arXiv:2401.17377, for the left side). `longest_matches_reference` scans instead.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Int

from nearest.corpus.tokens import Tokens
from nearest.index.neighbours import NO_ENTRY, position_dtype
from nearest.index.threads import in_threads

MAX_MATCH = 512  # tokens; a longer match says no more, and endless repetition stays affordable


class Matches(NamedTuple):
    """Entries found for each query, longest match first; id -1 and length 0 where there are none.

    `longest` counts the entries that match as long as the first one does, found or sampled.
    """

    ids: Int[np.ndarray, "q most"]  # int64
    lengths: Int[np.ndarray, "q most"]  # int16, tokens
    longest: Int[np.ndarray, " q"]  # int64


def sort_suffixes(tokens: Tokens, entries: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """Entries in the order of their reversed left contexts, each read back to its start token.

    Args:
        tokens: uint16 or uint32 token ids of whole documents, each beginning with the start token.
        entries: ascending positions to sort, those that have a value.

    Returns:
        int32 positions (int64 beyond 2^31 tokens).
    """
    import pydivsufsort

    order = pydivsufsort.divsufsort(np.ascontiguousarray(tokens[::-1]))
    positions = len(tokens) - 1 - order
    chosen: Bool[np.ndarray, " n"] = np.zeros(len(tokens), dtype=bool)
    chosen[entries] = True
    ordered: Int[np.ndarray, " m"] = positions[chosen[positions]]
    return ordered.astype(position_dtype(len(tokens)))


def longest_matches(
    tokens: Tokens,
    suffixes: Int[np.ndarray, " m"],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    most: int,
) -> Matches:
    """For each context, up to `most` entries whose left context shares its longest suffix.

    The longest matches come first, then the next shorter ones, down to one token. Of matches of one
    length that do not all fit, an even sample in the order of the array is taken. A match counts at
    most MAX_MATCH tokens and never reaches back beyond a start token.

    Args:
        tokens, suffixes: as in `sort_suffixes`.
        start_token: what each document begins with.
        context: int64 token ids.
        ends: query i is context[: ends[i] + 1].
        most: number of entries wanted.
    """
    ids = np.full((len(ends), most), NO_ENTRY, dtype=np.int64)
    lengths = np.zeros((len(ends), most), dtype=np.int16)
    longest = np.zeros(len(ends), dtype=np.int64)

    def work(part: slice) -> None:
        _match(
            tokens, suffixes, start_token, context, ends[part], ids[part], lengths[part],
            longest[part],
        )  # fmt: skip

    in_threads(work, len(ends))
    return Matches(ids, lengths, longest)


def joined_matches(found: Sequence[Matches], most: int) -> Matches:
    """What several arrays found for the same queries: longest first, equal ones taking turns."""
    ids = np.concatenate([part.ids for part in found], axis=1)
    lengths = np.concatenate([part.lengths for part in found], axis=1)
    turn = np.concatenate([np.arange(part.ids.shape[1]) for part in found])
    order = np.argsort(turn - lengths.astype(np.int64) * len(turn), axis=1, kind="stable")[:, :most]
    first = np.stack([part.lengths[:, 0] for part in found])
    longest = np.where(first == first.max(axis=0), [part.longest for part in found], 0).sum(axis=0)
    return Matches(
        np.take_along_axis(ids, order, 1), np.take_along_axis(lengths, order, 1), longest
    )


def match_lengths(
    tokens: Tokens,
    start_token: int,
    ids: Int[np.ndarray, "q k"],
    context: Tokens,
    ends: Int[np.ndarray, " q"],
) -> Int[np.ndarray, "q k"]:
    """Tokens of left context (int16) that each query shares with given entries; 0 for id -1."""
    lengths = np.zeros(ids.shape, dtype=np.int16)

    def work(part: slice) -> None:
        _measure(tokens, start_token, ids[part], context, ends[part], lengths[part])

    in_threads(work, len(ids))
    return lengths


def longest_matches_reference(
    tokens: Tokens,
    suffixes: Int[np.ndarray, " m"],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    most: int,
) -> Matches:
    """What `longest_matches` finds, by comparing each context with every entry."""
    found = Matches(
        np.full((len(ends), most), NO_ENTRY, dtype=np.int64),
        np.zeros((len(ends), most), dtype=np.int16),
        np.zeros(len(ends), dtype=np.int64),
    )
    for i, end in enumerate(ends):
        query = _reversed_context(context, int(end), start_token)
        lengths = np.array(
            [_common(query, _reversed_context(tokens, int(p), start_token)) for p in suffixes]
        )
        taken = 0
        for length in sorted({n for n in lengths.tolist() if n}, reverse=True):
            level = suffixes[lengths == length]
            if not taken:
                found.longest[i] = len(level)
            want = min(most - taken, len(level))
            part = slice(taken, taken + want)
            found.ids[i, part] = level[np.arange(want) * len(level) // max(want, 1)]
            found.lengths[i, part] = length
            taken += want
    return found


def _reversed_context(tokens: Tokens, end: int, start_token: int) -> list[int]:
    """Tokens from `end` backwards, up to and with the start token, at most MAX_MATCH."""
    read: list[int] = []
    for token in tokens[end::-1][:MAX_MATCH].tolist():
        read.append(token)
        if token == start_token:
            break
    return read


def _common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=True)
def _shared(tokens: Any, position: Any, context: Any, end: Any, known: Any, limit: Any) -> Any:
    """Length of the common suffix of tokens[: position + 1] and context[: end + 1], ≤ limit."""
    length = known
    while length < limit and length <= position and (
        tokens[position - length] == context[end - length]
    ):
        length += 1
    return length


@no_type_check
@numba.njit(nogil=True, cache=True)
def _insertion(
    tokens: Any, suffixes: Any, context: Any, end: Any, limit: Any
) -> tuple[Any, Any]:
    """Where the context would stand in the array, and the longest match on either side of it."""
    low, high = -1, len(suffixes)  # what is at low sorts before the context, at high not
    shared_low, shared_high = 0, 0
    while high - low > 1:
        middle = (low + high) // 2
        position = np.int64(suffixes[middle])
        shared = _shared(tokens, position, context, end, min(shared_low, shared_high), limit)
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
        if _shared(tokens, np.int64(suffixes[probe]), context, end, 0, length) < length:
            outside = probe
            break
        inside = probe
        jump *= 2
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        if _shared(tokens, np.int64(suffixes[middle]), context, end, 0, length) < length:
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
    tokens: Any, start_token: Any, ids: Any, context: Any, ends: Any, lengths: Any
) -> None:
    for i in range(len(ids)):
        limit = _limit(start_token, context, ends[i])
        for j in range(ids.shape[1]):
            if ids[i, j] >= 0:
                lengths[i, j] = _shared(tokens, ids[i, j], context, ends[i], 0, limit)


@no_type_check
@numba.njit(nogil=True, cache=True)
def _match(
    tokens: Any, suffixes: Any, start_token: Any, context: Any, ends: Any, ids: Any, lengths: Any,
    longest: Any,
) -> None:
    most, size = ids.shape[1], len(suffixes)
    for i in range(len(ends)):
        end, limit = ends[i], _limit(start_token, context, ends[i])
        high, length = _insertion(tokens, suffixes, context, end, limit)
        low, taken = high, 0  # suffixes[low:high] has been taken
        while length > 0 and taken < most:
            new_low = _edge(tokens, suffixes, context, end, length, low - 1, -1) + 1
            new_high = _edge(tokens, suffixes, context, end, length, high, 1)
            below, level = low - new_low, (low - new_low) + (new_high - high)
            if taken == 0:
                longest[i] = level
            want = min(most - taken, level)
            for j in range(want):
                nth = j * level // want
                at = new_low + nth if nth < below else high + nth - below
                ids[i, taken] = suffixes[at]
                lengths[i, taken] = length
                taken += 1
            low, high = new_low, new_high
            length = 0
            if low > 0:
                length = _shared(tokens, np.int64(suffixes[low - 1]), context, end, 0, limit)
            if high < size:
                length = max(
                    length, _shared(tokens, np.int64(suffixes[high]), context, end, 0, limit)
                )
# fmt: on
