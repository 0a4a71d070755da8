"""Exhaustive search, the reference for every other index."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from nearest.index.faiss_module import has_faiss, load_faiss
from nearest.index.keys import Keys
from nearest.index.neighbours import NO_ENTRY, Neighbours, sort_nearest_first, take_nearest

BLOCK_BYTES = 1 << 26  # of float32 keys that are decoded at once
_FEW = 16  # queries; for more, decoding the keys pays
_SLICES = 64  # of the keys, divided among threads
# Entries fetched beyond k by rounded distances. Only if the farthest of them is farther than the
# k-th by more than rounding can explain is nothing nearer missing; without any, none would be.
SPARE = 16
MORE = 8  # times as many where these leave the k nearest in doubt
FLOAT32 = 2.0**-24  # unit roundoff
_ROUNDINGS = 8  # that a product of two vectors adds up, at most, times sqrt(dim)


class ExactIndex:
    """The k nearest by the stored keys; ties too are the same for few queries and for many.

    Needs no training, no file but the keys, and no FAISS, which makes many queries quicker.
    """

    exact = True

    def __init__(self, keys: Keys, ids: Int[np.ndarray, " m"]) -> None:
        """Search the entries `ids` alone."""
        self._keys = keys
        self._ids = ids
        self.entries = self.most = len(ids)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        return self._search(np.ascontiguousarray(queries, np.float32), k, SPARE)

    def _search(self, queries: Float[np.ndarray, "q dim"], k: int, spare: int) -> Neighbours:
        if not len(queries):
            return Neighbours.none(0).padded(k)
        if len(queries) <= _FEW or not has_faiss():
            each = [self._search_one(query, k) for query in queries]
            ids, distances = (np.concatenate(arrays) for arrays in zip(*each, strict=True))
            return Neighbours(ids, distances)
        found = self._scan(queries, min(k + spare, self.entries))
        return settled(
            found,
            self._keys,
            queries,
            k,
            self.entries,
            lambda rows: self._search(queries[rows], k, MORE * spare),
            self._longest,
        )

    @cached_property
    def _longest(self) -> float:
        """Length of the longest key; of no use, and 0, for L2."""
        if self._keys.metric == "l2":
            return 0.0
        block = max(1, BLOCK_BYTES // (4 * self._keys.dim))
        blocks = (self._ids[at : at + block] for at in range(0, self.entries, block))
        return max(float(lengths_of(self._keys.rows(ids)).max()) for ids in blocks)

    def _search_one(self, query: Float[np.ndarray, " dim"], k: int) -> Neighbours:
        """Measure all keys as they are stored."""
        width = -(-self.entries // _SLICES)
        ids = np.full(_SLICES * width, NO_ENTRY)
        ids[: self.entries] = self._ids
        copies = np.broadcast_to(query, (_SLICES, len(query)))
        distances = self._keys.distances(copies, ids.reshape(_SLICES, width))
        nearest = take_nearest(Neighbours(ids[None], distances.reshape(1, -1)), k)
        return sort_nearest_first(nearest, k).padded(k)

    def _scan(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """Decode the keys block by block. Distances are rounded; ties come in any order."""
        faiss, metric = load_faiss(), self._keys.metric
        kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
        best = Neighbours.none(len(queries))
        block = max(1, BLOCK_BYTES // (4 * self._keys.dim))
        for start in range(0, self.entries, block):
            ids = self._ids[start : start + block]
            distances, local = faiss.knn(
                queries, self._keys.rows(ids), min(k, len(ids)), metric=kind
            )
            merged = Neighbours(
                np.concatenate([best.ids, ids[local]], axis=1),
                np.concatenate([best.distances, -distances if metric == "ip" else distances], 1),
            )
            best = take_nearest(merged, k)
        return best

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        return self._keys.distances(queries, ids)


def settled(
    found: Neighbours,
    keys: Keys,
    queries: Float[np.ndarray, "q dim"],
    k: int,
    entries: int,
    search_wider: Callable[[Int[np.ndarray, " rows"]], Neighbours],
    longest: float,
    roundoff: float = FLOAT32,
) -> Neighbours:
    """The k nearest by the stored keys, of more than k that are nearest by rounded distances.

    Args:
        found: more than k entries a query.
        keys, queries: what distances are measured between.
        k: number of neighbours.
        entries: how many could be found.
        search_wider: called with the numbers of those queries for which an entry that was not found
            may be as near as the k-th, as where many keys are equal.
        longest: length of the longest key; only the inner product needs it, since keys that are
            near by L2 are not much longer than the query.
        roundoff: of the factors of the products that `found` was measured by.
    """
    by_keys = Neighbours(found.ids, keys.distances(queries, found.ids))
    nearest = sort_nearest_first(by_keys, k).padded(k)
    if found.ids.shape[1] < entries:
        farthest = nearest.distances[:, -1]
        lengths = lengths_of(queries)
        size = lengths**2 + farthest if keys.metric == "l2" else lengths * longest
        error = _ROUNDINGS * roundoff * np.sqrt(keys.dim) * size
        rows = np.flatnonzero(found.distances.max(axis=1) - error <= farthest)
        if len(rows):
            wider = search_wider(rows)
            nearest.ids[rows], nearest.distances[rows] = wider
    return nearest


def lengths_of(rows: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, " n"]:
    """Euclidean length of each row."""
    lengths: Float[np.ndarray, " n"] = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return lengths
