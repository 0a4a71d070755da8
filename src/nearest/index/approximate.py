"""FAISS indexes, searched, read and written; `building` makes them.

The pitfalls of earlier code are met here, each in one place: ids of -1 in short lists, `nprobe` set
on a wrapper that ignores it, graphs that look at sixteen entries whatever is asked for, inner
products of the wrong sign, and files of unknown origin.
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
        self._lock = Lock()  # of what the index makes for itself when it is first needed
        self._graph = _graph_of(index)
        ivf = inverted_lists(index)
        if ivf is not None and nprobe is not None:
            ivf.nprobe = nprobe
            if (lists := _graph_of(ivf.quantizer)) is not None:
                lists.hnsw.efSearch = max(lists.hnsw.efSearch, 2 * nprobe)

    def on_gpu(self) -> "ApproximateIndex | None":
        """The same on the GPUs there are; None where FAISS has no form for it there.

        Raises:
            SettingError: they have no room for it.
        """
        if not has_form_in_lists(self._index):
            return None
        return ApproximateIndex(lists_on_gpu(self._index), self._metric, most=MOST_IN_LISTS)

    @property
    def dim(self) -> int:
        """Dimension of its vectors."""
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
        if self._graph is not None:  # which gives back no more entries than it keeps in view
            seen = max(k, self._graph.hnsw.efSearch)
            view = {"params": load_faiss().SearchParametersHNSW(efSearch=seen)}
        distances = np.empty((len(queries), k), dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)
        # What `search` calls after checks and allocations, a twelfth of a single query's time.
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

        Slow beside stored keys: every code is decoded on its own. For parity with earlier systems.

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
        """The vectors that the codes of entries stand for."""
        faiss = load_faiss()
        index = faiss.downcast_index(self._index)
        if isinstance(index, faiss.IndexIDMap):
            inner: np.ndarray = index.index.reconstruct_batch(np.searchsorted(self._ids, ids))
            return inner
        ivf = inverted_lists(index)
        if isinstance(ivf, faiss.IndexIVFFastScan):  # which crashes where it was read from a file
            raise SettingError(
                "an index that is scanned fast cannot measure chosen entries: measure by keys, or "
                "build another one (`nearest index --spec IVF1024,SQ8`)"
            )
        with self._lock:
            if ivf is not None and ivf.direct_map.no():  # without it, lists find no code by its id
                ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
        try:
            decoded: np.ndarray = index.reconstruct_batch(ids)
        except RuntimeError as error:  # as of what is on a GPU
            raise SettingError(
                "this kind of index cannot measure chosen entries: measure by keys, or search on "
                "the CPU"
            ) from error
        return decoded

    @cached_property
    def _ids(self) -> Int[np.ndarray, " n"]:
        """Of an index inside an id map: the id of each vector; entries are added in their order."""
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
                except OSError as error:  # an exception cannot cross FAISS; it is raised below
                    failed.append(error)
                return len(data)  # FAISS does not heed it

            faiss.write_index(self._index, faiss.PyCallbackIOWriter(write, 1 << 20))
            if failed:
                raise failed[0]


def _reader(file: BufferedReader) -> Callable[[int], bytes]:
    """Reads from the start, by an offset of its own: other threads may read the file meanwhile."""
    offset = 0

    def read(size: int) -> bytes:
        nonlocal offset
        data = os.pread(file.fileno(), size, offset)
        offset += len(data)
        return data

    return read


def read_index(file: BufferedReader, sha256: str) -> Any:
    """Read a FAISS index, after the checksum of its file has matched and not before.

    Raises:
        FolderError: the file is not the one the manifest describes.
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
    """A factory string for an index like this one: its own kind, as far as it is known."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVFPQ):
        return f"IVF{index.nlist},PQ{index.pq.M}"
    if isinstance(index, faiss.IndexIVFFlat):
        return f"IVF{index.nlist},Flat"
    return AUTO


def inverted_lists(index: Any) -> Any | None:
    """The inverted-file index inside any wrapper, or None: `nprobe` counts only there."""
    faiss = load_faiss()
    try:
        return faiss.downcast_index(faiss.extract_index_ivf(faiss.downcast_index(index)))
    except RuntimeError:
        return None


def _graph_of(index: Any) -> Any | None:
    """The graph (HNSW) that an index searches, inside any wrapper, or None."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        return _graph_of(index.index)
    return index if isinstance(index, faiss.IndexHNSW) else None
