"""Cut a memory's documents into chunks, store vectors of these, and index them: a snapshot each."""

from functools import partial
from pathlib import Path
from typing import cast

import msgspec

from nearest.build.segments import SegmentSpec, Write, write_each
from nearest.build.workers import reached, threads_of
from nearest.errors import FolderError, SettingError
from nearest.index.building import check_spec
from nearest.index.choice import AUTO, EXACT
from nearest.progress import Progress, no_progress
from nearest.store.change import Change, changing
from nearest.store.chunks import ChunkVectors, Made
from nearest.store.manifest import SegmentRecord, read_manifest
from nearest.store.new_files import NewFiles
from nearest.store.parts.chunks import vectors_of, write_index, write_vectors
from nearest.store.records import ChunkIndexAsked, ChunksRecord, EmbedderRecord, VectorDtype
from nearest.store.segment import Segment


def cut_chunks(path: Path, size: int, start: int | None = None, end: int | None = None) -> None:
    """Say how the documents of a memory are cut; nothing is copied.

    Args:
        path: the memory's folder.
        size: tokens of a chunk.
        start, end: token ids that each document is read with at its begin and end.

    Raises:
        SettingError: the size is below 2.
        FolderError: it has vectors of other chunks already, or cannot be written.
    """
    if size < 2:
        raise SettingError(f"chunk_size must be at least 2 tokens, got {size}")
    if _cut_so(read_manifest(path).chunks, size, start, end):
        return  # also of a memory that cannot be written
    with changing(path) as change:
        there = change.manifest.chunks
        if there is not None and there.embedder is not None:
            raise FolderError(
                f"{path} has vectors of chunks of {there.size} tokens (start token {there.start}, "
                f"end token {there.end}), and {size} (start {start}, end {end}) are asked for: go "
                "on with those, or build another memory"
            )
        change.publish(chunks=ChunksRecord(size, start, end))


def _cut_so(there: ChunksRecord | None, size: int, start: int | None, end: int | None) -> bool:
    return there is not None and (there.size, there.start, there.end) == (size, start, end)


def store_vectors(
    path: Path,
    version: int,
    embedder: EmbedderRecord,
    made: Made,
    dtype: str,
) -> None:
    """Store the vectors of all chunks that had none, block by block.

    Raises:
        FolderError: the documents are not those of this version any more, or the disk fails.
    """
    with changing(path) as change:
        chunks = change.manifest.chunks
        if chunks is None or change.manifest.documents_of != version:
            raise FolderError(
                f"{path} has changed since its chunks were embedded: run `nearest retro embed` "
                "again"
            )
        every = ChunkVectors(change.segments, chunks).filled(made, dtype)
        segments = [
            write_vectors(change.files(segment.record.name), segment.record, rows, blocks)
            for segment, (rows, blocks) in zip(change.segments, every, strict=True)
        ]
        as_stored = cast(VectorDtype, dtype)
        chunks = msgspec.structs.replace(chunks, embedder=embedder, dtype=as_stored, index=None)
        change.publish(segments=segments, chunks=chunks)


class ChunkIndexSpec(SegmentSpec, frozen=True, kw_only=True):
    """What a worker is told that indexes the vectors of chunks: `asked`, which index."""

    asked: ChunkIndexAsked

    def writer(self, folder: Path) -> Write:
        """Writes the index of a segment."""
        return partial(_write_index, self.asked)


def index_chunks(
    path: Path,
    spec: str = AUTO,
    recall: float = 0.95,
    progress: Progress = no_progress,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Make an index of the vectors in each segment, in place of those there may be.

    With workers, as in `BuildOptions`, these make them, a segment each.

    Raises:
        SettingError: the index or the recall makes no sense.
        FolderError: chunks have no vectors yet, or the folder cannot be written.
    """
    if not 0 < recall <= 1:
        raise SettingError(f"recall must lie in (0, 1], got {recall}")
    asked = ChunkIndexAsked(spec, recall)
    told = ChunkIndexSpec(threads=threads_of(workers, ray), asked=asked)
    with reached(told, ray), changing(path) as change:
        chunks = change.manifest.chunks
        if chunks is None or chunks.embedder is None or _incomplete(change, chunks):
            raise FolderError(
                f"{path} has chunks without vectors: run `nearest retro embed {path}` first"
            )
        if spec not in (AUTO, EXACT):
            check_spec(spec, chunks.embedder.dim, None)
        write = partial(_write_index, asked)
        segments = write_each(
            change, change.segments, write, lambda _: told, workers, ray, progress
        )
        change.publish(segments=segments, chunks=msgspec.structs.replace(chunks, index=asked))


def _write_index(asked: ChunkIndexAsked, files: NewFiles, segment: Segment) -> SegmentRecord:
    chunks = cast(ChunksRecord, segment.chunks)  # as the writer has seen
    return write_index(files, segment.record, vectors_of(segment, chunks), asked)


def _incomplete(change: Change, chunks: ChunksRecord) -> bool:
    return len(ChunkVectors(change.segments, chunks).missing) > 0
