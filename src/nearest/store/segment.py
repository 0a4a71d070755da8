"""A segment of a memory, opened for reading: a shard of the corpus with its index structures."""

import copy
import weakref
from collections.abc import Iterable
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer
from msgspec import structs

from nearest.corpus.tokens import Tokens
from nearest.errors import FolderError, SettingError
from nearest.folder import open_array
from nearest.index.approximate import read_index
from nearest.index.clusters import NO_CLUSTER, Clusters
from nearest.index.exact import ExactIndex
from nearest.index.keys import Keys, MergedKeys
from nearest.index.neighbours import NO_ENTRY
from nearest.index.search import Searcher
from nearest.index.suffix import SuffixArray
from nearest.store.documents import DocumentReader
from nearest.store.manifest import KeysRecord, Manifest, SegmentRecord
from nearest.store.parts.chunks import INDEX, open_vectors
from nearest.store.parts.clusters import open_clusters
from nearest.store.parts.corpus import (
    OFFSET_DTYPE,
    StoredSources,
    open_corpus,
    valued_entries,
)
from nearest.store.parts.keys import Merged, open_keys, open_merged, stored_format
from nearest.store.parts.suffix import open_suffixes, suffix_array
from nearest.store.search import searcher_of


class _Held:
    """Stays as long as a segment or a copy of it does; then its files are closed."""


class Segment:
    """Tokens, documents, keys, index and clusters of one segment; ids here count from 0.

    Queries and keys are as stored: after the projection, where the memory has one.

    Documents that were removed stand in the files until `nearest compact`: in what the corpus holds
    (`tokens`, `offsets`, `documents`, `sources`) and in `suffixes`. `alive` says which positions
    are left; whoever searches goes by it. What is derived here (`entries`, `searched`, `merged`,
    `clusters`) has them left out. An entry that was merged into one of a removed document has no
    key any more.

    Every file is opened at once, so that a reader keeps its snapshot even when a writer replaces
    it; the index is read on the first search.
    """

    def __init__(self, folder: Path, manifest: Manifest, record: SegmentRecord) -> None:
        self.record = record
        self._folder = folder
        self._held = _Held()
        self._vocab_size = manifest.model.vocab_size
        self._source_vocab_size = manifest.model.source_vocab_size
        self._keys: Keys | None = None
        self._merged: Merged | None = None
        self._suffix_array: SuffixArray | None = None
        self.paths = {name: folder / file.path for name, file in record.files.items()}
        paths = self.paths
        try:
            corpus = open_corpus(paths, manifest, record)
            self._tokens, self._offsets, self._sources = (
                corpus.tokens,
                corpus.offsets,
                corpus.sources,
            )
            self.id_hashes, self._removed = corpus.ids, corpus.removed
            if manifest.keys is not None:
                self._keys = self._open_keys(manifest.keys)
            self._suffixes = open_suffixes(paths, manifest, record)
            self._clusters = open_clusters(paths, manifest, record)
            self.chunks, self.chunk_vectors = manifest.chunks, open_vectors(paths, manifest, record)
            self._chunk_index = self._held_open(paths[INDEX]) if INDEX in paths else None
            self.documents = DocumentReader(
                self._held_open(paths["documents"]), corpus.frames, record.documents
            )
        except KeyError as error:
            raise FolderError(
                f"the manifest of {folder} names no {error} file for segment {record.name}: "
                "restore it from a copy, or rebuild"
            ) from error
        file = None if record.index is None else record.index.file
        self._index_file = None if file is None else self._held_open(folder / file.path)

    def _open_keys(self, keys: KeysRecord) -> Keys:
        record, form = self.record, stored_format(self._folder, keys)
        if record.kept is None:
            return open_keys(self.paths, form, keys.stored_dim, record.tokens, keys.metric)
        self._merged = open_merged(self.paths, record)
        return open_keys(self.paths, form, keys.stored_dim, record.kept, keys.metric)

    def _held_open(self, path: Path) -> BufferedReader:
        """Open a file for as long as this segment lives, or another that shares what is stored."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise FolderError(
                f"{path} cannot be read ({error.strerror}): restore it from a copy, or rebuild"
            ) from error
        weakref.finalize(self._held, file.close)
        return file

    def with_record(self, record: SegmentRecord) -> "Segment":
        """The segment as another snapshot has it: itself, or with other documents removed.

        What is stored is shared. The record may differ in what is removed alone (`same_stored`).
        """
        if record == self.record:
            return self
        removed = np.empty(0, OFFSET_DTYPE)
        if record.removed:
            path = self._folder / record.files["removed"].path
            removed = open_array(path, OFFSET_DTYPE, (record.removed,))
        return self._with_removed(removed, record)

    def without(self, numbers: Iterable[int]) -> "Segment":
        """The segment as if some more of its documents, by stored number, had been removed."""
        removed = np.union1d(self.removed, np.fromiter(numbers, OFFSET_DTYPE))
        return self._with_removed(removed, structs.replace(self.record, removed=len(removed)))

    def _with_removed(
        self, removed: Int[np.ndarray, " removed"], record: SegmentRecord
    ) -> "Segment":
        other = copy.copy(self)
        for name in [*vars(other)]:
            derived = isinstance(getattr(Segment, name, None), cached_property)
            if derived and name not in _OF_WHAT_IS_STORED:
                del vars(other)[name]
        other._removed, other.record = removed, record
        other.paths = {name: self._folder / file.path for name, file in record.files.items()}
        other._suffix_array = None
        return other

    # --- as stored; ranges are checked at the first use, because compiled kernels do not ----------

    @cached_property
    def tokens(self) -> Integer[np.ndarray, " n"]:
        """Token ids of all documents, one after another."""
        return self._within("tokens", self._tokens, 0, self._vocab_size)

    @cached_property
    def offsets(self) -> Int[np.ndarray, " documents_plus_1"]:
        """Where each document starts, and where the last ends."""
        return self._rising("offsets", self._offsets, self.record.tokens)

    @cached_property
    def sources(self) -> StoredSources | None:
        """The encoder's tokens of each document; None for a model without an encoder."""
        found = self._sources
        if found is not None:
            self._within("sources", found.tokens, 0, self._source_vocab_size or 0)
            self._rising("source_offsets", found.offsets, len(found.tokens))
        return found

    @cached_property
    def removed(self) -> Int[np.ndarray, " removed"]:
        """The stored numbers of documents that were removed, ascending."""
        if (np.diff(self._removed) < 1).any():
            raise self._damaged("removed", "do not rise")
        return self._within("removed", self._removed, 0, self.record.documents)

    @cached_property
    def suffixes(self) -> Int[np.ndarray, " stored_entries"]:
        """All entries by their reversed left context."""
        return self._within("suffixes", self._suffixes, 0, self.record.tokens - 1)

    @cached_property
    def stored_merged(self) -> Merged | None:
        """Which entries share a key, those of removed documents too; None where none do."""
        found = self._merged
        if found is not None:
            self._within("rows", found.rows, NO_ENTRY, self.record.kept or 0)
            if not np.array_equal(found.rows[found.heads], np.arange(self.record.kept or 0)):
                raise self._damaged("weights", "do not count the entries that share a key")
        return found

    @cached_property
    def stored_clusters(self) -> Clusters | None:
        """Clusters of all entries; None where the memory has none."""
        found = self._clusters
        if found is not None:
            count = len(found.offsets) - 1
            self._within("cluster_of", found.labels, NO_CLUSTER, count)
            self._within("cluster_members", found.members, 0, self.record.tokens - 1)
            ends = found.offsets[0], found.offsets[-1]
            if ends != (0, len(found.members)) or (np.diff(found.offsets) < 0).any():
                raise self._damaged("cluster_offsets", "do not rise from 0 to the members")
        return found

    def _within(
        self, kind: str, array: Integer[np.ndarray, "_"], low: int, high: int
    ) -> Integer[np.ndarray, "_"]:
        """The array, all of whose values must lie in [low, high)."""
        if len(array) and not (low <= int(array.min()) and int(array.max()) < high):
            raise self._damaged(kind, f"lie outside {low} to {high - 1}")
        return array

    def _rising(
        self, kind: str, offsets: Int[np.ndarray, " n"], stop: int
    ) -> Int[np.ndarray, " n"]:
        """The offsets, which must rise from 0 to the number of tokens."""
        if offsets[0] != 0 or offsets[-1] != stop or (np.diff(offsets) < 1).any():
            raise self._damaged(kind, "do not rise from 0 to the number of tokens")
        return offsets

    def _damaged(self, kind: str, what: str) -> FolderError:
        return FolderError(
            f"{self.paths[kind]} is damaged (its values {what}): restore it from a copy, or rebuild"
        )

    # --- what is left of the corpus ---------------------------------------------------------------

    @cached_property
    def alive(self) -> Bool[np.ndarray, " n"]:
        """Which positions are of documents that were not removed."""
        alive = np.ones(self.record.tokens, dtype=bool)
        for number in self.removed.tolist():
            alive[self.offsets[number] : self.offsets[number + 1]] = False
        return alive

    @cached_property
    def numbers(self) -> Int[np.ndarray, " documents"]:
        """The stored number of each document that is left."""
        return np.delete(np.arange(self.record.documents), self.removed)

    @cached_property
    def entries(self) -> Int[np.ndarray, " m"]:
        """Positions that have a value: all but the last of each document."""
        return self._left(valued_entries(self.offsets))

    @cached_property
    def entry_count(self) -> int:
        """Number of entries, without counting them one by one."""
        lengths = self.offsets[self.removed + 1] - self.offsets[self.removed]
        return self.record.entries - int(lengths.sum()) + len(lengths)

    def _left(self, ids: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        """Drop entries of removed documents."""
        return ids[self.alive[ids]] if len(self.removed) else ids

    def removed_entries(self) -> Int[np.ndarray, " m"]:
        """Entries of removed documents, from the files alone: `verify` compares what is served."""
        offsets = self.offsets
        runs = [np.arange(offsets[n], offsets[n + 1] - 1) for n in self.removed.tolist()]
        return np.concatenate([np.empty(0, np.int64), *runs])

    # --- access paths -----------------------------------------------------------------------------

    def suffix_array(self, first: int) -> SuffixArray:
        """The suffix array to search, with ids that count from `first`; the last one is kept."""
        found = self._suffix_array
        if found is None or found.first != first:
            self._suffix_array = found = suffix_array(self, first)
        return found

    @cached_property
    def merged(self) -> Merged | None:
        """Which entries share a key; None where each has its own."""
        found = self.stored_merged
        return found if found is None or not len(self.removed) else found.left(self.alive)

    @cached_property
    def searched(self) -> Int[np.ndarray, " s"]:
        """Entries that a search finds: all, or those that others have been merged into."""
        return self.entries if self.merged is None else self.merged.heads

    @cached_property
    def keyed(self) -> Int[np.ndarray, " m"]:
        """Entries that have a key, be it shared."""
        entries = self.entries
        return entries if self.merged is None else entries[self.merged.rows[entries] >= 0]

    @cached_property
    def searched_count(self) -> int:
        """Number of entries that a search can find."""
        return self.entry_count if self.merged is None else len(self.searched)

    @cached_property
    def keys(self) -> Keys:
        """The stored keys (SettingError when the memory has none)."""
        keys = self.stored_keys
        return keys if self.merged is None else MergedKeys(keys, self.merged.rows)

    @property
    def stored_keys(self) -> Keys:
        """The keys by row (SettingError when the memory has none)."""
        if self._keys is None:
            raise no_keys(self._folder)
        return self._keys

    @cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The cluster of each position (int32), -1 where it is in none."""
        if self.stored_clusters is None:
            return np.full(self.record.tokens, NO_CLUSTER, np.int32)
        labels = self.stored_clusters.labels
        return np.where(self.alive, labels, np.int32(NO_CLUSTER)) if len(self.removed) else labels

    @cached_property
    def clusters(self) -> Clusters | None:
        """Clusters of the entries that are left; None where the memory has none."""
        stored = self.stored_clusters
        if stored is None or not len(self.removed):
            return stored
        return Clusters.from_labels(self.labels, len(stored.offsets) - 1)

    @cached_property
    def searcher(self) -> Searcher:
        """The searcher of this segment alone, for merging entries and for `verify`."""
        return searcher_of([self], self.keys)[0]

    @property
    def has_index(self) -> bool:
        """Whether a file of its own is searched; else keys are scanned, or there are none."""
        return self._index_file is not None

    def read_index(self) -> Any:
        """The FAISS index that the manifest names, read anew after its checksum has matched."""
        keys, record = self.keys, self.record.index
        if record is None or record.file is None or self._index_file is None:
            raise ValueError(f"segment {self.record.name} has no index of its own")
        index = read_index(self._index_file, record.file.sha256)
        if index.d != keys.dim or index.ntotal != record.entries:
            raise FolderError(
                f"{record.file.path} holds {index.ntotal:,} vectors of {index.d} dims, the "
                f"manifest says {record.entries:,} of {keys.dim}: "
                "rebuild it with `nearest index`"
            )
        return index

    def read_chunk_index(self) -> Any:
        """The FAISS index of the chunks' vectors, read anew; None where they are scanned."""
        if self._chunk_index is None:
            return None
        index = read_index(self._chunk_index, self.record.files[INDEX].sha256)
        if index.ntotal != self.record.chunk_rows:
            raise FolderError(
                f"{self.record.files[INDEX].path} holds {index.ntotal:,} vectors for "
                f"{self.record.chunk_rows:,} chunks: run `nearest retro index`"
            )
        return index

    def exact_index(self) -> ExactIndex:
        """Exhaustive search over this segment's keys."""
        return ExactIndex(self.keys, self.searched)

    def heads(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The entries into which some were merged, themselves where they stand for themselves."""
        if self.merged is None or self.stored_merged is None:
            return ids
        rows = np.where(ids < 0, NO_ENTRY, self.merged.rows[ids])
        return np.where(rows < 0, NO_ENTRY, self.stored_merged.heads[rows])

    def tokens_of(self, number: int) -> Tokens:
        """The token ids of a document by its stored number."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def source_of(self, number: int) -> Tokens | None:
        """The encoder's tokens of a document, by its stored number; None without an encoder."""
        return None if self.sources is None else self.sources[number]


_OF_WHAT_IS_STORED = frozenset(
    {"tokens", "offsets", "sources", "suffixes", "stored_merged", "stored_clusters"}
)
"""Cached properties that do not change with what is removed."""


def same_stored(one: SegmentRecord, other: SegmentRecord) -> bool:
    """Whether two records differ, if at all, in which documents are removed alone."""

    def stored(record: SegmentRecord) -> SegmentRecord:
        files = {name: file for name, file in record.files.items() if name != "removed"}
        return structs.replace(record, removed=0, files=files)

    return stored(one) == stored(other)


def no_keys(folder: Path) -> SettingError:
    """The error of a memory that was built without keys where they are needed."""
    return SettingError(
        f"{folder} has no keys (it was built with --keys none, or with a tokenizer alone), and "
        "this needs them: build it with a model and --keys fp16 or int8, or use the method suffix, "
        "which goes by the text alone"
    )
