"""What a corpus holds of a text: its n-grams, spans of it, and whole documents.

Read off the suffix array, in which all entries whose left context ends with the same tokens stand
side by side, and the token after a span is the value of one of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Int

from nearest.corpus.tokens import Tokens
from nearest.index.matches import TokenRun, values_of
from nearest.index.neighbours import NO_ENTRY
from nearest.index.sample import sample
from nearest.index.suffix import SuffixArray, count, insertion, position_at, shared_length
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached

SAMPLED = 256  # successors that are read, at most, of an n-gram


class Ngrams(NamedTuple):
    """Counts of the last 1, 2, … tokens of each query's context (int64).

    `fertility` is the number of distinct successors among all entries of an n-gram, or among a
    sample of SAMPLED. Both are 0 for an n-gram that reaches beyond the context's start token.
    """

    counts: Int[np.ndarray, "q n"]
    fertility: Int[np.ndarray, "q n"]


class NgramSamples(NamedTuple):
    """Counts as in `Ngrams`, and a sample of the entries of each n-gram with their values.

    The sample has all of up to SAMPLED entries, else those that come first in the random order of
    ids. Missing ones have id and value -1.
    """

    counts: Int[np.ndarray, "q n"]
    ids: Int[np.ndarray, "q n sampled"]
    values: Int[np.ndarray, "q n sampled"]


def ngrams(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    longest: int,
) -> Ngrams:
    """Count the n-grams that end each context, n = 1 … longest, and their distinct successors.

    Args:
        arrays, start_token, context, ends: as in `matches.longest_matches`.
        longest: the largest n.
    """
    counts, fertility = (np.zeros((len(ends), longest), dtype=np.int64) for _ in range(2))

    def keep(some: slice, n: int, _: np.ndarray, values: Int[np.ndarray, "q _"]) -> None:
        fertility[some, n] = distinct(values)

    _each_sample(arrays, start_token, context, ends, counts, keep)
    return Ngrams(counts, fertility)


def ngram_samples(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    longest: int,
) -> NgramSamples:
    """What `ngrams` counts, and the entries among which it counts successors."""
    counts = np.zeros((len(ends), longest), np.int64)
    every = [np.full((*counts.shape, SAMPLED), NO_ENTRY, np.int64) for _ in range(2)]

    def keep(some: slice, n: int, *found: Int[np.ndarray, "q _"]) -> None:
        for array, own in zip(every, found, strict=True):
            array[some, n] = own

    _each_sample(arrays, start_token, context, ends, counts, keep)
    ids, values = every
    return NgramSamples(counts, ids, values)


def distinct(tokens: Int[np.ndarray, "*shape sampled"]) -> Int[np.ndarray, "*shape"]:
    """The number of distinct tokens in the last axis; -1 is none."""
    after = np.sort(tokens, axis=-1)
    counts: Int[np.ndarray, "*shape"] = (after[..., :1] >= 0).sum(-1)
    more: Int[np.ndarray, "*shape"] = counts + (np.diff(after, axis=-1) > 0).sum(-1)
    return more


def _each_sample(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    counts: Int[np.ndarray, "q longest"],
    keep: Callable[..., None],
) -> None:
    """Write the counts, and call `keep` with rows, n − 1, and the sampled ids and their values."""
    longest = counts.shape[1]
    runs = [TokenRun(array.tokens, array.first) for array in arrays]

    def work(some: slice) -> None:
        queries = len(ends[some])
        lows, highs = (np.zeros((len(arrays), longest, queries), np.int64) for _ in range(2))
        for array, *found in zip(arrays, lows, highs, strict=True):
            _look_up(array.tokens, array.skipping, start_token, context, ends[some], *found)
        counts[some] = (highs - lows).sum(0).T
        for n, wanted in enumerate(np.minimum(counts[some], SAMPLED).T):
            ids = np.full((queries, SAMPLED), NO_ENTRY, dtype=np.int64)
            own = slice(n, n + 1)
            sample(arrays, lows[:, own], highs[:, own], wanted, np.zeros_like(wanted), ids)
            keep(some, n, ids, values_of(runs, ids))

    in_threads(work, len(ends))


def spans_stand(
    array: SuffixArray,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    length: int,
) -> Bool[np.ndarray, " q"]:
    """Whether context[end − length + 1 : end + 1] occurs in a document, for each end.

    Args:
        context: int64 token ids.
        ends: at least length − 1; no span may hold a start token.
        length: at least 2.
    """
    found = np.zeros(len(ends), dtype=bool)

    def work(part: slice) -> None:
        _find_spans(array.tokens, array.skipping, context, ends[part], length, found[part])

    in_threads(work, len(ends))
    return found


def equal_documents(
    array: SuffixArray,
    offsets: Int[np.ndarray, " stored_plus_1"],
    documents: Sequence[Tokens],
) -> Int[np.ndarray, " documents"]:
    """Where the first document with exactly the same tokens begins; -1 if there is none.

    Args:
        offsets: where each document of `array.tokens` begins, and where the last ends.
        documents: int64 token ids, the start token first.
    """
    found = np.full(len(documents), NO_ENTRY, dtype=np.int64)
    for i, document in enumerate(documents):
        if len(document) > 1:
            found[i] = _find_document(array.tokens, array.skipping, offsets, document)
    return found


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached())
def _bound(tokens: Any, array: Any, low: Any, high: Any, depth: Any, token: Any) -> Any:
    """First index in [low, high) whose token `depth` places back is `token` or greater.

    All between low and high have the tokens after it in common.
    """
    while low < high:
        middle = (low + high) // 2
        position = position_at(array, middle)
        if position >= depth and np.int64(tokens[position - depth]) >= token:
            high = middle
        else:
            low = middle + 1
    return low


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _look_up(
    tokens: Any, array: Any, start_token: Any, context: Any, ends: Any, lows: Any, highs: Any
) -> None:
    """Where the entries of each query's n-grams stand: the places [lows[n - 1] : highs[n - 1]]."""
    for i in range(len(ends)):
        low, high = 0, count(array)
        for depth in range(len(lows)):
            at = ends[i] - depth
            if at < 0 or (depth > 0 and context[at + 1] == start_token):
                break
            low = _bound(tokens, array, low, high, depth, context[at])
            high = _bound(tokens, array, low, high, depth, context[at] + 1)
            if low == high:
                break
            lows[depth, i], highs[depth, i] = low, high


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _find_spans(
    tokens: Any, array: Any, context: Any, ends: Any, length: Any, found: Any
) -> None:
    for i in range(len(ends)):
        end, limit = ends[i] - 1, length - 1
        at, longest = insertion(tokens, array, context, end, limit)
        if longest < limit:
            continue
        while at < count(array):
            position = position_at(array, at)
            if shared_length(tokens, position, context, end, 0, limit) < limit:
                break
            if tokens[position + 1] == context[end + 1]:
                found[i] = True
                break
            at += 1


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _find_document(tokens: Any, array: Any, offsets: Any, document: Any) -> Any:
    limit = len(document) - 1
    at, longest = insertion(tokens, array, document, limit - 1, limit)
    first = np.int64(-1)
    if longest < limit:
        return first
    while at < count(array):
        position = position_at(array, at)
        if shared_length(tokens, position, document, limit - 1, 0, limit) < limit:
            break
        begin = position - limit + 1
        number = np.searchsorted(offsets, begin)
        whole = offsets[number] == begin and offsets[number + 1] == position + 2
        if whole and tokens[position + 1] == document[limit] and (first < 0 or begin < first):
            first = begin
        at += 1
    return first
# fmt: on
