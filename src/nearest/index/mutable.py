"""Search among rows that are overwritten one by one, without building an index each time."""

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex, build_index, check_spec, training_rows
from nearest.index.choice import AUTO, EXACT, EXACT_BELOW, fitting_lists
from nearest.index.exact import scan
from nearest.index.keys import Float32Keys
from nearest.index.neighbours import NO_ENTRY, Metric, Neighbours, sort_nearest_first

_METRIC: Metric = "l2"
_SEED = 0


class MutableIndex:
    """Nearest rows of a buffer that its owner fills and overwrites; squared L2.

    With "exact", every row is compared. With a FAISS index_factory string, the index holds the rows
    as they were when it was last built; those written since are compared exactly, and it is built
    anew once they are a quarter of all, so that each write costs a constant number of insertions.
    Until there are enough rows to train it, all are compared. "auto" is exact below 50,000 rows.

    Args:
        rows: float32 [capacity, dim]; the owner's, who says of each row that it was written.
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
        self._spec = spec
        self._nprobe = nprobe
        self._built: ApproximateIndex | None = None
        self._written = np.zeros(len(rows), dtype=bool)  # since the index was built
        self._changes = 0

    def wrote(self, rows: Int[np.ndarray, " n"]) -> None:
        """Note that rows, each named once, hold something else now."""
        self._changes += int(np.count_nonzero(~self._written[rows]))
        self._written[rows] = True

    def search(self, queries: Float[np.ndarray, "q dim"], size: int, k: int) -> Neighbours:
        """The k nearest of the first `size` rows, ascending; id -1 where there are fewer.

        Distances are float64 and computed from the differences, so that a row's distance to itself
        is 0.
        """
        spec = EXACT if size < self._exact_below else self._spec
        if spec == AUTO:  # 8-bit codes: of rougher ones more than k would have to be fetched
            spec = EXACT if size < EXACT_BELOW else f"IVF{fitting_lists(size)},SQ8"
        if spec == EXACT:
            everything = np.arange(size), self._rows[:size]
            ids = scan(queries, [everything], min(k, size), _METRIC).ids
        else:
            ids = self._approximate(queries, size, k, spec)
        gaps = self._rows[ids].astype(np.float64) - queries[:, None]
        distances = np.einsum("qkd,qkd->qk", gaps, gaps)
        distances[ids == NO_ENTRY] = np.inf
        return sort_nearest_first(Neighbours(ids, distances), k).padded(k)

    def _approximate(
        self, queries: Float[np.ndarray, "q dim"], size: int, k: int, spec: str
    ) -> Int[np.ndarray, "q found"]:
        if self._built is None or 4 * self._changes > size:
            rng = np.random.default_rng(_SEED)
            index = build_index(Float32Keys(self._rows, _METRIC), np.arange(size), spec, rng)
            self._built = ApproximateIndex(index, _METRIC, self._nprobe)
            self._written[:] = False
            self._changes = 0
        # Some of what it knows has been overwritten since, so more than k are asked for.
        wanted = min(k + min(k, self._changes), self._built.entries)
        known = self._built.search(queries, wanted).ids
        known[self._written[known]] = NO_ENTRY
        rewritten = np.flatnonzero(self._written)
        since = rewritten, self._rows[rewritten]
        new = scan(queries, [since], min(k, len(rewritten)), _METRIC).ids
        return np.concatenate([known, new], axis=1)
