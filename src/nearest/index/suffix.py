"""Suffix arrays over a corpus.

Entries are sorted by their *reversed* left context, so that entries whose contexts end with the
same tokens are adjacent, and each shorter match is an interval around the longer ones (infini-gram,
arXiv:2401.17377, does the same for the right side).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Int, UInt8

from nearest.corpus.tokens import Tokens
from nearest.index.ids import position_dtype, random_order
from nearest.machine import code_can_be_cached

MAX_MATCH = 512  # tokens; longer matches say no more, and bound the cost of repetitive text
EARLY_BITS = 3  # each list of early entries has one of 2^3 entries of the one before
_SHORT = 64  # entries; shorter lists of early entries are not made
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SuffixArray:
    """The sorted entries of a shard of a corpus. Dead entries stay in the array and are skipped.

    Attributes:
        tokens: uint16 or uint32 token ids.
        suffixes: from `sort_suffixes`.
        first: id of the entry at position 0.
        alive: which positions are not of removed documents; None for all.
    """

    tokens: Tokens
    suffixes: Int[np.ndarray, " m"]
    first: int = 0
    alive: Bool[np.ndarray, " n"] | None = None

    @cached_property
    def skipping(self) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " dead"]]:
        """`suffixes`, and for each dead entry in it, the number of alive ones before it.

        Kernels read the array through `count` and `position_at`, as if dead entries were not there.
        """
        places = [np.zeros(0, np.int64)]
        if self.alive is not None:
            for start in range(0, len(self.suffixes), _BLOCK):
                dead = ~self.alive[self.suffixes[start : start + _BLOCK]]
                places.append(start + np.flatnonzero(dead))
        dead = np.concatenate(places)
        return self.suffixes, (dead - np.arange(len(dead))).astype(position_dtype(len(self.tokens)))

    @property
    def size(self) -> int:
        """Number of alive entries."""
        return len(self.suffixes) - len(self.skipping[1])

    def positions(self, places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The positions of alive entries, given their places among them."""
        suffixes, skips = self.skipping
        if len(skips):
            places = places + np.searchsorted(skips, places, side="right")
        positions: Int[np.ndarray, " n"] = suffixes[places]
        return positions

    @cached_property
    def early(self) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, " lists_plus_1"]]:
        """Places of the alive entries that come in the first 1/8, 1/64 … of the random order.

        All lists one after another, and their bounds. They let `sample` find a few of very many
        entries without a look at each.
        """
        bits, lists = 64 - EARLY_BITS, []
        blocks = range(0, self.size, _BLOCK)
        every = (np.arange(at, min(at + _BLOCK, self.size)) for at in blocks)
        places = np.concatenate([np.zeros(0, np.int64), *(self._early(p, bits) for p in every)])
        places = places.astype(position_dtype(len(self.tokens)))
        while len(places) >= _SHORT:
            lists.append(places)
            bits -= EARLY_BITS
            places = self._early(places, bits)
        return np.concatenate([*lists, places[:0]]), np.cumsum([0, *map(len, lists)])

    def _early(self, places: Int[np.ndarray, " n"], bits: int) -> Int[np.ndarray, "_"]:
        """Those whose rank in the random order is below 2^bits."""
        order = random_order(self.positions(places).astype(np.int64) + self.first)
        early: Int[np.ndarray, "_"] = places[order >> np.uint64(bits) == 0]
        return early


def sort_suffixes(tokens: Tokens, valued: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Sort entries by their reversed left contexts, each read back to its start token.

    Bytes are sorted, two a token (three beyond 65,536 token ids), and their order, by far the
    largest array, is filtered in place. Needs at most 11 bytes a token beside `tokens` (16 with
    three bytes; the order takes twice as much from 2^31 bytes on).

    Args:
        tokens: uint16 or uint32 token ids of whole documents, the start token first in each.
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
    """The tokens in reverse order, `width` big-endian bytes each."""
    found = np.empty((len(tokens), width), np.uint8)
    for stop in range(len(tokens), 0, -_BLOCK):
        part = tokens[max(0, stop - _BLOCK) : stop][::-1].astype(">u4")
        first = len(tokens) - stop
        found[first : first + len(part)] = part.view(np.uint8).reshape(-1, 4)[:, 4 - width :]
    return found.reshape(-1)


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached())
def count(array: Any) -> Any:
    """The number of alive entries of `SuffixArray.skipping`."""
    return len(array[0]) - len(array[1])


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def position_at(array: Any, place: Any) -> Any:
    """The position of an alive entry of `SuffixArray.skipping`, given its place among them."""
    suffixes, skips = array
    if len(skips) > 0:
        place += np.searchsorted(skips, place, side="right")
    return np.int64(suffixes[place])


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
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
@numba.njit(nogil=True, cache=code_can_be_cached())
def insertion(
    tokens: Any, array: Any, context: Any, end: Any, limit: Any
) -> tuple[Any, Any]:
    """The place at which the context would be inserted, and the longest match beside it.

    Entries that match `limit` tokens begin there.
    """
    low, high = -1, count(array)  # low sorts before the context, high does not
    shared_low, shared_high = 0, 0
    while high - low > 1:
        middle = (low + high) // 2
        position = position_at(array, middle)
        shared = shared_length(tokens, position, context, end, min(shared_low, shared_high), limit)
        if shared == limit or (
            shared <= position
            and np.int64(tokens[position - shared]) > context[end - shared]
        ):
            high, shared_high = middle, shared
        else:
            low, shared_low = middle, shared
    return high, max(shared_low, shared_high)
# fmt: on
