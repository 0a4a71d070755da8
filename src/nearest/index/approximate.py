"""FAISS indexes: built from any factory string, tuned to a measured recall, read and searched.

The pitfalls of earlier code are met here, each in one place: ids of -1 in short lists, `nprobe` set
on a wrapper that ignores it, inner products of the wrong sign, and files of unknown origin.
"""

import hashlib
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import FolderError, SettingError
from nearest.index.faiss_module import load_faiss
from nearest.index.keys import Keys
from nearest.index.neighbours import Metric, Neighbours, VectorIndex, sort_nearest_first

EXACT = "exact"
AUTO = "auto"
EXACT_BELOW = 50_000  # entries; scanning this many costs less than an index is worth
_ADD_ROWS = 65_536
_RECALL_QUERIES = 256
_RECALL_AT = 100


@dataclass(frozen=True)
class SearchParameters:
    """How an approximate index is searched, and the recall that was measured with it.

    `candidates`: at least so many entries are fetched before re-ranking by the stored keys.
    """

    nprobe: int | None = None
    candidates: int = _RECALL_AT
    recall: float | None = None


class ApproximateIndex:
    """A FAISS index whose ids are entry ids."""

    def __init__(self, index: Any, metric: Metric, nprobe: int | None = None) -> None:
        self._index = index
        self._metric = metric
        ivf = _ivf_of(index)
        if ivf is not None and nprobe is not None:
            ivf.nprobe = nprobe

    @property
    def entries(self) -> int:
        """Number of vectors in the index."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Dimension of its vectors."""
        return int(self._index.d)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries by the index's own codes."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        distances, ids = self._index.search(queries, k)
        if self._metric == "ip":
            distances = -distances
        distances[ids < 0] = np.inf
        return Neighbours(ids, distances)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances to the codes of chosen entries, as a search measures them; +inf for id -1.

        Slow beside stored keys: every code is decoded on its own. For parity with earlier systems.

        Raises:
            SettingError: this kind of index cannot give its vectors back.
        """
        self._map_entries()
        faiss = load_faiss()
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
        for query, row, out in zip(queries, ids, distances, strict=True):
            found = row >= 0
            if found.any():
                codes = self._index.reconstruct_batch(row[found])
                if self._metric == "ip":
                    out[found] = -(codes @ query)
                else:
                    out[found] = faiss.pairwise_distances(query[None], codes)[0]
        return distances

    def _map_entries(self) -> None:
        """Let the index find a code by its entry id; inverted lists cannot without a table."""
        faiss = load_faiss()
        if isinstance(self._index, faiss.IndexIDMap) and not isinstance(
            self._index, faiss.IndexIDMap2
        ):
            self._index = faiss.IndexIDMap2(self._index)
        ivf = _ivf_of(self._index)
        if ivf is not None and ivf.direct_map.no():
            ivf.set_direct_map_type(faiss.DirectMap.Hashtable)

    def write(self, path: Path) -> None:
        """Write the FAISS file; a failing disk raises OSError."""
        faiss = load_faiss()
        with path.open("wb") as file:
            failed: list[OSError] = []

            def write(data: bytes) -> int:
                try:
                    if not failed:
                        file.write(data)
                except OSError as error:  # an exception cannot cross FAISS; it is raised below
                    failed.append(error)
                return len(data)  # FAISS does not heed it

            faiss.write_index(self._index, faiss.PyCallbackIOWriter(write, 1 << 20))
            if failed:
                raise failed[0]


def read_index(
    file: BufferedReader, sha256: str, metric: Metric, nprobe: int | None
) -> ApproximateIndex:
    """Read a FAISS file, after its checksum has matched and not before.

    Raises:
        FolderError: the file is not the one the manifest describes.
    """
    faiss = load_faiss()
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
        raise FolderError(
            f"{file.name} is damaged (its checksum differs from the manifest): "
            "rebuild it with `nearest index`"
        )
    file.seek(0)
    try:
        index = faiss.read_index(faiss.PyCallbackIOReader(file.read, 1 << 20))
    except RuntimeError as error:
        raise FolderError(
            f"{file.name} is no FAISS index ({str(error).strip().splitlines()[-1]}): "
            "rebuild it with `nearest index`"
        ) from error
    return ApproximateIndex(index, metric, nprobe)


def resolve_spec(spec: str, entries: int) -> str:
    """Turn "auto" into exact search for small memories, else into lists of 8-bit codes."""
    if spec != AUTO:
        return spec
    if entries < EXACT_BELOW:
        return EXACT
    return f"IVF{2 ** round(np.log2(entries**0.5))},SQ8"


def check_spec(spec: str, dim: int, nprobe: int | None, entries: int | None = None) -> None:
    """Refuse an index before any key is made for it.

    Raises:
        SettingError: FAISS does not know the string, it does not fit the dimension or needs more
            entries, or lists are to be probed where there are none.
        NearestError: FAISS is not installed.
    """
    load_faiss()
    if entries is not None:
        spec = resolve_spec(spec, entries)
    ivf = None
    if spec not in (AUTO, EXACT):
        index = _make_index(spec, dim, "l2")
        ivf = _ivf_of(index)
    if ivf is not None and entries is not None and ivf.nlist > entries:
        raise SettingError(
            f"the index {spec!r} has more lists than the memory has entries ({entries:,}): choose "
            "fewer lists, or auto"
        )
    if nprobe is not None and ivf is None and spec != AUTO:
        raise SettingError(
            f"the index {spec!r} has no lists to probe: leave nprobe out, or choose an IVF index"
        )


def training_rows(spec: str, dim: int) -> int:
    """Rows that train an index well: 39 for each list and each 8-bit code, FAISS's own minimum."""
    ivf = _ivf_of(_make_index(spec, dim, "l2"))
    return 39 * max(256, 0 if ivf is None else int(ivf.nlist))


def _make_index(spec: str, dim: int, metric: Metric) -> Any:
    faiss = load_faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        return faiss.index_factory(dim, spec, kind)
    except RuntimeError as error:
        raise _refused(spec, dim, error) from error


def _refused(spec: str, dim: int, error: RuntimeError) -> SettingError:
    reason = str(error).strip().split("\n")[-1].split(": ")[-1]
    return SettingError(
        f"FAISS cannot build the index {spec!r} over keys of {dim} dims ({reason}): choose another "
        "index_factory string, or auto"
    )


def build_index(keys: Keys, ids: Int[np.ndarray, " m"], spec: str, rng: np.random.Generator) -> Any:
    """Train and fill a FAISS index over the keys of `ids`, with those ids.

    Raises:
        SettingError: FAISS does not know the factory string, or it does not fit the keys.
    """
    faiss = load_faiss()
    index = _make_index(spec, keys.dim, keys.metric)
    ivf = _ivf_of(index)
    try:
        if not _keeps_ids(index):
            index = faiss.IndexIDMap(index)
        if not index.is_trained:
            index.train(keys.rows(_training_sample(ids, ivf, rng)))
        for start in range(0, len(ids), _ADD_ROWS):
            block = ids[start : start + _ADD_ROWS]
            index.add_with_ids(keys.rows(block), block)
    except RuntimeError as error:
        raise _refused(spec, keys.dim, error) from error
    return index


def tune_search(
    index: Any,
    keys: Keys,
    ids: Int[np.ndarray, " m"],
    exact: VectorIndex,
    target: float,
    rng: np.random.Generator,
    nprobe: int | None = None,
) -> SearchParameters:
    """Find the cheapest search whose recall@100 after re-ranking reaches `target`.

    The sample is of the memory's own keys, each with itself left out. The lists probed or the
    candidates are doubled, whichever gains more, until the target is reached or neither gains.
    What was measured is recorded either way. With `nprobe` given, recall is only measured.
    """
    if len(ids) < 2:
        return SearchParameters(recall=1.0)
    sample = _recall_sample(ids, rng)
    truth = _exact_neighbours(exact, keys, ids, sample)
    ivf = _ivf_of(index)
    nlist = None if ivf is None else int(ivf.nlist)

    def measured(parameters: SearchParameters) -> SearchParameters:
        searched = ApproximateIndex(index, keys.metric, parameters.nprobe)
        found = _reranked(searched, keys, ids, sample, parameters.candidates)
        return replace(parameters, recall=recall(found, truth))

    if nprobe is not None and nlist is not None:
        return measured(SearchParameters(nprobe=min(nprobe, nlist)))
    best = measured(SearchParameters(nprobe=None if nlist is None else min(4, nlist)))
    while (best.recall or 0) < target:
        trials = []
        if nlist is not None and best.nprobe is not None and best.nprobe < nlist:
            trials.append(measured(replace(best, nprobe=min(2 * best.nprobe, nlist))))
        if best.candidates < min(16 * _RECALL_AT, len(ids)):
            trials.append(measured(replace(best, candidates=2 * best.candidates)))
        better = [trial for trial in trials if (trial.recall or 0) > (best.recall or 0) + 1e-3]
        if not better:
            break
        best = max(better, key=lambda trial: trial.recall or 0)
    return best


def measured_recall(
    index: VectorIndex,
    keys: Keys,
    ids: Int[np.ndarray, " m"],
    exact: VectorIndex,
    candidates: int,
    rng: np.random.Generator,
) -> float:
    """Recall@100 after re-ranking of an index as it is, on a sample of the memory's own keys."""
    if len(ids) < 2:
        return 1.0
    sample = _recall_sample(ids, rng)
    found = _reranked(index, keys, ids, sample, candidates)
    return recall(found, _exact_neighbours(exact, keys, ids, sample))


def _recall_sample(ids: Int[np.ndarray, " m"], rng: np.random.Generator) -> Int[np.ndarray, " s"]:
    return np.sort(rng.choice(ids, size=min(_RECALL_QUERIES, len(ids)), replace=False))


def _exact_neighbours(
    exact: VectorIndex, keys: Keys, ids: Int[np.ndarray, " m"], sample: Int[np.ndarray, " s"]
) -> Int[np.ndarray, "s at"]:
    """The true neighbours of some entries, without themselves."""
    at = min(_RECALL_AT, len(ids) - 1)
    return _without_self(exact.search(keys.rows(sample), at + 1), sample, at)


def _reranked(
    index: VectorIndex,
    keys: Keys,
    ids: Int[np.ndarray, " m"],
    sample: Int[np.ndarray, " s"],
    candidates: int,
) -> Int[np.ndarray, "s at"]:
    """The neighbours of some entries that an index finds, by the stored keys."""
    at = min(_RECALL_AT, len(ids) - 1)
    queries = keys.rows(sample)
    found = index.search(queries, min(candidates + 1, len(ids)))
    by_keys = Neighbours(found.ids, keys.distances(queries, found.ids))
    return _without_self(sort_nearest_first(by_keys, at + 1), sample, at)


def recall(found: Int[np.ndarray, "q k"], truth: Int[np.ndarray, "q k"]) -> float:
    """Share of the true neighbours that were found, mean over queries."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
    return float(np.mean(hits) / truth.shape[1])


def _ivf_of(index: Any) -> Any | None:
    """The inverted-file index inside any wrapper, or None: `nprobe` counts only there."""
    faiss = load_faiss()
    try:
        return faiss.extract_index_ivf(faiss.downcast_index(index))
    except RuntimeError:
        return None


def _keeps_ids(index: Any) -> bool:
    """Whether an index stores the ids it is given; the others need an id map around them."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexPreTransform):
        return _keeps_ids(faiss.downcast_index(index.index))
    return isinstance(index, faiss.IndexIVF | faiss.IndexIDMap)


def _training_sample(
    ids: Int[np.ndarray, " m"], ivf: Any | None, rng: np.random.Generator
) -> Int[np.ndarray, " s"]:
    """Rows for k-means: 64 a centroid is enough for lists, 64 × 256 for product quantisers."""
    wanted = max(64 * 256, 64 * int(ivf.nlist) if ivf is not None else 0)
    return np.sort(rng.choice(ids, size=min(wanted, len(ids)), replace=False))


def _without_self(
    found: Neighbours, own: Int[np.ndarray, " q"], at: int
) -> Int[np.ndarray, "q at"]:
    """Ids without each query's own entry, cut to `at`."""
    order = np.argsort(found.ids == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(found.ids, order, 1)[:, :at]
