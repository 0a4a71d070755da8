"""A snapshot whose entries are searched by their keys, by queries as a model makes them."""

from collections.abc import Sequence
from threading import Lock
from typing import cast, get_args

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.gpu import SearchOn
from nearest.index.neighbours import Neighbours
from nearest.index.search import By, Fetched, Searcher
from nearest.store.parts.keys import open_projection
from nearest.store.search import Held, searcher_of
from nearest.store.snapshot import Snapshot

DISTANCES = get_args(By)


class SearchedSnapshot(Snapshot):
    """Entries are found by their keys; indexes are read at the first search."""

    def __init__(
        self,
        snapshot: Snapshot,
        search_on: SearchOn = "cpu",
        known: "SearchedSnapshot | None" = None,
    ) -> None:
        """Search a snapshot; indexes that `known` has read are shared as far as they are the same.

        Args:
            snapshot: what is searched.
            search_on: where.
            known: an earlier snapshot of the same memory.
        """
        super().__init__(snapshot.path, snapshot.manifest, snapshot.segments, snapshot.shard)
        self.search_on = search_on
        self._held: Held = {} if known is None else known._held
        self._reading = Lock()
        self._searcher: Searcher | None = None
        self._projection = open_projection(self.path, self.manifest.keys)

    def search(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        distances: str = "keys",
        rerank: int = 0,
        *,
        ordered: bool = True,
    ) -> Neighbours:
        """The k nearest entries of each query (fewer columns if the memory holds fewer).

        Args:
            queries: float32 hidden states of the memory's key layer.
            k: number of neighbours, at least 1.
            distances: "keys" re-ranks the index's candidates by the stored keys; "index" keeps the
                index's own order and distances, as earlier implementations do.
            rerank: re-rank at least so many; k and the margin that the index was tuned to
                when these are more.
            ordered: nearest first. Otherwise as they come, which is quicker.

        Raises:
            SettingError: k, the distances or the queries' dimension make no sense, or there are no
                keys.
        """
        if distances not in DISTANCES:
            raise SettingError(f"distances {distances!r} is unknown: choose keys or index")
        if k < 1:
            raise SettingError(f"k must be at least 1, got {k}")
        return self._search(queries, k, cast(By, distances), rerank, ordered)

    def _search(
        self, queries: Float[np.ndarray, "q dim"], k: int, by: By, rerank: int, ordered: bool
    ) -> Neighbours:
        return self.searcher.search(self._stored(queries), k, by, rerank, ordered=ordered)

    def fetch(
        self, queries: Float[np.ndarray, "q dim"], wanted: Sequence[int], by: By
    ) -> list[Fetched]:
        """So many entries of each group of `searcher`, for whoever puts shards together."""
        return self.searcher.fetch(self._stored(queries), wanted, by)

    def near_entries(self, ids: Int[np.ndarray, " b"], k: int) -> Neighbours:
        """The k entries nearest to each of some entries by the stored keys, itself among them."""
        return self.searcher.search(self.keys.rows(ids), k)

    @property
    def searcher(self) -> Searcher:
        """The searcher of the whole memory; indexes are read at first use, by one thread."""
        with self._reading:
            if self._searcher is None:
                first = int(self.bounds[self._own.start])
                self._searcher, self._held = searcher_of(
                    self.segments, self.keys, self.search_on, self._held, first
                )
            return self._searcher

    def key_distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distance of query i to the stored key of entry ids[i, j] (float32); id -1 gives +inf.

        Raises:
            SettingError: the memory has no keys, or the queries another dimension.
        """
        return self.keys.distances(self._stored(queries), ids)

    def index_distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Like `key_distances`, but to the index's own codes, as its searches measure them."""
        queries = self._stored(queries)
        if self.has_weights:
            ids = self.heads(ids)
        return self.searcher.distances(queries, ids)

    def _stored(self, queries: Float[np.ndarray, "q dim"]) -> Float[np.ndarray, "q stored_dim"]:
        """Queries as keys are stored."""
        if queries.shape[1] != self.keys_record.dim:
            raise SettingError(
                f"queries have {queries.shape[1]} dims, the keys {self.keys_record.dim}: make "
                "them with the model and key layer that built the memory"
            )
        return queries if self._projection is None else self._projection.apply(queries)
