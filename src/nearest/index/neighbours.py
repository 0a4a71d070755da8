"""What a search gives back, and the one convention for distances."""

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
from nearest.index.threads import in_threads

Metric = Literal["l2", "ip"]
NO_ENTRY = -1


def checked_metric(name: str) -> Metric:
    """A metric by its name (SettingError when there is none of it)."""
    if name not in get_args(Metric):
        raise SettingError(f"metric {name!r} is unknown: choose l2 or ip")
    return cast(Metric, name)


class Neighbours(NamedTuple):
    """Entries found for each query, nearest first.

    Distances are squared L2, or the inner product negated, so that smaller is always nearer. Where
    fewer entries were found than asked for, the id is -1 and the distance +inf.
    """

    ids: Int[np.ndarray, "q k"]  # int64
    distances: Float[np.ndarray, "q k"]  # float32

    @classmethod
    def none(cls, queries: int) -> "Neighbours":
        """What is found where there is nothing to be found."""
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


@runtime_checkable
class MeasuringIndex(VectorIndex, Protocol):
    """An index that also measures chosen entries."""

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distance, by the index's own measure, of query i to entry ids[i, j]; +inf for id -1."""


def sort_nearest_first(found: Neighbours, k: int) -> Neighbours:
    """The k nearest of each row, in ascending distance; of a tie for the last place, the first ids.

    So it does not depend on the batch which of equal entries are taken.
    """
    k = min(k, found.ids.shape[1])
    ids = np.empty((len(found.ids), k), np.int64)
    distances = np.empty((len(found.ids), k), found.distances.dtype)

    def sort(rows: slice) -> None:
        some, far = found.ids[rows], found.distances[rows]
        order = np.argsort(far, axis=1)
        tied = np.zeros(len(order), dtype=bool)
        _take(some, far, order, ids[rows], distances[rows], tied)
        for row in np.flatnonzero(tied):
            nearest = np.lexsort((some[row], far[row]))[:k]
            ids[rows][row], distances[rows][row] = some[row, nearest], far[row, nearest]

    in_threads(sort, len(ids))
    return Neighbours(ids, distances)


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, cache=True)
def _take(
    ids: Any, distances: Any, order: Any, nearest: Any, nearest_distances: Any, tied: Any
) -> None:
    """Fill in the first columns in order; note the rows whose last is as far as the one after."""
    k = nearest.shape[1]
    for i in range(len(order)):
        for j in range(k):
            nearest[i, j] = ids[i, order[i, j]]
            nearest_distances[i, j] = distances[i, order[i, j]]
        if 0 < k < order.shape[1]:
            tied[i] = distances[i, order[i, k - 1]] == distances[i, order[i, k]]
# fmt: on


def position_dtype(tokens: int) -> np.dtype[Any]:
    """The smaller of int32 and int64 that numbers so many positions."""
    return np.dtype(np.int32 if tokens <= np.iinfo(np.int32).max else np.int64)
