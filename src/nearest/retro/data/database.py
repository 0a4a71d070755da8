"""A folder that holds a corpus in chunks, their vectors, and an index of these.

    chunks.json      what the corpus is: chunk size, tokenizer, memory and its version, digests
    tokens.npy       token ids of all documents (uint16 or uint32)
    offsets.npy      int64, where each document begins, and the end
    documents.jsonl  id and date of each document
    embeddings.npy   a vector a chunk (float16 or float32), with embeddings.json beside it
    index.faiss      an index of the vectors, with index.json beside it; neither for exact search

Each JSON file is written last, so that a stage which was killed leaves nothing that is half there.
Vectors are made in blocks, each a file of its own until all are there: a killed run goes on with
the missing ones, and several processes may make some each.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, sha256_of, write_atomically
from nearest.index.approximate import read_index
from nearest.progress import Progress, no_progress
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.embedders import Embedder, EmbedderIdentity
from nearest.retro.data.folders import read_array, read_record, save_array
from nearest.retro.data.search import RECALL, ChunkIndex, IndexRecord

FORMAT = 1
BLOCK = 1024  # chunks that are embedded, and looked up, together: the same in however many parts
_CHUNKS, _EMBEDDINGS, _INDEX = "chunks.json", "embeddings.json", "index.json"
_BLOCKS = "embeddings.blocks"

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
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal()):
            raise SettingError(f"part {text!r} is none: write 1/4, 2/4 …")
        return cls(int(number), int(count))

    def blocks(self, rows: int) -> range:
        """The blocks of BLOCK rows that are its own."""
        return range(self.number - 1, -(-rows // BLOCK), self.count)


class ChunkDatabase:
    """Chunks that can be searched."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path = path
        self.record = record

    @classmethod
    def create(
        cls,
        path: Path | str,
        documents: Iterable[tuple[str, str, np.ndarray]],
        size: int,
        record: Mapping[str, Any],
        dtype: np.dtype[Any],
    ) -> "ChunkDatabase":
        """Write a corpus; an equal one that is there already is kept, with its vectors.

        Args:
            path: the folder.
            documents: id, date and token ids of each; all are held in memory as token ids.
            size: tokens of a chunk.
            record: the tokenizer's name, and the memory and its version, if the corpus is one's.
            dtype: of the stored tokens: uint16, or uint32 for vocabularies of more than 65,536.

        Raises:
            FolderError: another corpus is there, or the disk fails.
        """
        folder = Path(path)
        names, dates, arrays = [], [], []
        for name, date, tokens in documents:
            names.append(name)
            dates.append(date)
            arrays.append(np.asarray(tokens).astype(dtype))
        chunks = Chunks.of(arrays, size)
        whole = {
            **record,
            "format": FORMAT,
            "chunk_size": size,
            "digest": chunks.digest,
            "documents": len(arrays),
            "chunks": len(chunks),
            "tokens": len(chunks.tokens),
        }
        if (folder / _CHUNKS).exists():
            there = cls.open(folder)
            if {**there.record, "files": None} == {**whole, "files": None}:
                return there
            raise FolderError(
                f"{folder} holds other chunks already: delete it, or choose another folder"
            )
        lines = "".join(
            json.dumps({"id": name, "date": date}, ensure_ascii=False) + "\n"
            for name, date in zip(names, dates, strict=True)
        )
        with disk_errors_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_array(folder / "tokens.npy", chunks.tokens.astype(dtype))
            save_array(folder / "offsets.npy", np.append(chunks.starts, len(chunks.tokens)))
            write_atomically(folder / "documents.jsonl", lines.encode())
            files = ("tokens.npy", "offsets.npy", "documents.jsonl")
            whole["files"] = {name: sha256_of(folder / name) for name in files}
            _write_record(folder / _CHUNKS, whole)
        return cls.open(folder)

    @classmethod
    def open(cls, path: Path | str) -> "ChunkDatabase":
        """Read a folder that `create` wrote (FolderError where it is none, or damaged)."""
        folder = Path(path)
        database = cls(folder, read_record(folder / _CHUNKS, FORMAT, "a database of chunks"))
        chunks = database.chunks
        if (
            chunks.documents != database.record["documents"]
            or len(chunks) != (database.record["chunks"])
        ):
            raise FolderError(f"{folder} is damaged: its arrays have other sizes; make it anew")
        return database

    @cached_property
    def chunks(self) -> Chunks:
        """Its chunks; the tokens stay on disk."""
        offsets = read_array(self.path / "offsets.npy")
        tokens = read_array(self.path / "tokens.npy")
        if len(offsets) == 0 or offsets[-1] != len(tokens):
            raise FolderError(f"{self.path} is damaged: tokens are missing; make it anew")
        text = (self.path / "documents.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        dates = [line["date"] for line in lines]
        return Chunks(
            tokens,
            np.asarray(offsets[:-1]),
            np.asarray(offsets[1:]),
            self.record["chunk_size"],
            names=[line["id"] for line in lines],
            dates=dates if any(dates) else None,
        )

    @cached_property
    def embedder(self) -> EmbedderIdentity:
        """Which embedder made the vectors."""
        return EmbedderIdentity(**self._embedding_record["embedder"])

    @property
    def _embedding_record(self) -> dict[str, Any]:
        path = self.path / _EMBEDDINGS
        if not path.exists():
            raise FolderError(
                f"{self.path} has no embeddings yet: run `nearest retro embed {self.path}`"
            )
        record = read_record(path, FORMAT, "a database with embeddings")
        if record["chunks"] != self.record["digest"]:
            raise FolderError(f"{path} is of other chunks: delete it, and embed anew")
        return record

    @cached_property
    def embeddings(self) -> Float[np.ndarray, "chunks dim"]:
        """A vector for each chunk, mapped."""
        record = self._embedding_record
        array = read_array(self.path / "embeddings.npy")
        if array.shape != (self.record["chunks"], record["embedder"]["dim"]):
            raise FolderError(
                f"{self.path / 'embeddings.npy'} has the shape {array.shape}, its record says "
                f"({self.record['chunks']}, {record['embedder']['dim']}): embed anew"
            )
        return array

    def embed(
        self,
        embedder: Embedder,
        decode: Decode,
        *,
        dtype: str = "float16",
        part: Part = Part(),
        progress: Progress = no_progress,
    ) -> bool:
        """Make vectors, those that are missing; returns whether all are there now.

        Args:
            embedder: of the texts.
            decode: the tokenizer's.
            dtype: float16 or float32, of what is stored.
            part: this process's share; the one that finds all blocks there joins them.
            progress: called after each block.

        Raises:
            ModelError: another embedder began.
            FolderError: the disk fails.
        """
        if dtype not in ("float16", "float32"):
            raise SettingError(f"dtype {dtype!r} is unknown: choose float16 or float32")
        asked = {
            "format": FORMAT,
            "chunks": self.record["digest"],
            "embedder": asdict(embedder.identity),
            "dtype": dtype,
        }
        if (self.path / _EMBEDDINGS).exists():
            embedder.identity.check_same(self.embedder, str(self.path))
            return True
        blocks = self.path / _BLOCKS
        with disk_errors_explained(self.path):
            blocks.mkdir(exist_ok=True)
            _begin(blocks / _EMBEDDINGS, asked, embedder.identity)
            paths = block_paths(blocks, len(self.chunks))
            mine = part.blocks(len(self.chunks))
            for done, number in enumerate(mine):
                if not paths[number].exists():
                    save_array(paths[number], self._embed_block(number, embedder, decode, dtype))
                progress("embed", done + 1, len(mine))
            return self._join_embeddings(blocks, asked)

    def _embed_block(
        self, number: int, embedder: Embedder, decode: Decode, dtype: str
    ) -> Float[np.ndarray, "rows dim"]:
        ids = np.arange(number * BLOCK, min((number + 1) * BLOCK, len(self.chunks)))
        texts = [decode(row[row >= 0].tolist()) for row in self.chunks.rows(ids)]
        vectors: np.ndarray = embedder(texts).astype(dtype)
        return vectors

    def _join_embeddings(self, blocks: Path, asked: dict[str, Any]) -> bool:
        """Make one array of the blocks once all are there, by one of the processes."""
        paths = block_paths(blocks, len(self.chunks))
        if not all(path.exists() for path in paths):
            return (self.path / _EMBEDDINGS).exists()
        shape = (0, asked["embedder"]["dim"])
        arrays = [np.empty(shape, asked["dtype"]), *map(read_array, paths)]
        save_array(self.path / "embeddings.npy", np.concatenate(arrays))
        asked["sha256"] = sha256_of(self.path / "embeddings.npy")
        _write_record(self.path / _EMBEDDINGS, asked)
        for path in [*paths, blocks / _EMBEDDINGS]:
            path.unlink(missing_ok=True)
        blocks.rmdir()
        return True

    def build_index(self, spec: str = "auto", recall: float = RECALL, seed: int = 0) -> ChunkIndex:
        """Make the index of the vectors, and keep it with the recall that was measured."""
        index = ChunkIndex.build(self.embeddings, spec, recall, seed)
        record = {
            "format": FORMAT,
            "embeddings": self._embedding_record["sha256"],
            **asdict(index.record),
        }
        with disk_errors_explained(self.path):
            (self.path / _INDEX).unlink(missing_ok=True)
            if index.faiss_index is not None:
                from nearest.index.approximate import ApproximateIndex

                partial = self.path / "index.faiss.partial"
                ApproximateIndex(index.faiss_index, "l2").write(partial)
                partial.replace(self.path / "index.faiss")
                record["sha256"] = sha256_of(self.path / "index.faiss")
            _write_record(self.path / _INDEX, record)
        self.__dict__.pop("index", None)
        return index

    @cached_property
    def index(self) -> ChunkIndex:
        """The index that is stored (FolderError where there is none, or it is of other vectors)."""
        path = self.path / _INDEX
        if not path.exists():
            raise FolderError(
                f"{self.path} has no index yet: run `nearest retro index {self.path}`"
            )
        record = read_record(path, FORMAT, "a database with an index")
        if record["embeddings"] != self._embedding_record["sha256"]:
            raise FolderError(f"{path} is of other embeddings: run `nearest retro index` again")
        made = IndexRecord(record["spec"], record["nprobe"], record["recall"])
        if "sha256" not in record:
            return ChunkIndex(self.embeddings, made)
        with (self.path / "index.faiss").open("rb") as file:
            return ChunkIndex(self.embeddings, made, read_index(file, record["sha256"]))

    def problems(self) -> list[str]:
        """What a full check finds wrong: files that differ from their checksums."""
        found = []
        expected = dict(self.record["files"])
        if (self.path / _EMBEDDINGS).exists():
            expected["embeddings.npy"] = self._embedding_record["sha256"]
        if (self.path / _INDEX).exists():
            record = read_record(self.path / _INDEX, FORMAT, "a database with an index")
            if "sha256" in record:
                expected["index.faiss"] = record["sha256"]
        for name, sha256 in expected.items():
            if not (self.path / name).exists():
                found.append(f"{name} is missing")
            elif sha256_of(self.path / name) != sha256:
                found.append(f"{name} differs from its checksum")
        if not found and self.chunks.digest != self.record["digest"]:
            found.append("the chunks are not those that the record says")
        return found


def block_paths(folder: Path, rows: int) -> list[Path]:
    """The file of each block of BLOCK rows."""
    return [folder / f"{number:06d}.npy" for number in range(-(-rows // BLOCK))]


def _begin(path: Path, asked: dict[str, Any], identity: EmbedderIdentity) -> None:
    """Note what blocks are being made with, or refuse another way than they were begun with."""
    if path.exists():
        begun = read_record(path, FORMAT, "embeddings that were begun")
        identity.check_same(EmbedderIdentity(**begun["embedder"]), str(path.parent.parent))
        if begun != asked:
            raise FolderError(
                f"{path.parent} was begun with other chunks or another dtype ({begun['dtype']}): "
                "go on as it was begun, or delete it"
            )
        return
    _write_record(path, asked)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=1, sort_keys=True).encode())
