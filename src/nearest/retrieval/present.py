"""The present text as candidates: its own earlier places that match its end (a cache).

A continuous cache (arXiv:1612.04426) predicts with the text so far. Here its places are found by
the suffix that they share with the context, as entries of a memory are, so that nothing is kept
from one prediction to the next and no hidden state is needed.
"""

from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.neighbours import NO_ENTRY
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached

REACH = 32_768  # tokens back, so that a long text costs no more a token than this
_PLACES = 128
_LONGEST = 64  # tokens of a match: longer ones say no more


class Places(NamedTuple):
    """Earlier places of each query's text, longest match first, of these the latest first.

    Missing ones have value -1 and length 0.
    """

    values: Int[np.ndarray, "q places"]  # int64, the token that follows each
    lengths: Int[np.ndarray, "q places"]  # int16, tokens of left context shared

    def rows(self, rows: slice) -> "Places":
        """Those of some queries."""
        return Places(self.values[rows], self.lengths[rows])


def matching_places(context: Tokens, ends: Int[np.ndarray, " q"], start_token: int) -> Places:
    """The places before each query's end where at least its last token stands.

    A text begins after its last start token, or after a negative number in the context.

    Args:
        context: int64 token ids, of one text after another.
        ends: query i is context[: ends[i] + 1].
        start_token: the first token of each document, which matches nothing.
    """
    shape = len(ends), _PLACES
    found = Places(np.full(shape, NO_ENTRY, np.int64), np.zeros(shape, np.int16))

    def work(some: slice) -> None:
        _match(context, ends[some], start_token, found.values[some], found.lengths[some])

    in_threads(work, len(ends))
    return found


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, cache=code_can_be_cached())
def _match(context: Any, ends: Any, start_token: Any, values: Any, lengths: Any) -> None:
    most = values.shape[1]
    held = np.zeros(_LONGEST + 1, np.int64)  # places by the length of their match
    for i in range(len(ends)):
        end = ends[i]
        token = context[end]
        if token == start_token or token < 0:
            continue
        held[:] = 0
        first = end
        while (
            first > 0 and end - first < REACH
            and context[first - 1] != start_token and context[first - 1] >= 0
        ):
            first -= 1
        for place in range(first, end):
            if context[place] == token:
                held[_shared(context, first, place, end)] += 1
        # The longest that all fit, and of the next the latest.
        left, least = most, _LONGEST
        while least > 1 and held[least] <= left:
            left -= held[least]
            least -= 1
        begins = np.zeros(_LONGEST + 1, np.int64)
        at = 0
        for length in range(_LONGEST, least - 1, -1):
            begins[length] = at
            at += held[length]
        for place in range(end - 1, first - 1, -1):
            if context[place] == token:
                length = _shared(context, first, place, end)
                if length >= least and begins[length] < most:
                    values[i, begins[length]] = context[place + 1]
                    lengths[i, begins[length]] = length
                    begins[length] += 1


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _shared(context: Any, first: Any, place: Any, end: Any) -> Any:
    """Tokens that the text shares up to two places, at most _LONGEST."""
    length = 0
    while (
        length < _LONGEST and place - length >= first
        and context[place - length] == context[end - length]
    ):
        length += 1
    return length
# fmt: on
