"""The corpus of a segment: tokens, documents, what an encoder read, and what was removed.

Sources, which only the memories of encoder–decoders have, are stored as the tokens are: keys are
made from them again when a build goes on, and when `verify --keys` reads a sample.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt64

from nearest.corpus.tokens import TokenisedDocument, Tokens, token_dtype
from nearest.corpus.unique import id_hash
from nearest.errors import CorpusError
from nearest.folder import ArrayFile, open_array
from nearest.progress import Progress
from nearest.store.documents import FRAME_DTYPE, DocumentWriter
from nearest.store.manifest import Manifest, ModelRecord, SegmentRecord
from nearest.store.new_files import NewFiles

if TYPE_CHECKING:
    from nearest.store.segment import Segment

Paths = Mapping[str, Path]  # of a segment's files, by their names in the manifest

OFFSET_DTYPE = np.dtype(np.int64)
_ID_DTYPE = np.dtype(np.uint64)
_TOKENS_AT_ONCE = 1 << 16  # that are written

_CORPUS = {
    "tokens": "tokens.npy",
    "offsets": "offsets.npy",
    "documents": "documents.jsonl.zst",
    "frames": "frames.npy",
    "ids": "ids.npy",
}
_SOURCES = {"sources": "sources.npy", "source_offsets": "sources.offsets.npy"}
LAYOUT = {**_CORPUS, **_SOURCES, "removed": "removed.npy"}


@dataclass(frozen=True)
class StoredSources:
    """Token ids of all sources, one after another, and where each starts (and the last ends)."""

    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]

    def __getitem__(self, number: int) -> Tokens:
        """The source of a document by its stored number."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[Tokens]:
        return (self.tokens[start:stop] for start, stop in pairwise(self.offsets.tolist()))


@dataclass(frozen=True)
class Corpus:
    """The arrays of a segment's corpus, as they are on the disk and not yet checked.

    Attributes:
        tokens: uint16 or uint32 token ids of all documents, one after another.
        offsets: int64, where each document starts, and where the last ends.
        ids: uint64 hashes of the documents' ids.
        frames: which document and byte each frame of the document file starts with.
        sources: of an encoder–decoder; None for other models.
        removed: int64 stored numbers of the documents that were removed, ascending.
    """

    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    ids: UInt64[np.ndarray, " documents"]
    frames: Int[np.ndarray, "frames 2"]
    sources: StoredSources | None
    removed: Int[np.ndarray, " removed"]


def open_corpus(paths: Paths, manifest: Manifest, record: SegmentRecord) -> Corpus:
    """Map the arrays (KeyError or FolderError where one is missing or not as recorded)."""
    model, removed, sources = manifest.model, np.empty(0, OFFSET_DTYPE), None
    if record.removed:
        removed = open_array(paths["removed"], OFFSET_DTYPE, (record.removed,))
    if model.source_vocab_size is not None and record.source_tokens is not None:
        dtype = token_dtype(model.source_vocab_size)
        sources = StoredSources(
            open_array(paths["sources"], dtype, (record.source_tokens,)),
            open_array(paths["source_offsets"], OFFSET_DTYPE, (record.documents + 1,)),
        )
    return Corpus(
        open_array(paths["tokens"], token_dtype(model.vocab_size), (record.tokens,)),
        open_array(paths["offsets"], OFFSET_DTYPE, (record.documents + 1,)),
        open_array(paths["ids"], _ID_DTYPE, (record.documents,)),
        open_array(paths["frames"], FRAME_DTYPE, (record.frames, 2)),
        sources,
        removed,
    )


def write_corpus(
    files: NewFiles,
    name: str,
    model: ModelRecord,
    documents: Iterable[TokenisedDocument],
    progress: Progress,
) -> tuple[SegmentRecord, str]:
    """Write the corpus of a new segment.

    Returns:
        The segment with its corpus alone, and the SHA-256 of its documents.

    Raises:
        CorpusError: there is no document, or no token that follows another.
    """
    files.path("").mkdir(parents=True)
    dtype = token_dtype(model.vocab_size)
    lengths, hashes, total, written = array("q", [0]), array("Q"), 0, 0
    with (
        ArrayFile(files.path(LAYOUT["tokens"]), dtype) as file,
        DocumentWriter(files.path(LAYOUT["documents"]), files.path(LAYOUT["frames"])) as store,
        nullcontext()
        if model.source_vocab_size is None
        else _SourceWriter(files, model.source_vocab_size) as sources,
    ):
        tokens: list[Tokens] = []
        for item in documents:
            tokens.append(item.tokens)
            store.append(item.document)
            if sources is not None and item.encoder_tokens is not None:
                sources.append(item.encoder_tokens)
            hashes.append(int(id_hash(item.document.id)))
            lengths.append(len(item.tokens))
            total += len(item.tokens)
            if total - written >= _TOKENS_AT_ONCE:
                file.append(np.concatenate(tokens, dtype=dtype, casting="unsafe"))
                tokens, written = [], total
            progress("tokens", total, None)
        if tokens:
            file.append(np.concatenate(tokens, dtype=dtype, casting="unsafe"))
    if not hashes:
        raise CorpusError("the corpus holds no documents: give it at least one")
    entries = total - len(hashes)
    if not entries:
        raise CorpusError("the corpus holds no token that follows another: give it longer text")
    files.write(LAYOUT["offsets"], np.cumsum(lengths, dtype=OFFSET_DTYPE))
    files.write(LAYOUT["ids"], np.array(hashes, _ID_DTYPE))
    record = SegmentRecord(
        name=name,
        tokens=total,
        documents=len(hashes),
        entries=entries,
        frames=store.frames,
        files={kind: files.record(name) for kind, name in _CORPUS.items()},
        index=None,
        kept=None,
        members=None,
        removed=0,
    )
    return record if sources is None else sources.described(record), store.digest


class _SourceWriter:
    """Append one source a document to a segment's files."""

    def __init__(self, files: NewFiles, vocab_size: int) -> None:
        self._files = files
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("q", [0])
        self._file = ArrayFile(files.path(LAYOUT["sources"]), self._dtype)

    def append(self, source: Tokens) -> None:
        """Append the source of the next document."""
        self._file.append(source.astype(self._dtype))
        self._lengths.append(len(source))

    def described(self, record: SegmentRecord) -> SegmentRecord:
        """The segment with these files, which are finished."""
        offsets = np.cumsum(self._lengths, dtype=OFFSET_DTYPE)
        files = {
            "sources": self._files.record(LAYOUT["sources"]),
            "source_offsets": self._files.write(LAYOUT["source_offsets"], offsets),
        }
        return record.with_files(files, source_tokens=int(offsets[-1]))

    def __enter__(self) -> "_SourceWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)  # type: ignore[arg-type]


def check(segment: "Segment", manifest: Manifest) -> list[str]:
    """Whether documents begin with the start token and are found by their ids."""
    problems = []
    if (segment.tokens[segment.offsets[:-1]] != manifest.model.start_token).any():
        problems.append("a document does not begin with the start token")
    _ = segment.sources  # checks their values
    for number in segment.numbers.tolist():
        if segment.id_hashes[number] != id_hash(segment.documents[number].id):
            problems.append("a document cannot be found by its id")
            break
    return problems


def valued_entries(offsets: Int[np.ndarray, " documents_plus_1"]) -> Int[np.ndarray, " m"]:
    """Positions in a run of documents that are followed by a token of the same document.

    >>> valued_entries(np.array([0, 3, 5]))
    array([0, 1, 3])
    """
    return np.flatnonzero(valued_mask(offsets))


def valued_mask(offsets: Int[np.ndarray, " documents_plus_1"]) -> Bool[np.ndarray, " n"]:
    """The same positions as a mask, which takes an eighth of the memory."""
    valued: Bool[np.ndarray, " n"] = np.ones(int(offsets[-1]), dtype=bool)
    valued[offsets[1:] - 1] = False
    return valued
