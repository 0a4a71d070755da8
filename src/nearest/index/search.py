"""The one way to search: over one or more backends, among alive entries.

A backend finds the k nearest entries by its own codes. The searcher fetches more than k, drops
dead entries, re-ranks the rest by the stored keys, and keeps the k nearest. Ties are broken by the
random order of ids, so that a prediction depends on its prefix alone: not on its batch, and not on
where a document stands in the corpus.

For scans that rule is exact. For inverted lists and graphs it holds among the entries they find:
the searcher fetches more, up to MOST_TIED, while tied entries may be missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.errors import SettingError
from nearest.index.keys import Keys
from nearest.index.neighbours import (
    NO_ENTRY,
    MeasuringIndex,
    Neighbours,
    sort_nearest_first,
    take_nearest,
)

MOST_TIED = 1 << 16  # entries fetched for a query whose last place is tied
_SPARE = 16  # entries fetched beyond those wanted, if some are dead
_MORE = 4  # times as many are fetched if there were too few

By = Literal["keys", "index"]


@runtime_checkable
class Backend(MeasuringIndex, Protocol):
    """What a searcher searches: a scan, a FAISS index, or either on a GPU.

    Attributes:
        entries: number of entries, dead ones included.
        most: largest k.
        exact: whether distances are those of the stored keys, and no entry is dead.
    """

    entries: int
    most: int
    exact: bool


@dataclass(frozen=True)
class Searched:
    """A backend and how it is searched.

    Attributes:
        backend: the backend.
        entries: number of its alive entries.
        margin: entries fetched beyond k for re-ranking, since codes are rough.
        owned: ranges [first, stop) of the ids that it holds; () for all.
    """

    backend: Backend
    entries: int
    margin: int = 0
    owned: tuple[tuple[int, int], ...] = ()


class Searcher:
    """Search several backends as one."""

    def __init__(
        self,
        searched: Sequence[Searched],
        keys: Keys,
        alive: Bool[np.ndarray, " n"] | None = None,
    ) -> None:
        """`keys` are those of all entries; `alive` says which ids may be found, None for all."""
        self.searched = searched
        self._keys = keys
        self._alive = alive
        # Fetching by the share of alive entries, few queries need a second search.
        self._share = 1.0 if alive is None else max(0.5, float(alive.mean()))

    def search(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        by: By = "keys",
        rerank: int = 0,
        *,
        ordered: bool = True,
    ) -> Neighbours:
        """The k nearest entries of each query (fewer columns if there are fewer entries).

        Args:
            queries: float32, as keys are stored.
            k: number of neighbours.
            by: rank by the stored "keys", or by the codes of the "index"; ties for the last place
                are then broken by the backend.
            rerank: re-rank at least so many entries, or k and the margin if these are more.
            ordered: nearest first. Otherwise in any order, which is quicker.

        Raises:
            SettingError: a backend cannot find k at once.
        """
        for one in self.searched:
            if one.backend.most < min(k, one.entries):
                raise SettingError(
                    f"{k:,} neighbours were asked for, and on a GPU FAISS finds "
                    f"{one.backend.most:,} in lists: ask for fewer, or search on the CPU"
                )
        k = min(k, sum(one.entries for one in self.searched))
        if k == 0:
            return Neighbours.none(len(queries))
        return self._search(queries, k, by, rerank, ordered, 1)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances of query i to ids[i, j] by the codes of the index that holds it; +inf for -1.

        Raises:
            SettingError: an index cannot measure chosen entries.
        """
        distances = np.full(ids.shape, np.inf, np.float32)
        for one in self.searched:
            own = np.full(ids.shape, not one.owned)
            for first, stop in one.owned:
                own |= (ids >= first) & (ids < stop)
            measured = one.backend.distances(queries, np.where(own, ids, NO_ENTRY))
            np.minimum(distances, measured, out=distances)
        return distances

    def _search(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        by: By,
        rerank: int,
        ordered: bool,
        times: int,
    ) -> Neighbours:
        """Fetch `times` as many entries as are wanted, and more for those queries that need it."""
        answers = [
            self._fetch(one, queries, k if by == "index" else max(k + one.margin, rerank), times)
            for one in self.searched
        ]
        ids, distances = (
            np.concatenate(arrays, axis=1)
            for arrays in zip(*(answer.found for answer in answers), strict=True)
        )
        by_keys = by == "keys" and not all(one.backend.exact for one in self.searched)
        if by_keys:
            distances = self._keys.distances(queries, ids)
        found = Neighbours(ids, distances)
        nearest = (sort_nearest_first if ordered else take_nearest)(found, k)
        unsure = np.logical_or.reduce([answer.short for answer in answers])
        if by_keys and ids.shape[1] > k:
            unsure |= _may_miss_ties(answers, distances, nearest.distances)
        if unsure.any():
            rows = np.flatnonzero(unsure)
            wider = self._search(queries[rows], k, by, rerank, ordered, _MORE * times)
            nearest.ids[rows], nearest.distances[rows] = wider
        return nearest

    def _fetch(
        self, one: Searched, queries: Float[np.ndarray, "q dim"], wanted: int, times: int
    ) -> "_Answer":
        backend = one.backend
        if backend.exact:
            found = backend.search(queries, min(wanted, one.entries))
            nothing = np.zeros(len(queries), dtype=bool)
            return _Answer(found, nothing, nothing)
        most = min(backend.most, backend.entries)
        wanted = min(wanted, one.entries, most)
        spare = 0 if self._alive is None else int(wanted / self._share) - wanted + _SPARE
        fetched = min(times * (wanted + spare), most)
        found = backend.search(queries, fetched)
        # An id of -1 says that the backend has no more entries, at least in the lists it probes.
        more = np.asarray((found.ids >= 0).all(axis=1))
        if fetched == most:
            more = np.zeros_like(more)
        short = np.zeros(len(queries), dtype=bool)
        if self._alive is not None:
            alive = (found.ids >= 0) & self._alive[found.ids]
            short = more & (alive.sum(axis=1) < wanted)
            found = Neighbours(
                np.where(alive, found.ids, NO_ENTRY),
                np.where(alive, found.distances, np.float32(np.inf)),
            )
        if fetched >= MOST_TIED:
            more = np.zeros_like(more)
        return _Answer(found, short, more)


class _Answer(NamedTuple):
    """The alive entries that a backend found, with its own distances."""

    found: Neighbours
    short: Bool[np.ndarray, " q"]  # fewer than wanted, and there are more
    more: Bool[np.ndarray, " q"]  # there are more, should ties ask for them


def _may_miss_ties(
    answers: Sequence[_Answer],
    distances: Float[np.ndarray, "q found"],
    nearest: Float[np.ndarray, "q k"],
) -> Bool[np.ndarray, " q"]:
    """Queries whose last place is tied with an entry that is among the farthest by its codes.

    Equal keys have equal codes, so the backend may have missed others like it.
    """
    farthest = nearest.max(axis=1, keepdims=True)
    tied = (distances == farthest).sum(axis=1) > (nearest == farthest).sum(axis=1)
    missed = np.zeros(len(distances), dtype=bool)
    for row in np.flatnonzero(tied & np.isfinite(farthest[:, 0])):
        start = 0
        for answer in answers:
            codes = answer.found.distances[row]
            ties = distances[row, start : start + len(codes)] == farthest[row]
            start += len(codes)
            last = codes.max(initial=-np.inf, where=np.isfinite(codes))
            missed[row] |= bool(answer.more[row] and (codes[ties] == last).any())
    return missed
