"""Samples of entries that do not depend on how a corpus is divided into shards.

A sample is the entries that come first in the random order of `ids`.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Int

from nearest.index.ids import random_order
from nearest.index.suffix import EARLY_BITS, SuffixArray, position_at
from nearest.machine import code_can_be_cached

_LAST = np.uint64(2**64 - 1)


def sample(
    arrays: Sequence[SuffixArray],
    begins: Int[np.ndarray, "arrays runs q"],
    ends: Int[np.ndarray, "arrays runs q"],
    wanted: Int[np.ndarray, " q"],
    columns: Int[np.ndarray, " q"],
    ids: Int[np.ndarray, "q most"],
) -> None:
    """Write a sample for each query to ids[i, columns[i] :][: wanted[i]], in the arrays' order.

    Args:
        arrays: the shards of a corpus, in order.
        begins, ends: places of the entries to sample from, in runs of each array.
        wanted: size of each sample, no larger than its runs together.
        columns: where each sample begins in `ids`.
        ids: int64, changed in place.
    """
    limits = np.empty(len(wanted), np.uint64)
    _first_limits(begins, ends, wanted, limits)
    while wanted.any():
        found = np.zeros_like(wanted)
        for array, *runs in zip(arrays, begins, ends, strict=True):
            own = array.skipping, array.first, *array.early
            _sample(*own, *runs, wanted, columns, limits, found, ids)
        wanted = np.where(found < wanted, wanted, 0)
        limits[:] = _LAST


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached())
def _first_limits(begins: Any, ends: Any, wanted: Any, limits: Any) -> None:
    """Limits by which one sample in ten thousand gets too few entries and is redrawn."""
    for i in range(len(wanted)):
        size = 0
        for array in range(len(begins)):
            for run in range(begins.shape[1]):
                size += ends[array, run, i] - begins[array, run, i]
        part = (wanted[i] + 4 * np.sqrt(wanted[i]) + 8) / max(1, size)
        limits[i] = np.uint64(min(part, 1 - 2.0**-53) * 2.0**64)


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _sample(
    array: Any, first: Any, places: Any, bounds: Any, begins: Any, ends: Any,
    wanted: Any, columns: Any, limits: Any, found: Any, ids: Any,
) -> None:
    """Add the entries of one array to the samples, which hold found[i] of the arrays before it.

    Entries after limits[i] in the random order are left out. Once a sample is full, its last entry
    is the limit.
    """
    kept = np.empty(2 * ids.shape[1], np.int64)
    for i in range(len(ids)):
        want, count, column = wanted[i], found[i], columns[i]
        if want == 0:
            continue
        kept[:count] = ids[i, column : column + count]
        level = 0  # the shortest list that holds all below the limit; 0 is the array itself
        bits = 64 - EARLY_BITS
        while level < len(bounds) - 1 and limits[i] >> np.uint64(bits) == 0:
            level += 1
            bits -= EARLY_BITS
        for run in range(len(begins)):
            begin, end = begins[run, i], ends[run, i]
            if level > 0:
                low = bounds[level - 1]
                listed = places[low : bounds[level]]
                begin = low + np.searchsorted(listed, begin)
                end = low + np.searchsorted(listed, end)
            for at in range(begin, end):
                entry = position_at(array, at if level == 0 else places[at]) + first
                if random_order(entry) <= limits[i]:
                    kept[count] = entry
                    count += 1
                    if count == len(kept):
                        limits[i] = _keep_first(kept, count, want)
                        count = want
        if count > want:
            limits[i] = _keep_first(kept, count, want)
            count = want
        ids[i, column : column + count] = kept[:count]
        found[i] = count


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _keep_first(entries: Any, count: Any, want: Any) -> Any:
    """Move the first `want` entries of the random order to the front; return its last rank."""
    last = np.partition(random_order(entries[:count]), want - 1)[want - 1]
    kept = 0
    for entry in entries[:count]:
        if random_order(entry) <= last:
            entries[kept] = entry
            kept += 1
    return last
# fmt: on
