"""The reference every other index is measured against: all keys, compared one block at a time."""

import numpy as np
from jaxtyping import Float, Int

from nearest.index.faiss_module import load_faiss
from nearest.index.keys import Keys
from nearest.index.neighbours import Neighbours, sort_nearest_first

_BLOCK_BYTES = 1 << 26


class ExactIndex:
    """Exhaustive search over the stored keys; nothing to train and nothing more on disk."""

    def __init__(self, keys: Keys, ids: Int[np.ndarray, " m"]) -> None:
        """Search among the keys of `ids`; others are never found."""
        self._keys = keys
        self._ids = ids

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries, exactly up to float32 rounding of the distances."""
        faiss = load_faiss()
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        inner = self._keys.metric == "ip"
        block = max(1, _BLOCK_BYTES // (4 * self._keys.dim))
        best = Neighbours(
            np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        )
        for start in range(0, len(self._ids), block):
            ids = self._ids[start : start + block]
            rows = self._keys.rows(ids)
            distances, local = faiss.knn(
                queries,
                rows,
                min(k, len(rows)),
                metric=faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2,
            )
            found = Neighbours(ids[local], -distances if inner else distances)
            merged = Neighbours(
                np.concatenate([best.ids, found.ids], axis=1),
                np.concatenate([best.distances, found.distances], axis=1),
            )
            best = sort_nearest_first(merged, k)
        return _padded(best, k)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances to chosen entries; +inf for id -1."""
        return self._keys.distances(queries, ids)


def _padded(found: Neighbours, k: int) -> Neighbours:
    """Fill rows up to k with id -1 at distance +inf."""
    missing = ((0, 0), (0, k - found.ids.shape[1]))
    return Neighbours(
        np.pad(found.ids, missing, constant_values=-1),
        np.pad(found.distances, missing, constant_values=np.inf),
    )
