"""The documents of a segment: compressed JSON lines that can be read from anywhere.

`documents.jsonl.zst` is an ordinary zstd file (any zstd reads it) of several frames, each a run of
whole lines; `frames.npy` says which document and byte each frame starts with.
"""

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import zstandard
from jaxtyping import Int

from nearest.corpus.documents import Document
from nearest.errors import CorpusError, FolderError
from nearest.folder import ArrayFile

FRAME_DTYPE = np.dtype(np.int64)
_FRAME_BYTES = 1 << 18
_LARGEST_FRAME = 1 << 30  # bytes, decompressed: what a reader is ready to hold
_as_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` would make one at each call


def document_line(document: Document) -> bytes:
    """A document as a line of JSON."""
    record = {"id": document.id, "text": document.text, "metadata": dict(document.metadata)}
    if document.encoder_text is not None:
        record["encoder_text"] = document.encoder_text
    # Of a long text few copies at once: the string is gone before the line gets its end.
    return b"".join((_as_json(record).encode(), b"\n"))


def _id_first(document_id: str) -> bytes:
    """How the line of a document with this id begins."""
    return b'{"id": ' + _as_json(document_id).encode() + b", "


class DocumentWriter:
    """Append documents to `documents.jsonl.zst` and `frames.npy` in a segment's folder."""

    def __init__(self, documents_path: Path, frames_path: Path) -> None:
        self._file = documents_path.open("wb")
        try:
            self._frames = ArrayFile(frames_path, FRAME_DTYPE, (2,))
        except BaseException:
            self._file.close()
            raise
        self._digest = hashlib.sha256()
        self._lines: list[bytes] = []
        self._bytes = 0
        self._first = 0
        self.documents = 0
        self.frames = 0

    def append(self, document: Document) -> None:
        """Add one document: id, text and metadata."""
        line = document_line(document)
        if self._bytes + len(line) > _LARGEST_FRAME:
            raise CorpusError(
                f"document {document.id!r} in {document.origin} is longer than a gigabyte: cut it"
            )
        self._digest.update(line)
        self._lines.append(line)
        self._bytes += len(line)
        self.documents += 1
        if self._bytes >= _FRAME_BYTES:
            self._flush()

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all lines."""
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._lines:
            self._frames.append(np.array([[self._first, self._file.tell()]], FRAME_DTYPE))
            self._file.write(zstandard.ZstdCompressor().compress(b"".join(self._lines)))
            self.frames += 1
            self._lines, self._bytes, self._first = [], 0, self.documents

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Finish both files and make them durable, unless the writing failed."""
        with self._file, self._frames:
            if kind is None:
                self._flush()
                self._file.flush()
                os.fsync(self._file.fileno())


class DocumentReader:
    """Read any document of a segment by its number; one decompressed frame is kept."""

    def __init__(self, file: BinaryIO, frames: Int[np.ndarray, "frames 2"], documents: int) -> None:
        self._file = file
        self._frames = frames
        self._first = np.ascontiguousarray(frames[:, 0])  # document of each frame
        self._documents = documents
        self._cached: tuple[int, list[bytes]] = (0, [])  # the first document's number, and lines

    def __getitem__(self, number: int) -> Document:
        """The document with this number in the segment."""
        try:
            record: dict[str, Any] = json.loads(self._line(number))
            return Document(
                record["id"],
                record["text"],
                record["metadata"],
                record["id"],
                record.get("encoder_text"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return self._documents

    def has_id(self, number: int, document_id: str) -> bool:
        """Whether the document with this number has this id; seldom decodes the document."""
        return self._line(number).startswith(_id_first(document_id)) or (
            self[number].id == document_id  # written with its fields in another order
        )

    def _line(self, number: int) -> bytes:
        first, lines = self._cached  # read once: another thread may replace it
        if not first <= number < first + len(lines):
            frame = int(self._first.searchsorted(number, side="right")) - 1
            first, lines = self._cached = int(self._first[frame]), self._read_frame(frame)
        if not 0 <= number - first < len(lines):
            raise self._damaged(IndexError(f"document {number} is not where its frame should be"))
        return lines[number - first]

    def _read_frame(self, frame: int) -> list[bytes]:
        start = int(self._frames[frame, 1])
        last = frame + 1 == len(self._frames)
        try:
            fd = self._file.fileno()
            stop = os.fstat(fd).st_size if last else int(self._frames[frame + 1, 1])
            compressed = os.pread(fd, stop - start, start)
            if not 0 < zstandard.frame_content_size(compressed) <= _LARGEST_FRAME:
                raise ValueError("a frame does not say its size, or says one that no writer makes")
            return zstandard.ZstdDecompressor().decompress(compressed).split(b"\n")[:-1]
        except (ValueError, OSError, OverflowError, MemoryError, zstandard.ZstdError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> FolderError:
        return FolderError(
            f"{self._file.name} is damaged ({error}): restore it from a copy, or rebuild"
        )
