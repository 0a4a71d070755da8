"""The reference every other index is measured against: all keys, compared one block at a time."""

import numpy as np
from jaxtyping import Float, Int

from nearest.index.faiss_module import load_faiss
from nearest.index.neighbours import Metric, Neighbours, sort_nearest_first

_BLOCK_BYTES = 1 << 26


class ExactIndex:
    """Exhaustive search over the stored keys; nothing to train and nothing more on disk."""

    def __init__(
        self, keys: Float[np.ndarray, "n dim"], ids: Int[np.ndarray, " m"] | None, metric: Metric
    ) -> None:
        """Search among keys[ids], other rows are never found; None: among all, with no copy."""
        self._keys = keys
        self._ids = ids
        self._metric = metric

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries, exactly up to float32 rounding of the distances."""
        faiss = load_faiss()
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        inner = self._metric == "ip"
        block = max(1, _BLOCK_BYTES // (4 * self._keys.shape[1]))
        best = Neighbours(
            np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        )
        for start in range(0, len(self._keys if self._ids is None else self._ids), block):
            part = slice(start, start + block)
            rows = self._keys[part if self._ids is None else self._ids[part]]
            rows = rows.astype(np.float32, copy=False)
            distances, local = faiss.knn(
                queries,
                rows,
                min(k, len(rows)),
                metric=faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2,
            )
            ids = local + start if self._ids is None else self._ids[part][local]
            found = Neighbours(ids, -distances if inner else distances)
            merged = Neighbours(
                np.concatenate([best.ids, found.ids], axis=1),
                np.concatenate([best.distances, found.distances], axis=1),
            )
            best = sort_nearest_first(merged, k)
        return best.padded(k)
