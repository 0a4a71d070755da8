"""One part of a memory's corpus with its access paths, opened for reading."""

import weakref
from functools import cached_property
from io import BufferedReader
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from nearest.corpus.tokens import token_dtype
from nearest.errors import FolderError, SettingError
from nearest.folder import open_array
from nearest.index.approximate import read_index
from nearest.index.exact import ExactIndex
from nearest.index.keys import Keys, MergedKeys
from nearest.index.neighbours import (
    NO_ENTRY,
    MeasuringIndex,
    Neighbours,
    position_dtype,
    sort_nearest_first,
)
from nearest.memory.documents import FRAME_DTYPE, DocumentReader
from nearest.memory.key_files import open_keys, stored_format
from nearest.memory.manifest import KeysRecord, Manifest, SegmentRecord

OFFSET_DTYPE = np.dtype(np.int64)


class Segment:
    """Tokens, documents, keys and index of one segment; entry ids here count from 0.

    Queries and keys are as stored: after the projection, where the memory has one. Where entries
    were merged (`nearest compress`), `weights` counts what each stands for, 0 for those merged into
    another, and `rows` is the row of the key that each has or shares, -1 where there is no value.

    Every file is opened at once, so that a reader keeps its generation even when a writer replaces
    it; the index is read on the first search.
    """

    def __init__(self, folder: Path, manifest: Manifest, record: SegmentRecord) -> None:
        self.record = record
        self._folder = folder
        self._keys: Keys | None = None
        self.weights: UInt8[np.ndarray, " n"] | None = None
        self.rows: Int[np.ndarray, " n"] | None = None
        paths = {name: folder / file.path for name, file in record.files.items()}
        try:
            self.tokens: Integer[np.ndarray, " n"] = open_array(
                paths["tokens"], token_dtype(manifest.model.vocab_size), (record.tokens,)
            )
            self.offsets: Int[np.ndarray, " documents_plus_1"] = open_array(
                paths["offsets"], OFFSET_DTYPE, (record.documents + 1,)
            )
            if manifest.keys is not None:
                self._keys = self._open_keys(paths, manifest.keys)
            self.suffixes: Int[np.ndarray, " entries"] = open_array(
                paths["suffixes"], position_dtype(record.tokens), (record.entries,)
            )
            frames = open_array(paths["frames"], FRAME_DTYPE, (record.frames, 2))
            self.documents = DocumentReader(
                self._held_open(paths["documents"]), frames, record.documents
            )
        except KeyError as error:
            raise FolderError(
                f"the manifest of {folder} names no {error} file for segment {record.name}: "
                "restore it from a copy, or rebuild"
            ) from error
        file = None if record.index is None else record.index.file
        self._index_file = None if file is None else self._held_open(folder / file.path)

    def _open_keys(self, paths: dict[str, Path], keys: KeysRecord) -> Keys:
        record, form = self.record, stored_format(self._folder, keys)
        if record.kept is None:
            return open_keys(paths, form, keys.stored_dim, record.tokens, keys.metric)
        self.weights = open_array(paths["weights"], np.dtype(np.uint8), (record.tokens,))
        self.rows = open_array(paths["rows"], position_dtype(record.tokens), (record.tokens,))
        return MergedKeys(
            open_keys(paths, form, keys.stored_dim, record.kept, keys.metric), self.rows
        )

    def _held_open(self, path: Path) -> BufferedReader:
        """Open a file for as long as this segment lives."""
        file = path.open("rb")
        weakref.finalize(self, file.close)
        return file

    @cached_property
    def entries(self) -> Int[np.ndarray, " m"]:
        """Positions that have a value: all but the last of each document."""
        return valued_entries(self.offsets)

    @cached_property
    def searched(self) -> Int[np.ndarray, " s"]:
        """Entries that the index holds: all, or those that others have been merged into."""
        return self.entries if self.weights is None else np.flatnonzero(self.weights)

    @property
    def keys(self) -> Keys:
        """The stored keys (SettingError when the memory has none)."""
        if self._keys is None:
            raise no_keys(self._folder)
        return self._keys

    @cached_property
    def index(self) -> MeasuringIndex:
        """The index that the manifest names, read after its checksum has matched."""
        keys, record = self.keys, self.record.index
        if record is None or record.file is None or self._index_file is None:
            return self.exact_index()
        index = read_index(self._index_file, record.file.sha256, keys.metric, record.nprobe)
        if index.dim != keys.dim or index.entries != self.record.searched:
            raise FolderError(
                f"{record.file.path} holds {index.entries:,} vectors of {index.dim} dims, the "
                f"manifest says {self.record.searched:,} of {keys.dim}: "
                "rebuild it with `nearest index`"
            )
        return index

    def exact_index(self) -> ExactIndex:
        """Exhaustive search over this segment's keys."""
        return ExactIndex(self.keys, self.searched)

    def search_by_keys(
        self, queries: Float[np.ndarray, "q dim"], k: int, candidates: int
    ) -> Neighbours:
        """The k nearest by the stored keys, among at least so many that the index finds."""
        tuned_to = self.record.index.candidates if self.record.index else 0
        found = self.index.search(queries, min(max(k, candidates, tuned_to), self.record.searched))
        distances = self.keys.distances(queries, found.ids)
        return sort_nearest_first(Neighbours(found.ids, distances), k)

    def search_by_index(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest by the index's own codes, with its own distances."""
        return self.index.search(queries, min(k, self.record.searched))

    def index_distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances to the index's codes of entries, or of those that they were merged into."""
        if self.rows is not None:
            ids = np.where(ids < 0, NO_ENTRY, self.searched[self.rows[ids]])
        return self.index.distances(queries, ids)


def no_keys(folder: Path) -> SettingError:
    """What to say where keys are needed and the memory was built without."""
    return SettingError(
        f"{folder} has no keys (it was built with --keys none), and this needs them: build it with "
        "--keys fp16 or int8, or use the method suffix, which goes by the text alone"
    )


def valued_entries(offsets: Int[np.ndarray, " documents_plus_1"]) -> Int[np.ndarray, " m"]:
    """Positions in a run of documents that are followed by a token of the same document.

    >>> valued_entries(np.array([0, 3, 5]))
    array([0, 1, 3])
    """
    valued = np.ones(int(offsets[-1]), dtype=bool)
    valued[offsets[1:] - 1] = False
    return np.flatnonzero(valued)
