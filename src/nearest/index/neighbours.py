"""The result of a search, and the one convention for distances."""

from typing import (
    Any,
    Literal,
    NamedTuple,
    Protocol,
    cast,
    get_args,
    no_type_check,
    runtime_checkable,
)

import numba
import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.ids import random_order
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached

Metric = Literal["l2", "ip"]
NO_ENTRY = -1
_LARGEST_PACKED = 2**32 - 2
_LAST = np.uint64(2**64 - 1)
_SIGN = np.uint32(1 << 31)
_MINUS_INFINITY = np.uint32(0xFF800000)


def checked_metric(name: str) -> Metric:
    """The metric of this name (SettingError if there is none)."""
    if name not in get_args(Metric):
        raise SettingError(f"metric {name!r} is unknown: choose l2 or ip")
    return cast(Metric, name)


class Neighbours(NamedTuple):
    """Entries found for each query, nearest first.

    Distances are squared L2 or negated inner products, so smaller is always nearer. Missing
    entries have id -1 and distance +inf.
    """

    ids: Int[np.ndarray, "q k"]  # int64
    distances: Float[np.ndarray, "q k"]  # float32

    @classmethod
    def none(cls, queries: int) -> "Neighbours":
        """No columns."""
        return cls(np.empty((queries, 0), np.int64), np.empty((queries, 0), np.float32))

    def padded(self, k: int) -> "Neighbours":
        """Rows filled up to k with id -1 at distance +inf."""
        missing = ((0, 0), (0, k - self.ids.shape[1]))
        return Neighbours(
            np.pad(self.ids, missing, constant_values=NO_ENTRY),
            np.pad(self.distances, missing, constant_values=np.inf),
        )


@runtime_checkable
class VectorIndex(Protocol):
    """Anything that finds the nearest entries of queries."""

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries of each query, nearest first by this index's own distances."""


def sort_nearest_first(found: Neighbours, k: int) -> Neighbours:
    """The k nearest of each row by ascending distance; equal distances in the random order of ids.

    A row's result thus depends neither on its batch nor on the order in which entries were found.
    Distances may be float64.
    """
    k = min(k, found.ids.shape[1])
    wide = found.distances.dtype != np.float32
    if wide or found.ids.max(initial=NO_ENTRY) > _LARGEST_PACKED:
        order = np.lexsort((random_order(found.ids), found.distances), axis=1)[:, :k]
        return Neighbours(*(np.take_along_axis(array, order, axis=1) for array in found))
    nearest = Neighbours(
        np.empty((len(found.ids), k), np.int64), np.empty((len(found.ids), k), np.float32)
    )
    packed = np.empty(found.ids.shape, np.uint64)
    bits = np.ascontiguousarray(found.distances).view(np.uint32)

    def sort(rows: slice) -> None:
        _pack(found.ids[rows], bits[rows], packed[rows])
        packed[rows].sort(axis=1)
        _order_ties(packed[rows], k)
        _unpack(packed[rows], nearest.ids[rows], nearest.distances.view(np.uint32)[rows])

    in_threads(sort, len(bits))
    return nearest


def take_nearest(found: Neighbours, k: int) -> Neighbours:
    """The same k neighbours as `sort_nearest_first` gives, unsorted; float32 distances only.

    Quicker, and enough for a sum over neighbours.
    """
    if not 0 < k < found.ids.shape[1]:
        return Neighbours(found.ids[:, :k], found.distances[:, :k])
    shape = len(found.ids), k
    nearest = Neighbours(np.empty(shape, np.int64), np.empty(shape, np.float32))
    bits = np.ascontiguousarray(found.distances).view(np.uint32)
    into = nearest.distances.view(np.uint32)

    def take(rows: slice) -> None:
        _take_nearest(found.ids[rows], bits[rows], nearest.ids[rows], into[rows])

    in_threads(take, len(bits))
    return nearest


def without_last_tie(
    found: Neighbours, codes: Float[np.ndarray, "q found"], asked: int
) -> tuple[Neighbours, Int[np.ndarray, " q"]]:
    """Leave out the farthest entries by the codes: of as many as these tie with, none may be there.

    Returns what is left, and how many of each row; -1 for rows with less than `asked` entries,
    which are all there are, and stay.
    """
    ids, distances = np.empty_like(found.ids), np.empty_like(found.distances)
    left = np.empty(len(ids), np.int64)

    def leave_out(some: slice) -> None:
        _without_last_tie(
            *(a[some] for a in (*found, codes)), asked, ids[some], distances[some], left[some]
        )

    in_threads(leave_out, len(ids))
    return Neighbours(ids, distances), left


# Distance and id are sorted as one 64-bit number, far quicker than an argsort: the high half is the
# distance's bits, made monotonic, the low half the id plus 1. Runs of equal distances, which are
# rare, are then put in the random order.
# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, inline="always")
def _rising(bits: Any) -> Any:
    """Bits that rise with the distance: -0 is 0, and NaN comes last, whatever its sign."""
    return ~bits if _SIGN < bits <= _MINUS_INFINITY else bits | _SIGN


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _pack(ids: Any, distances: Any, packed: Any) -> None:
    for i in range(len(ids)):
        for j in range(ids.shape[1]):
            bits = np.uint64(_rising(distances[i, j]))
            packed[i, j] = bits << np.uint64(32) | np.uint64(ids[i, j] + 1)


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _order_ties(packed: Any, k: Any) -> None:
    """Put equal distances among the first k, and those equal to the k-th, in the random order."""
    size = packed.shape[1]
    for i in range(len(packed)):
        row, start = packed[i], 0
        while start < k:
            distance, stop = row[start] >> np.uint64(32), start + 1
            while stop < size and row[stop] >> np.uint64(32) == distance:
                stop += 1
            # The ids of a run ascend: if its last is -1, all are.
            if stop - start > 1 and row[stop - 1] & np.uint64(0xFFFFFFFF) > 0:
                run = row[start:stop].copy()
                ids = (run & np.uint64(0xFFFFFFFF)).astype(np.int64) - 1
                row[start:stop] = run[np.argsort(random_order(ids))]
            start = stop


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _unpack(packed: Any, ids: Any, distances: Any) -> None:
    for i in range(len(ids)):
        for j in range(ids.shape[1]):
            bits = np.uint32(packed[i, j] >> np.uint64(32))
            distances[i, j] = bits & ~_SIGN if bits & _SIGN else ~bits
            ids[i, j] = np.int64(packed[i, j] & np.uint64(0xFFFFFFFF)) - 1


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _without_last_tie(
    ids: Any, distances: Any, codes: Any, asked: Any, to_ids: Any, to_distances: Any, left: Any
) -> None:
    for i in range(len(ids)):
        held, last = 0, -np.inf
        for j in range(ids.shape[1]):
            if ids[i, j] >= 0:
                held += 1
                last = max(last, codes[i, j])
        left[i] = 0 if held >= asked else -1
        for j in range(ids.shape[1]):
            stays = ids[i, j] >= 0 and (held < asked or codes[i, j] < last)
            to_ids[i, j] = ids[i, j] if stays else NO_ENTRY
            to_distances[i, j] = distances[i, j] if stays else np.inf
            if held >= asked:
                left[i] += stays


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _take_nearest(ids: Any, distances: Any, nearest_ids: Any, nearest_distances: Any) -> None:
    size, k = ids.shape[1], nearest_ids.shape[1]
    rising = np.empty(size, dtype=np.uint32)
    for i in range(len(ids)):
        for j in range(size):
            rising[j] = _rising(distances[i, j])
        farthest = _kth(rising, k)
        left, last, of_last = k - np.sum(rising < farthest), _LAST, 0
        tied = left < np.sum(rising == farthest)
        if tied:  # of those equally far, take the first in the random order
            places = np.sort(random_order(ids[i][rising == farthest]))
            last = places[left - 1]
            of_last = left - np.searchsorted(places, last)  # an id may stand twice
        taken = 0
        for j in range(size):
            nearest_ids[i, taken], nearest_distances[i, taken] = ids[i, j], distances[i, j]
            take = rising[j] < farthest
            if rising[j] == farthest:
                take = True
                if tied:
                    place = random_order(ids[i, j])
                    take = place < last
                    if place == last and of_last > 0:
                        take = True
                        of_last -= 1
            taken += take
            if taken == k:
                break


@no_type_check
@numba.njit(nogil=True)
def _kth(numbers: Any, k: Any) -> Any:
    """The k-th smallest, by bisection on the values: counting is quicker than moving."""
    low, high = numbers.min(), numbers.max()
    while low < high:
        middle = np.uint32(low + (high - low) // 2)
        reached = np.uint32(0)
        for j in range(len(numbers)):
            reached += np.uint32(numbers[j] <= middle)
        if reached >= k:
            high = middle
        else:
            low = np.uint32(middle + 1)
    return low
# fmt: on
