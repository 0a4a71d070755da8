"""Samples of entries that are the same however a corpus is divided into parts.

A sample is what comes first in the random order of `ids`.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Int

from nearest.index.ids import random_order
from nearest.index.suffix import EARLY_BITS, SuffixArray, position_at

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
        arrays: of a corpus's parts, one after another.
        begins, ends: what is sampled, all runs (suffixes[begin:end]) of all arrays together.
        wanted: entries of each sample, no more than there are.
        columns: where each begins.
        ids: int64, changed in place.
    """
    # So many are let through at first that one sample in ten thousand has too few, and is redrawn.
    part = (wanted + 4 * np.sqrt(wanted) + 8) / np.maximum(1, (ends - begins).sum((0, 1)))
    limits = (np.minimum(part, 1 - 2.0**-53) * 2.0**64).astype(np.uint64)
    while wanted.any():
        found = np.zeros_like(wanted)
        for array, *runs in zip(arrays, begins, ends, strict=True):
            own = array.skipping, array.first, *array.early
            _sample(*own, *runs, wanted, columns, limits, found, ids)
        wanted = np.where(found < wanted, wanted, 0)
        limits = np.full_like(limits, _LAST)


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=True)
def _sample(
    array: Any, first: Any, places: Any, bounds: Any, begins: Any, ends: Any,
    wanted: Any, columns: Any, limits: Any, found: Any, ids: Any,
) -> None:
    """Let the entries of one array into the samples, of which found[i] are of arrays before it.

    What comes after limits[i] in the random order is left out; once there are as many as are
    wanted, that is what comes after the last of them.
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
@numba.njit(nogil=True, cache=True)
def _keep_first(entries: Any, count: Any, want: Any) -> Any:
    """Move those `want` that come first in the random order to the front; the place of the last."""
    last = np.partition(random_order(entries[:count]), want - 1)[want - 1]
    kept = 0
    for entry in entries[:count]:
        if random_order(entry) <= last:
            entries[kept] = entry
            kept += 1
    return last
# fmt: on
