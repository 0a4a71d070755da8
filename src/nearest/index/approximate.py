"""Search, read and write FAISS indexes; `building` makes them.

Known pitfalls are handled here, each in one place: ids of -1 from short lists, `nprobe` set on a
wrapper that ignores it, HNSW graphs whose efSearch is below k, the sign of inner products, and
unverified files.
"""

import hashlib
import os
from collections.abc import Callable
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import FolderError, SettingError
from nearest.index.choice import AUTO
from nearest.index.faiss_module import load_faiss
from nearest.index.gpu import MOST_IN_LISTS, has_form_in_lists, lists_on_gpu
from nearest.index.neighbours import Metric, Neighbours

_READ_BYTES = 1 << 20


class ApproximateIndex:
    """A FAISS index whose ids are entry ids; `most` neighbours can be searched for at once."""

    exact = False

    def __init__(
        self, index: Any, metric: Metric, nprobe: int | None = None, most: int | None = None
    ) -> None:
        self._index = index
        self._metric = metric
        self.entries = int(index.ntotal)
        self.most = self.entries if most is None else min(most, self.entries)
        self._lock = Lock()  # for what FAISS makes lazily inside the index
        self._graph = _graph_of(index)
        ivf = inverted_lists(index)
        if ivf is not None and nprobe is not None:
            ivf.nprobe = nprobe
            if (lists := _graph_of(ivf.quantizer)) is not None:
                lists.hnsw.efSearch = max(lists.hnsw.efSearch, 2 * nprobe)

    def on_gpu(self) -> "ApproximateIndex | None":
        """A copy on the GPUs; None if FAISS cannot search this kind of index there.

        Raises:
            SettingError: it does not fit in their memory.
        """
        if not has_form_in_lists(self._index):
            return None
        return ApproximateIndex(lists_on_gpu(self._index), self._metric, most=MOST_IN_LISTS)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return int(self._index.d)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries by the index's own codes.

        Raises:
            ValueError: the queries have another dimension.
        """
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries have {queries.shape[1]} dims, the index {self.dim}")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        view = {}
        if self._graph is not None:  # which returns at most efSearch entries
            seen = max(k, self._graph.hnsw.efSearch)
            view = {"params": load_faiss().SearchParametersHNSW(efSearch=seen)}
        distances = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)
        # Called by `search` after checks and allocations, which take a twelfth of a query's time.
        asked, far, found = map(load_faiss().swig_ptr, (queries, distances, ids))
        self._index.search_c(len(queries), asked, k, far, found, **view)
        if self._metric == "ip":
            np.negative(distances, out=distances)
        distances[ids < 0] = np.inf
        return Neighbours(ids, distances)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances to the codes of chosen entries, as a search measures them; +inf for id -1.

        Slower than stored keys, since each code is decoded alone. For parity with earlier systems.

        Raises:
            SettingError: this kind of index cannot give its vectors back.
        """
        faiss = load_faiss()
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
        for query, row, out in zip(queries, ids, distances, strict=True):
            found = row >= 0
            if found.any():
                codes = self._decoded(row[found])
                if self._metric == "ip":
                    out[found] = -(codes @ query)
                else:
                    out[found] = faiss.pairwise_distances(query[None], codes)[0]
        return distances

    def _decoded(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """Vectors decoded from the codes of entries."""
        faiss = load_faiss()
        index = faiss.downcast_index(self._index)
        if isinstance(index, faiss.IndexIDMap):
            inner: np.ndarray = index.index.reconstruct_batch(np.searchsorted(self._ids, ids))
            return inner
        ivf = inverted_lists(index)
        if isinstance(ivf, faiss.IndexIVFFastScan):  # which crashes if it was read from a file
            raise SettingError(
                "an index that is scanned fast cannot measure chosen entries: measure by keys, or "
                "build another one (`nearest index --index IVF1024,SQ8`)"
            )
        with self._lock:
            if ivf is not None and ivf.direct_map.no():  # needed to find codes by id in lists
                ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
        try:
            decoded: np.ndarray = index.reconstruct_batch(ids)
        except RuntimeError as error:  # as an index on a GPU does
            raise SettingError(
                "this kind of index cannot measure chosen entries: measure by keys, or search on "
                "the CPU"
            ) from error
        return decoded

    @cached_property
    def _ids(self) -> Int[np.ndarray, " n"]:
        """The ids of an id map, ascending: entries are added in their order."""
        ids: np.ndarray = load_faiss().vector_to_array(
            load_faiss().downcast_index(self._index).id_map
        )
        return ids

    def write(self, path: Path) -> None:
        """Write the FAISS file; a failing disk raises OSError."""
        faiss = load_faiss()
        with path.open("wb") as file:
            failed: list[OSError] = []

            def write(data: bytes) -> int:
                try:
                    if not failed:
                        file.write(data)
                except OSError as error:  # cannot pass through FAISS; raised below
                    failed.append(error)
                return len(data)  # FAISS ignores it

            faiss.write_index(self._index, faiss.PyCallbackIOWriter(write, 1 << 20))
            if failed:
                raise failed[0]


def _reader(file: BufferedReader) -> Callable[[int], bytes]:
    """Read from the start with an offset of its own: other threads may read the file too."""
    offset = 0

    def read(size: int) -> bytes:
        nonlocal offset
        data = os.pread(file.fileno(), size, offset)
        offset += len(data)
        return data

    return read


def read_index(file: BufferedReader, sha256: str) -> Any:
    """Read a FAISS index, only after the checksum of its file has matched.

    Raises:
        FolderError: the file is not the one that the manifest describes.
    """
    faiss, digest, read = load_faiss(), hashlib.sha256(), _reader(file)
    while block := read(_READ_BYTES):
        digest.update(block)
    if digest.hexdigest() != sha256:
        raise FolderError(
            f"{file.name} is damaged (its checksum differs from the manifest): "
            "rebuild it with `nearest index`"
        )
    try:
        return faiss.read_index(faiss.PyCallbackIOReader(_reader(file), _READ_BYTES))
    except RuntimeError as error:
        raise FolderError(
            f"{file.name} is no FAISS index ({str(error).strip().splitlines()[-1]}): "
            "rebuild it with `nearest index`"
        ) from error


def spec_of(index: Any) -> str:
    """A factory string for an index like this one; "auto" for a kind that is not known."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVFPQ):
        return f"IVF{index.nlist},PQ{index.pq.M}"
    if isinstance(index, faiss.IndexIVFFlat):
        return f"IVF{index.nlist},Flat"
    return AUTO


def inverted_lists(index: Any) -> Any | None:
    """The inverted-file index inside any wrapper, or None; `nprobe` has no effect elsewhere."""
    faiss = load_faiss()
    try:
        return faiss.downcast_index(faiss.extract_index_ivf(faiss.downcast_index(index)))
    except RuntimeError:
        return None


def _graph_of(index: Any) -> Any | None:
    """The HNSW graph inside any wrapper, or None."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        return _graph_of(index.index)
    return index if isinstance(index, faiss.IndexHNSW) else None
