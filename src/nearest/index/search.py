"""The one way to search: over one or more backends, among alive entries.

A backend finds entries near to a query by its own codes. The searcher takes the nearest alive ones
of each, re-ranks them by the stored keys, and keeps the k nearest. Ties are broken by the random
order of ids, so that a prediction depends on its prefix alone: not on its batch, and not on where a
document stands in the corpus.

Entries of one code are taken all or none: of more than are wanted, those as far as the last are
left out, and more are fetched where too few are left, up to MOST_TIED. What is found so depends on
neither the order in which a backend finds ties, nor on how its entries are divided among several
(of memory, or of machines): `found_nearest` is the same for a searcher and for shards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.errors import SettingError
from nearest.index.keys import Keys
from nearest.index.neighbours import (
    NO_ENTRY,
    Neighbours,
    VectorIndex,
    sort_nearest_first,
    take_nearest,
    without_last_tie,
)

MOST_TIED = 1 << 16  # entries fetched for a query whose last place is tied
_SPARE = 16  # entries fetched beyond those wanted, since those as far as the last are left out
_MORE = 4  # times as many are fetched if there were too few

By = Literal["keys", "index"]


@runtime_checkable
class Backend(VectorIndex, Protocol):
    """What a searcher searches: a scan, a FAISS index, or either on a GPU.

    Attributes:
        entries: number of entries, dead ones included.
        most: largest k.
        exact: whether distances are those of the stored keys, and no entry is dead.
    """

    entries: int
    most: int
    exact: bool

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distance, by the index's own measure, of query i to entry ids[i, j]; +inf for id -1."""


@dataclass(frozen=True)
class Searched:
    """A backend and how it is searched.

    Attributes:
        backend: the backend.
        entries: number of its alive entries.
        margin: entries fetched beyond k for re-ranking, since codes are rough.
        owned: ranges [first, stop) of the ids that it holds; () for all.
        name: tells it apart from others of the same memory.
    """

    backend: Backend
    entries: int
    margin: int = 0
    owned: tuple[tuple[int, int], ...] = ()
    name: str = ""


class Group(NamedTuple):
    """What `found_nearest` knows of a backend, be it here or divided among machines.

    Attributes:
        entries: number of its alive entries.
        margin: entries fetched beyond k.
        exact: whether its codes are the keys.
        most: how many it can find at once.
    """

    entries: int
    margin: int
    exact: bool
    most: int


class Fetched(NamedTuple):
    """The alive entries of a group that are nearest to each query by its codes, in any order.

    There are as many as were wanted, or all that its searches find. Missing ones have id -1 and
    distances +inf.
    """

    ids: Int[np.ndarray, "q found"]
    codes: Float[np.ndarray, "q found"]  # distances by the codes
    distances: Float[np.ndarray, "q found"]  # those to rank by


Fetch = Callable[[Float[np.ndarray, "q dim"], Sequence[int]], Sequence[Fetched]]


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

    @property
    def groups(self) -> list[Group]:
        """The backends, as `found_nearest` goes by them."""
        return [
            Group(one.entries, one.margin, one.backend.exact, one.backend.most)
            for one in self.searched
        ]

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
            by: rank by the stored "keys", or by the codes of the "index".
            rerank: re-rank at least so many entries, or k and the margin if these are more.
            ordered: nearest first. Otherwise in any order, which is quicker.

        Raises:
            SettingError: a backend cannot find k at once.
        """
        fetch = partial(self.fetch, by=by)
        return found_nearest(self.groups, fetch, queries, k, by, rerank, ordered=ordered)

    def fetch(
        self, queries: Float[np.ndarray, "q dim"], wanted: Sequence[int], by: By
    ) -> list[Fetched]:
        """So many alive entries of each backend, with their distances."""
        answers = []
        for one, many in zip(self.searched, wanted, strict=True):
            ids, codes = self._nearest_alive(one, queries, many)
            by_codes = by == "index" or one.backend.exact
            distances = codes if by_codes else self._keys.distances(queries, ids)
            answers.append(Fetched(ids, codes, distances))
        return answers

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distance of query i to ids[i, j] by the codes of the index that holds it; +inf for -1.

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

    def _nearest_alive(
        self, one: Searched, queries: Float[np.ndarray, "q dim"], wanted: int, times: int = 1
    ) -> Neighbours:
        """The `wanted` nearest alive entries of a backend, or all that it finds."""
        backend = one.backend
        most = min(backend.most, backend.entries)
        if backend.exact or self._alive is None:
            return backend.search(queries, min(wanted, most))
        # Fetching by the share of alive entries, few queries need a second search.
        share = max(0.5, one.entries / backend.entries)
        fetched = min(times * (int(wanted / share) + _SPARE), most)
        ids, codes = backend.search(queries, fetched)
        # An id of -1 says that the backend has no more entries, at least in the lists it probes.
        more = np.asarray((ids >= 0).all(axis=1)) & (fetched < most)
        alive = (ids >= 0) & self._alive[ids]
        rank = np.cumsum(alive, axis=1)
        taken = alive & (rank <= wanted)
        found = Neighbours(
            np.where(taken, ids, NO_ENTRY), np.where(taken, codes, np.float32(np.inf))
        )
        short = np.flatnonzero(more & (rank[:, -1] < wanted))
        if not len(short):
            return found
        wider = self._nearest_alive(one, queries[short], wanted, _MORE * times)
        found = found.padded(max(fetched, wider.ids.shape[1]))
        found.ids[short], found.distances[short] = wider.padded(found.ids.shape[1])
        return found


def found_nearest(
    groups: Sequence[Group],
    fetch: Fetch,
    queries: Float[np.ndarray, "q dim"],
    k: int,
    by: By,
    rerank: int,
    *,
    ordered: bool,
    times: int = 1,
) -> Neighbours:
    """The k nearest entries of all groups, as `Searcher.search` describes it.

    Args:
        groups: what is searched.
        fetch: finds so many entries of each group.
        queries, k, by, rerank, ordered: as in `Searcher.search`.
        times: as many are fetched as are wanted.
    """
    for one in groups:
        if one.most < min(k, one.entries):
            raise SettingError(
                f"{k:,} neighbours were asked for, and on a GPU FAISS finds {one.most:,} in lists: "
                "ask for fewer, or search on the CPU"
            )
    k = min(k, sum(one.entries for one in groups))
    if k == 0:
        return Neighbours.none(len(queries))
    rough = [k if by == "index" else max(k + one.margin, rerank) for one in groups]
    wanted = [_asked(one, many, k, times) for one, many in zip(groups, rough, strict=True)]
    parts, unsure = [], np.zeros(len(queries), dtype=bool)
    for one, many, asked, found in zip(groups, rough, wanted, fetch(queries, wanted), strict=True):
        part = Neighbours(found.ids, found.distances)
        if not one.exact and asked < min(one.entries, one.most, MOST_TIED):
            part, left = without_last_tie(part, found.codes, asked)
            # Half of the margin may be lost to ties.
            unsure |= (left >= 0) & (left < min(k + (many - k) // 2, one.entries))
        parts.append(part)
    every = parts[0]
    if len(parts) > 1:
        every = Neighbours(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))
    nearest = (sort_nearest_first if ordered else take_nearest)(every, k)
    if unsure.any():
        rows, wider_by = np.flatnonzero(unsure), _MORE * times
        nearest.ids[rows], nearest.distances[rows] = found_nearest(
            groups, fetch, queries[rows], k, by, rerank, ordered=ordered, times=wider_by
        )
    return nearest


def _asked(group: Group, many: int, k: int, times: int) -> int:
    """How many entries are fetched of a group, so that `many` are left without those of a tie."""
    if group.exact:
        return min(k, group.entries)
    # Some tens of rough codes tie, and where there is no margin nothing else makes up for them.
    spare = _SPARE if many > k else max(_SPARE, k // 16)
    return min(times * many + spare, group.entries, group.most)
