"""What an encoder read for each document of a segment, kept as the tokens are.

They are part of the corpus: keys are made with them again when a build goes on, and when
`verify --keys` looks at a sample.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from nearest.corpus.tokens import Tokens, token_dtype
from nearest.folder import ArrayFile, open_array
from nearest.store.array_files import write_array
from nearest.store.manifest import FileRecord, SegmentRecord

_FILES = {"sources": "sources.npy", "source_offsets": "sources.offsets.npy"}
_OFFSET_DTYPE = np.dtype(np.int64)


@dataclass(frozen=True)
class StoredSources:
    """Token ids of all sources, one after another, and where each starts (and the last ends)."""

    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]

    def __getitem__(self, number: int) -> Tokens:
        """Those of a document by its stored number."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[Tokens]:
        return (self.tokens[start:stop] for start, stop in pairwise(self.offsets.tolist()))


class SourceWriter:
    """Append one source a document to a segment's files."""

    def __init__(self, root: Path, folder: str, vocab_size: int) -> None:
        self._root, self._folder = root, folder
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("q", [0])
        self._file = ArrayFile(root / folder / _FILES["sources"], self._dtype)

    def append(self, source: Tokens) -> None:
        """The next document's."""
        self._file.append(source.astype(self._dtype))
        self._lengths.append(len(source))

    def described(self, record: SegmentRecord) -> SegmentRecord:
        """The segment with these files, which are finished."""
        offsets = np.cumsum(self._lengths, dtype=_OFFSET_DTYPE)
        tokens_at, offsets_at = (f"{self._folder}/{name}" for name in _FILES.values())
        files = {
            "sources": FileRecord.of(self._root, tokens_at),
            "source_offsets": write_array(self._root, offsets_at, offsets),
        }
        return record.with_files(files, source_tokens=int(offsets[-1]))

    def __enter__(self) -> "SourceWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def pair_bytes(text: Tokens, source: Tokens | None) -> tuple[bytes, bytes]:
    """The same for the same text and source, whatever types their tokens have."""
    read = b"" if source is None else source.astype(np.int64).tobytes()
    return text.astype(np.int64).tobytes(), read


def open_sources(
    paths: Mapping[str, Path], record: SegmentRecord, vocab_size: int | None
) -> StoredSources | None:
    """Map the sources of a segment; None where the model has no encoder to read any.

    Raises:
        KeyError: `paths` lacks a file.
        FolderError: one is not what it must be.
    """
    if vocab_size is None or record.source_tokens is None:
        return None
    return StoredSources(
        open_array(paths["sources"], token_dtype(vocab_size), (record.source_tokens,)),
        open_array(paths["source_offsets"], _OFFSET_DTYPE, (record.documents + 1,)),
    )
