"""A memory whose documents are cut into chunks, with vectors of these and an index of the vectors.

Chunks, vectors and index are a part of the memory (`store.parts.chunks`): adding, removing and
compacting keep them right. A chunk's id is its number among all that are left.

Vectors are made in blocks, each a file below `chunks.blocks` until all are there: a killed run goes
on with the missing ones, and several processes may make some each. They are then stored as one new
snapshot.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float, Int

from nearest.build.chunks import index_chunks, store_vectors
from nearest.build.files import Files, Maker, by_one, here
from nearest.corpus.documents import Document
from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, write_once
from nearest.index.neighbours import Neighbours
from nearest.index.vectors import RECALL
from nearest.memory import Memory
from nearest.progress import Progress, no_progress
from nearest.retro.data.chunks import Chunks, Told, joined
from nearest.retro.data.embedders import Embedder, EmbedderIdentity
from nearest.retro.data.folders import joined_arrays, read_record, save_array
from nearest.store.chunks import ChunkVectors
from nearest.store.records import ChunkIndexRecord, ChunksRecord, EmbedderRecord
from nearest.store.segment import Segment
from nearest.store.shard import share_named

FORMAT = 1
BLOCK = 1024  # chunks that are embedded, and looked up, together: the same in however many parts
_BLOCKS, _BEGUN = "chunks.blocks", "begun.json"

Decode = Callable[[list[int]], str]
"""Token ids → text, special tokens left out."""


@dataclass(frozen=True)
class Part:
    """The number-th of `count` equal shares of the work, counted from 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise SettingError(f"part {self.number}/{self.count} is none: write 1/4, 2/4 …")

    @classmethod
    def named(cls, text: str) -> "Part":
        """Read "2/4" (SettingError where it is none)."""
        return cls(*share_named(text))

    def blocks(self, rows: int) -> range:
        """The blocks of BLOCK rows that are its own."""
        return range(self.number - 1, -(-rows // BLOCK), self.count)


@dataclass(frozen=True)
class ChunkIndex:
    """Finds the nearest chunks of a memory; `record` says how, in its largest segment."""

    vectors: ChunkVectors
    record: ChunkIndexRecord

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest chunks, squared L2 distances by the stored vectors."""
        return self.vectors.search(queries, k)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return msgspec.structs.asdict(self.record)


class ChunkDatabase:
    """The chunks of a memory that can be searched; changes of its own are opened at once."""

    def __init__(self, memory: Memory) -> None:
        """Of an open memory (FolderError where its documents have not been cut)."""
        if memory.manifest.chunks is None:
            raise FolderError(
                f"{memory.path} has no chunks yet: run `nearest retro prepare {memory.path}`"
            )
        self.memory = memory

    @classmethod
    def open(cls, path: "Path | str | Memory | ChunkDatabase") -> "ChunkDatabase":
        """A memory's chunks (FolderError where it is no memory, or has no chunks)."""
        if isinstance(path, ChunkDatabase):
            return path
        return cls(path if isinstance(path, Memory) else Memory.open(path))

    @property
    def path(self) -> Path:
        """The memory's folder."""
        return self.memory.path

    @property
    def cut(self) -> ChunksRecord:
        """How documents are cut, and with what their chunks were embedded."""
        found = self.memory.manifest.chunks
        if found is None:
            raise FolderError(f"{self.path} has no chunks any more: open it again")
        return found

    @property
    def version(self) -> int:
        """The snapshot in which documents were last changed."""
        return self.memory.manifest.documents_of

    @property
    def record(self) -> dict[str, Any]:
        """How much it holds, and of what."""
        return {
            "documents": self.chunks.documents,
            "tokens": int(self.chunks.lengths.sum()),
            "chunks": len(self.chunks),
            "chunk_size": self.cut.size,
            "start": self.cut.start,
            "end": self.cut.end,
            "tokenizer": self.memory.manifest.model.name,
            "version": self.version,
        }

    @cached_property
    def chunks(self) -> Chunks:
        """Its chunks; the tokens stay on disk."""
        return joined([_chunks(segment, self.cut) for segment in self.memory.segments])

    @cached_property
    def vectors(self) -> ChunkVectors:
        """The vectors of its chunks, made or not."""
        return ChunkVectors(self.memory.segments, self.cut)

    @property
    def embedder(self) -> EmbedderIdentity:
        """Which embedder made the vectors (FolderError where some are not made yet)."""
        embedder = self.cut.embedder
        if embedder is None or len(self.vectors.missing):
            some = "" if embedder is None else f" of {len(self.vectors.missing):,} chunks"
            raise FolderError(
                f"{self.path} has no embeddings yet{some}: run `nearest retro embed {self.path}`"
            )
        return _identity(embedder)

    @property
    def embeddings(self) -> Float[np.ndarray, "chunks dim"]:
        """A vector for each chunk, in RAM unless there is one segment (FolderError as above)."""
        _ = self.embedder
        return self.vectors.vectors

    def vectors_of(self, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """The vectors of some chunks, float32, read where they lie (FolderError as above)."""
        _ = self.embedder
        return self.vectors.of(ids)

    def embed(
        self,
        embedder: Embedder,
        decode: Decode,
        *,
        dtype: str = "float16",
        part: Part = Part(),
        maker: Maker = here,
        progress: Progress = no_progress,
    ) -> bool:
        """Make vectors, those that are missing; returns whether all are there now.

        Args:
            embedder: of the texts.
            decode: the tokenizer's.
            dtype: float16 or float32, of what is stored.
            part: this process's share; the one that finds all blocks there stores them.
            maker: makes the blocks of the share: this process, or workers that it starts.
            progress: called after each block.

        Raises:
            ModelError: another embedder began.
            FolderError: the disk fails.
        """
        if dtype not in ("float16", "float32"):
            raise SettingError(f"dtype {dtype!r} is unknown: choose float16 or float32")
        blocks, there = self.path / _BLOCKS, self.cut.embedder
        if there is not None:
            embedder.identity.check_same(_identity(there), str(self.path))
            if dtype != self.cut.dtype:
                raise SettingError(
                    f"{self.path} holds vectors in {self.cut.dtype}: go on with this --dtype"
                )
        missing, version = self.vectors.missing, self.version
        if self._embedded:
            shutil.rmtree(blocks, ignore_errors=True)  # a run may have been killed just before
            return True
        asked = {
            "format": FORMAT,
            "chunks": self.chunks.digest,
            "first": missing[:1].tolist(),
            "embedder": asdict(embedder.identity),
            "dtype": dtype,
        }
        with disk_errors_explained(self.path):
            blocks.mkdir(exist_ok=True)
            _begin(blocks / _BEGUN, asked, embedder.identity)
            paths = block_paths(blocks, len(missing))
            mine = part.blocks(len(missing))

            def make(number: int, place: Path) -> None:
                ids = missing[block_rows(mine[number], len(missing))]
                texts = [decode(row[row >= 0].tolist()) for row in self.chunks.rows(ids)]
                save_array(place, embedder(texts).astype(dtype))

            files = blocks_of(paths, mine, len(missing), "embed", progress)
            if not maker(files, make):
                return False

            def made(start: int, stop: int) -> np.ndarray:
                own = slice(start // BLOCK, -(-stop // BLOCK))
                like, begin = np.empty((0, embedder.identity.dim), dtype), own.start * BLOCK
                return joined_arrays(paths[own], like)[start - begin : stop - begin]

            def store() -> None:
                self._reopen()
                if not self._embedded:  # by another part
                    record = EmbedderRecord(**asdict(embedder.identity))
                    store_vectors(self.path, version, record, made, dtype)
                shutil.rmtree(blocks, ignore_errors=True)

            if all(path.exists() for path in paths):
                by_one(blocks / "whole", store)
        self._reopen()
        return self._embedded

    @property
    def _embedded(self) -> bool:
        """Whether all chunks have vectors."""
        return self.cut.embedder is not None and not len(self.vectors.missing)

    def build_index(
        self,
        spec: str = "auto",
        recall: float = RECALL,
        *,
        workers: int | None = None,
        ray: str | None = None,
        progress: Progress = no_progress,
    ) -> ChunkIndex:
        """Make the index of the vectors, and keep it with the recall that was measured.

        `workers` and `ray` say who makes it, as in `BuildOptions`.
        """
        _ = self.embedder  # says what is missing
        with disk_errors_explained(self.path):
            index_chunks(self.path, spec, recall, progress, workers, ray)
        self._reopen()
        return self.index

    @property
    def indexed(self) -> bool:
        """Whether all chunks are indexed."""
        return self.vectors.indexed

    @property
    def index(self) -> ChunkIndex:
        """The index that is stored (FolderError where there is none)."""
        _ = self.embedder
        if not self.indexed:
            raise FolderError(
                f"{self.path} has no index yet, or not of all chunks: run `nearest retro index "
                f"{self.path}`"
            )
        made = [s.record.chunk_index for s in self.memory.segments]
        sizes = [s.record.chunk_rows or 0 for s in self.memory.segments]
        found = [one for one in made if one is not None]
        largest = found[int(np.argmax(sizes))]
        recall = min(one.recall for one in found)
        return ChunkIndex(self.vectors, msgspec.structs.replace(largest, recall=recall))

    def problems(self) -> list[str]:
        """What a full check of the memory finds wrong."""
        return self.memory.verify()

    def _reopen(self) -> None:
        """Take over the snapshot that stands now."""
        self.memory = self.memory.refresh()
        self.__dict__.pop("vectors", None)


def block_paths(folder: Path, rows: int) -> list[Path]:
    """The file of each block of BLOCK rows."""
    return [folder / f"{number:06d}.npy" for number in range(-(-rows // BLOCK))]


def block_rows(number: int, rows: int) -> slice:
    """The rows of a block, of so many."""
    return slice(number * BLOCK, min((number + 1) * BLOCK, rows))


def blocks_of(
    paths: Sequence[Path], numbers: range, rows: int, stage: str, progress: Progress
) -> Files:
    """Some blocks of so many rows, as files that are to be made."""

    def named(number: int) -> str:
        own = block_rows(numbers[number], rows)
        return f"chunks {own.start:,} to {own.stop - 1:,} ({stage})"

    return Files([paths[number] for number in numbers], named, stage, progress)


def date_of(document: Document) -> str:
    """What its metadata calls its date; "" where there is none."""
    return str(document.metadata.get("date", ""))


def _chunks(segment: Segment, cut: ChunksRecord) -> Chunks:
    """The chunks of what is left of a segment, its documents without their context token."""
    numbers: Int[np.ndarray, " documents"] = segment.numbers
    stored = numbers.tolist()
    return Chunks(
        segment.tokens,
        segment.offsets[numbers] + 1,
        segment.offsets[numbers + 1],
        cut.size,
        start=cut.start,
        end=cut.end,
        names=Told([(len(stored), lambda number: segment.documents[stored[number]].id)]),
        dates=Told([(len(stored), lambda number: date_of(segment.documents[stored[number]]))]),
    )


def _identity(record: EmbedderRecord) -> EmbedderIdentity:
    return EmbedderIdentity(**{name: getattr(record, name) for name in record.__struct_fields__})


def _begin(path: Path, asked: Mapping[str, Any], identity: EmbedderIdentity) -> None:
    """Note what blocks are being made with, or refuse another way than they were begun with."""
    write_once(path, json.dumps(asked, indent=1, sort_keys=True).encode())
    begun = read_record(path, FORMAT, "embeddings that were begun")
    identity.check_same(EmbedderIdentity(**begun["embedder"]), str(path.parent.parent))
    if begun != asked:
        raise FolderError(
            f"{path.parent} was begun with other chunks or another dtype ({begun['dtype']}): go on "
            "as it was begun, or delete it"
        )
