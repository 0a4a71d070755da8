"""The reference every other index is measured against: all keys, compared one block at a time."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int

from nearest.index.faiss_module import load_faiss
from nearest.index.keys import Keys
from nearest.index.neighbours import NO_ENTRY, Metric, Neighbours, sort_nearest_first

BLOCK_BYTES = 1 << 26  # of keys in float32, compared together
_FEW = 16  # queries; for more it pays to decode the keys
_PARTS = 64  # of the keys, shared among threads

# Ids of some rows, and the rows as float32.
Block = tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_ dim"]]


def scan(
    queries: Float[np.ndarray, "q dim"], blocks: Iterable[Block], k: int, metric: Metric
) -> Neighbours:
    """The k nearest of all rows, exactly up to float32 rounding of the distances."""
    faiss = load_faiss()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    best = Neighbours(
        np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    )
    for ids, rows in blocks:
        distances, local = faiss.knn(queries, rows, min(k, len(rows)), metric=kind)
        merged = Neighbours(
            np.concatenate([best.ids, ids[local]], axis=1),
            np.concatenate([best.distances, -distances if metric == "ip" else distances], axis=1),
        )
        best = sort_nearest_first(merged, k)
    return best.padded(k)


class ExactIndex:
    """Exhaustive search over the stored keys; nothing to train and nothing more on disk."""

    def __init__(self, keys: Keys, ids: Int[np.ndarray, " m"]) -> None:
        """Search among the keys of `ids`; others are never found."""
        self._keys = keys
        self._ids = ids

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries."""
        if not 0 < len(queries) <= _FEW:
            return scan(queries, self._blocks(), k, self._keys.metric)
        found = [self._search_alone(query, k) for query in queries]
        ids, distances = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return Neighbours(ids, distances)

    def _search_alone(self, query: Float[np.ndarray, " dim"], k: int) -> Neighbours:
        """Measure the keys as they are stored, as when a text is written token by token."""
        width = -(-len(self._ids) // _PARTS)
        ids = np.full(_PARTS * width, NO_ENTRY)
        ids[: len(self._ids)] = self._ids
        rows = np.broadcast_to(query, (_PARTS, len(query)))
        distances = self._keys.distances(rows, ids.reshape(_PARTS, width)).ravel()
        nearest = np.argpartition(distances, k)[:k] if k < len(ids) else np.arange(len(ids))
        found = Neighbours(ids[None, nearest], distances[None, nearest])
        return sort_nearest_first(found, k).padded(k)

    def _blocks(self) -> Iterator[Block]:
        block = max(1, BLOCK_BYTES // (4 * self._keys.dim))
        for start in range(0, len(self._ids), block):
            ids = self._ids[start : start + block]
            yield ids, self._keys.rows(ids)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances to chosen entries; +inf for id -1."""
        return self._keys.distances(queries, ids)
