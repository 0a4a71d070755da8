"""Nearest-neighbour search over rows that are overwritten one by one."""

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import build_index, check_spec, training_rows
from nearest.index.choice import AUTO, EXACT, EXACT_BELOW, fitting_lists
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import NO_ENTRY, Metric, Neighbours, sort_nearest_first
from nearest.index.search import Searched, Searcher

_METRIC: Metric = "l2"
_SEED = 0
_BLOCK_BYTES = 1 << 24  # of differences in float64


class MutableIndex:
    """Nearest rows of a buffer that its owner fills and overwrites; squared L2.

    "exact" compares every row. With a FAISS index_factory string, an index holds the rows as they
    were when it was built; rows written since are compared exactly. It is rebuilt once they are a
    quarter of all, so that the cost of a write is constant. All rows are compared until there are
    enough to train the index. "auto" is exact below 50,000 rows.

    Args:
        rows: float32 [capacity, dim]; their owner reports every write to `wrote`.
        spec: "exact", "auto" or an index_factory string.
        nprobe: lists that an IVF index probes.

    Raises:
        SettingError: FAISS does not know the index, it has no lists to probe, or the buffer could
            never train it.
    """

    def __init__(
        self, rows: Float[np.ndarray, "capacity dim"], spec: str, nprobe: int | None
    ) -> None:
        check_spec(spec, rows.shape[1], nprobe)
        self._exact_below = 0 if spec in (AUTO, EXACT) else training_rows(spec, rows.shape[1])
        if self._exact_below > len(rows):
            raise SettingError(
                f"the index {spec!r} needs {self._exact_below:,} rows to be trained, and there can "
                f"be {len(rows):,}: choose exact, or an index with fewer lists"
            )
        self._rows = rows
        self._keys = FloatKeys(rows, _METRIC)
        self._spec = spec
        self._nprobe = nprobe
        self._built: ApproximateIndex | None = None
        self._written = np.zeros(len(rows), dtype=bool)  # since the index was built
        self._changes = 0

    def wrote(self, rows: Int[np.ndarray, " n"]) -> None:
        """Report rows that were overwritten, each once."""
        self._changes += int(np.count_nonzero(~self._written[rows]))
        self._written[rows] = True

    def search(self, queries: Float[np.ndarray, "q dim"], size: int, k: int) -> Neighbours:
        """The k nearest of the first `size` rows, ascending; id -1 where there are fewer.

        Distances are float64, summed from differences, so a row's distance to itself is 0.
        """
        spec = EXACT if size < self._exact_below else self._spec
        if spec == AUTO:  # 8-bit codes: rougher ones would need re-ranking
            spec = EXACT if size < EXACT_BELOW else f"IVF{fitting_lists(size)},SQ8"
        if spec == EXACT:
            everything = ExactIndex(self._keys, np.arange(size))
            searcher = Searcher([Searched(everything, size)], self._keys)
        else:
            searcher = self._with_index(size, spec)
        ids = searcher.search(queries, k, ordered=False).ids
        return sort_nearest_first(Neighbours(ids, self._wide_distances(queries, ids)), k).padded(k)

    def _with_index(self, size: int, spec: str) -> Searcher:
        """The index without rows that were overwritten since it was built, and a scan of these."""
        if self._built is None or 4 * self._changes > size:
            rng = np.random.default_rng(_SEED)
            index = build_index(self._keys, np.arange(size), spec, rng)
            self._built = ApproximateIndex(index, _METRIC, self._nprobe)
            self._written[:] = False
            self._changes = 0
        alive, since = ~self._written, np.flatnonzero(self._written)
        left = int(alive[: self._built.entries].sum())
        rewritten = ExactIndex(self._keys, since)
        parts = [Searched(self._built, left), Searched(rewritten, len(since))]
        return Searcher(parts, self._keys, alive)

    def _wide_distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        distances = np.full(ids.shape, np.inf)
        block = max(1, _BLOCK_BYTES // (8 * max(1, ids.shape[1]) * queries.shape[1]))
        for start in range(0, len(ids), block):
            some = slice(start, start + block)
            gaps = self._rows[ids[some]].astype(np.float64) - queries[some, None]
            np.einsum("qkd,qkd->qk", gaps, gaps, out=distances[some])
        distances[ids == NO_ENTRY] = np.inf
        return distances
