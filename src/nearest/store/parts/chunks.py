"""The chunks of a segment: a vector for each, where one has been made, and an index of these.

A chunk is m tokens of a document, without its context token. No file says which they are: they
follow from where documents begin. A row of the vectors that is NaN has not been made yet.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.folder import fsync_file, open_array
from nearest.index.approximate import ApproximateIndex
from nearest.index.vectors import build_vector_index
from nearest.store.manifest import Manifest, SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.parts.corpus import Paths
from nearest.store.records import ChunkIndexAsked, ChunkIndexRecord, ChunksRecord

if TYPE_CHECKING:
    from nearest.store.new_segment import NewSegment
    from nearest.store.segment import Segment

VECTORS, INDEX = "chunk_vectors", "chunk_index"
LAYOUT = {VECTORS: "chunks.vectors.npy", INDEX: "chunks.index.faiss"}


def first_chunks(
    lengths: Int[np.ndarray, " documents"], size: int
) -> Int[np.ndarray, " documents_plus_1"]:
    """The first chunk of each document of so many tokens, and at the end the number of all.

    >>> first_chunks(np.array([5, 0, 4]), size=4)
    array([0, 2, 2, 3])
    """
    return np.concatenate([[0], np.cumsum(-(-lengths // size))]).astype(np.int64)


def first_rows(segment: "Segment", chunks: ChunksRecord) -> Int[np.ndarray, " documents_plus_1"]:
    """As `first_chunks`, of all documents of a segment, removed ones included."""
    ends = (chunks.start is not None) + (chunks.end is not None)
    return first_chunks(np.diff(segment.offsets) - 1 + ends, chunks.size)


def left_rows(segment: "Segment", chunks: ChunksRecord) -> Int[np.ndarray, " left"]:
    """The rows of a segment's chunks whose documents were not removed, ascending."""
    first = first_rows(segment, chunks)
    left = np.ones(int(first[-1]), dtype=bool)
    for number in segment.removed.tolist():
        left[first[number] : first[number + 1]] = False
    return np.flatnonzero(left)


def vectors_of(segment: "Segment", chunks: ChunksRecord) -> Float[np.ndarray, "chunks dim"]:
    """The vector of each chunk of a segment; NaN where none has been made."""
    if segment.chunk_vectors is not None:
        return segment.chunk_vectors
    dim = 0 if chunks.embedder is None else chunks.embedder.dim
    none = np.full((1, dim), np.nan, chunks.dtype)
    return np.broadcast_to(none, (int(first_rows(segment, chunks)[-1]), dim))  # takes no memory


def not_made(vectors: Float[np.ndarray, "chunks dim"]) -> Bool[np.ndarray, " chunks"]:
    """Which vectors have not been made."""
    return np.isnan(vectors[:, :1]).any(axis=1) if vectors.shape[1] else np.ones(len(vectors), bool)


def open_vectors(
    paths: Paths, manifest: Manifest, record: SegmentRecord
) -> Float[np.ndarray, "chunks dim"] | None:
    """Map the vectors; None where there are none (FolderError where they are not as recorded)."""
    chunks = manifest.chunks
    if chunks is None or chunks.embedder is None or record.chunk_rows is None:
        return None
    shape = (record.chunk_rows, chunks.embedder.dim)
    return open_array(paths[VECTORS], np.dtype(chunks.dtype), shape)


def write(new: "NewSegment", record: SegmentRecord) -> SegmentRecord:
    """Keep the vectors of merged segments, and index them; new text has none yet."""
    chunks, merged = new.plan.manifest.chunks, new.plan.merged
    if chunks is None or all(segment.chunk_vectors is None for segment in merged):
        return record
    left = [vectors_of(segment, chunks)[left_rows(segment, chunks)] for segment in merged]
    vectors = np.concatenate(left)
    record = write_vectors(new.files, record, len(vectors), [vectors])
    if chunks.index is None or not_made(vectors).any():
        return record
    return write_index(new.files, record, vectors, chunks.index)


def write_vectors(
    files: NewFiles,
    record: SegmentRecord,
    chunks: int,
    blocks: Iterable[Float[np.ndarray, "rows dim"]],
) -> SegmentRecord:
    """Write the vectors of a segment's chunks, which have no index then."""
    file = files.write_blocks(LAYOUT[VECTORS], chunks, blocks)
    return _bare(record).with_files({VECTORS: file}, chunk_rows=chunks, chunk_index=None)


def write_index(
    files: NewFiles,
    record: SegmentRecord,
    vectors: Float[np.ndarray, "chunks dim"],
    asked: ChunkIndexAsked,
) -> SegmentRecord:
    """Make the index of a segment's vectors, and write it unless they are searched exactly."""
    built = build_vector_index(vectors, asked.spec, asked.recall)
    made = ChunkIndexRecord(built.spec, built.nprobe, built.recall)
    record = _bare(record).with_files({}, chunk_index=made)
    if built.faiss_index is None:
        return record
    path = files.path(LAYOUT[INDEX])
    ApproximateIndex(built.faiss_index, "l2").write(path)
    fsync_file(path)
    return record.with_files({INDEX: files.record(LAYOUT[INDEX])})


def _bare(record: SegmentRecord) -> SegmentRecord:
    """Without the file of an index."""
    kept = {kind: file for kind, file in record.files.items() if kind != INDEX}
    return msgspec.structs.replace(record, files=kept)


def served(segment: "Segment") -> Int[np.ndarray, " _"]:
    """First entries of the chunks that a search finds at the vectors of removed documents."""
    chunks = segment.chunks
    if chunks is None or segment.record.chunk_index is None or not len(segment.removed):
        return np.empty(0, np.int64)
    from nearest.store.chunks import ChunkVectors

    first = first_rows(segment, chunks)
    # From the removed documents themselves, not by the mask that a search applies.
    gone = np.concatenate([np.arange(first[n], first[n + 1]) for n in segment.removed.tolist()])
    queries = np.asarray(vectors_of(segment, chunks)[gone[:64]], np.float32)
    rows = np.unique(ChunkVectors([segment], chunks).rows_found(queries, 16))
    documents = np.searchsorted(first, rows, side="right") - 1
    entries: np.ndarray = segment.offsets[documents]
    return entries


def check(segment: "Segment") -> list[str]:
    """Whether there is a vector for each chunk, made or not, and the index holds all of them."""
    chunks, vectors = segment.chunks, segment.chunk_vectors
    if chunks is None or vectors is None:
        return []
    if len(vectors) != first_rows(segment, chunks)[-1]:
        return ["the vectors of chunks are not as many as the chunks"]
    missing = not_made(vectors)
    if not np.isfinite(vectors[~missing]).all():
        return ["a chunk's vector is not finite"]
    if segment.record.chunk_index is not None:
        segment.read_chunk_index()  # a FolderError where it cannot be read, or holds other chunks
    return []
