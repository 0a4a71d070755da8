"""RetoMaton's automaton: entries that were right point to the entries that follow them.

A state is the entries that agreed with the last token; its pointers are their successors in the
corpus (Alon et al., 2022, arXiv:2201.12431). Everything is a pure function of arrays: rows are
sequences, entries of a row come nearest first, and short rows are padded with -1.
"""

from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.index.clusters import Clusters
from nearest.index.neighbours import NO_ENTRY
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached


def extend(
    pointers: Int[np.ndarray, "q p"], clusters: Clusters | None, most: int
) -> Int[np.ndarray, "q e"]:
    """Pointers, then the members of their clusters, up to `most` entries a row.

    Clusters with the most pointers come first (ties by cluster number), members in corpus order. As
    published, an entry that is both a pointer and a member is listed twice.
    """
    counts = (pointers >= 0).sum(1)
    width = int(counts.max(initial=0)) + (0 if clusters is None else len(clusters.members))
    extended = np.full((len(pointers), min(most, width)), NO_ENTRY, dtype=np.int64)
    if clusters is None:
        _compact(pointers, extended)
    else:
        args = clusters.labels, clusters.offsets, clusters.members

        def work(part: slice) -> None:
            _extend(pointers[part], *args, extended[part])

        in_threads(work, len(pointers))
    return extended


def without_repeated(
    ids: Int[np.ndarray, "q e"], others: Int[np.ndarray, "q k"]
) -> Int[np.ndarray, "q e"]:
    """Replace by -1 each id that occurs in the same row of `others`, or earlier in its own."""
    kept = ids.copy()
    for row, other in zip(kept, others, strict=True):
        repeated = np.isin(row, other)
        first = np.zeros(len(row), dtype=bool)
        first[np.unique(row, return_index=True)[1]] = True
        row[repeated | ~first] = NO_ENTRY
    return kept


def agreeing(
    ids: Int[np.ndarray, "q c"],
    distances: Float[np.ndarray, "q c"],
    values: Int[np.ndarray, "q c"],
    tokens: Int[np.ndarray, " q"],
) -> Int[np.ndarray, "q a"]:
    """Ids of candidates whose value is the token that came, nearest first; stable for ties."""
    right: Bool[np.ndarray, "q c"] = (values == tokens[:, None]) & (ids >= 0)
    kept = np.full((len(ids), int(right.sum(1).max(initial=0))), NO_ENTRY, dtype=np.int64)

    def work(part: slice) -> None:
        _nearest_first(right[part], ids[part], distances[part], kept[part])

    in_threads(work, len(ids))
    return kept


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached())
def _nearest_first(right: Any, ids: Any, distances: Any, kept: Any) -> None:
    for i in range(len(ids)):
        at = np.flatnonzero(right[i])
        order = np.argsort(distances[i][at], kind="mergesort")
        for j in range(len(order)):
            kept[i, j] = ids[i, at[order[j]]]


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _compact(pointers: Any, extended: Any) -> Any:
    """Copy the ids of each row to its front, as many as there is room for."""
    for i in range(len(pointers)):
        taken = 0
        for j in range(pointers.shape[1]):
            if taken < extended.shape[1] and pointers[i, j] >= 0:
                extended[i, taken] = pointers[i, j]
                taken += 1


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _extend(pointers: Any, of: Any, offsets: Any, members: Any, extended: Any) -> None:
    _compact(pointers, extended)
    most = extended.shape[1]
    size = 1
    while size < 2 * most:
        size *= 2
    slots = np.empty(size, dtype=np.int64)  # a hash table: number of the cluster, and its pointers
    counts = np.empty(size, dtype=np.int64)
    for i in range(len(pointers)):
        taken, clusters = 0, 0
        while taken < most and extended[i, taken] >= 0:
            taken += 1
        if taken == most:
            continue
        slots[:] = -1
        for j in range(taken):
            cluster = np.int64(of[extended[i, j]])
            if cluster < 0:
                continue
            slot = (cluster * 2654435761) & (size - 1)
            while slots[slot] != cluster and slots[slot] >= 0:
                slot = (slot + 1) & (size - 1)
            if slots[slot] < 0:
                slots[slot], counts[slot] = cluster, 0
                clusters += 1
            counts[slot] += 1
        ranked = np.empty(clusters, dtype=np.int64)
        clusters = 0
        for slot in range(size):
            if slots[slot] >= 0:  # most pointers first, then the lower number
                ranked[clusters] = ((most - counts[slot]) << 40) | slots[slot]
                clusters += 1
        ranked.sort()
        for j in range(clusters):
            cluster = ranked[j] & ((1 << 40) - 1)
            for k in range(offsets[cluster], offsets[cluster + 1]):
                if taken == most:
                    break
                extended[i, taken] = members[k]
                taken += 1
# fmt: on
