"""The stages from documents to a table of neighbours, each of which can be repeated or resumed."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from nearest.build.chunks import cut_chunks
from nearest.build.files import Maker, by_one, here
from nearest.build.match import check_tokenizer
from nearest.build.sync import SyncOptions, compare_documents
from nearest.corpus.incoming import Documents
from nearest.corpus.tokens import Tokenizer
from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, write_once
from nearest.index.bm25 import Bm25
from nearest.index.neighbours import Neighbours, sort_nearest_first
from nearest.memory import Memory
from nearest.progress import Progress, no_progress
from nearest.retro.data.chunks import Chunks, joined
from nearest.retro.data.database import (
    BLOCK,
    ChunkDatabase,
    Part,
    block_paths,
    block_rows,
    blocks_of,
)
from nearest.retro.data.embedders import EmbedderIdentity
from nearest.retro.data.filters import REASONS, Filters, Judge
from nearest.retro.data.folders import read_array, read_record, save_array
from nearest.retro.data.fusion import fused
from nearest.retro.data.search import Found, Search, valid_neighbours
from nearest.retro.data.table import FORMAT, NeighbourTable, save_table
from nearest.store.manifest import MANIFEST

AnyDatabase = Path | str | Memory | ChunkDatabase
"""A memory with chunks: its folder, or open."""
Method = Literal["dense", "bm25", "rerank", "fusion"]
METHODS = ("dense", "bm25", "rerank", "fusion")
SAVED = 20  # neighbours stored of each chunk; models read 2 to 4
_RERANKED = 200  # candidates that BM25 puts in order, or that each list gives to a fusion


@dataclass(frozen=True)
class Ends:
    """Token ids that are read at each document's begin and end; None: none."""

    start: int | None = None
    end: int | None = None


def chunk_memory(memory: Path | str | Memory, size: int = 64, ends: Ends = Ends()) -> ChunkDatabase:
    """Cut a memory's documents, without their context token, into chunks; nothing is copied.

    Raises:
        SettingError: the size is below 2.
        FolderError: it has vectors of other chunks already, or cannot be written.
    """
    path = memory.path if isinstance(memory, Memory) else Path(memory)
    cut_chunks(path, size, ends.start, ends.end)
    return ChunkDatabase.open(path)


def chunk_documents(
    documents: Documents,
    tokenizer: Tokenizer,
    path: Path | str,
    size: int = 64,
    ends: Ends = Ends(),
) -> ChunkDatabase:
    """The chunks of documents, in a memory of its own that no language model made.

    An equal memory that is there already is kept, with its vectors.

    Args:
        documents: read once, or once again to be compared.
        tokenizer: of the model that will read them.
        path: the memory's folder.
        size: tokens of a chunk.
        ends: of each document.

    Raises:
        NearestError: documents or tokenizer cannot be used.
        FolderError: other documents are in the folder, or the disk fails.
    """
    folder = Path(path)
    if not is_memory(folder):
        Memory.build(None, tokenizer, documents, folder)
        return chunk_memory(folder, size, ends)
    check_tokenizer(Memory.open(folder), tokenizer)
    if compare_documents(folder, documents, SyncOptions(allow_empty=True)).changed:
        raise FolderError(
            f"{folder} holds other documents already: delete it, choose another folder, or let "
            "`nearest sync` make it hold these"
        )
    return chunk_memory(folder, size, ends)


def is_memory(path: str | Path) -> bool:
    """Whether a folder holds a memory."""
    return (Path(path) / MANIFEST).exists()


class Databases:
    """One database or several that are searched as one; ids count on from each to the next."""

    def __init__(self, databases: Sequence[ChunkDatabase]) -> None:
        self.databases = databases
        self.chunks: Chunks = joined([database.chunks for database in databases])
        self._first = np.cumsum([0, *(len(database.chunks) for database in databases)]).tolist()
        self._bm25: Bm25 | None = None

    @classmethod
    def open(cls, named: "AnyDatabase | Sequence[AnyDatabase]") -> "Databases":
        """Open one memory or several (FolderError where one is none, or has no chunks)."""
        single = isinstance(named, str | Path | Memory | ChunkDatabase)
        several: Any = [named] if single else named
        return cls([ChunkDatabase.open(one) for one in several])

    def place(self, chunk: int) -> tuple[int, int]:
        """Of which database a chunk is, by its number, and of which document in that."""
        number = int(np.searchsorted(self._first, chunk, side="right")) - 1
        own = np.array(chunk - self._first[number])
        return number, int(self.databases[number].chunks.document_of(own))

    @property
    def bm25(self) -> Bm25:
        """Word statistics of all chunks, made when they are first needed."""
        if self._bm25 is None:
            self._bm25 = Bm25(self.chunks)
        return self._bm25

    def dense(self, vectors: np.ndarray, k: int) -> Neighbours:
        """The k nearest vectors in all of them."""
        parts = [database.index.search(vectors, k) for database in self.databases]
        ids = [
            np.where(found.ids < 0, -1, found.ids + first)
            for found, first in zip(parts, self._first, strict=False)
        ]
        both = Neighbours(
            np.concatenate(ids, axis=1), np.concatenate([f.distances for f in parts], axis=1)
        )
        return sort_nearest_first(both, k)

    def search(
        self, method: Method, tokens: Int[np.ndarray, "q m"], vectors: np.ndarray | None
    ) -> Search:
        """A search by one of METHODS for queries with these tokens and vectors."""

        def dense(rows: np.ndarray, k: int) -> Neighbours:
            if vectors is None:
                raise SettingError(f"method {method!r} needs embedded queries: embed them first")
            return self.dense(np.asarray(vectors[rows], np.float32), k)

        def run(rows: np.ndarray, k: int) -> Neighbours:
            if method == "dense":
                return dense(rows, k)
            if method == "bm25":
                return self.bm25.search(tokens[rows], k)
            near = dense(rows, max(k, _RERANKED))
            if method == "rerank":
                scored = Neighbours(near.ids, self.bm25.distances(tokens[rows], near.ids))
                return sort_nearest_first(scored, k)
            return fused([near, self.bm25.search(tokens[rows], max(k, _RERANKED))], k)

        return run


@dataclass(frozen=True)
class TableOptions:
    """How neighbours are found.

    Attributes:
        neighbours: how many are stored of each chunk.
        method: "dense" vectors, "bm25" words, "rerank" (dense candidates in BM25's order) or
            "fusion" (reciprocal ranks of both).
        filters: what may be no neighbour.
    """

    neighbours: int = SAVED
    method: Method = "dense"
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingError(
                f"method {self.method!r} is unknown: choose {', '.join(METHODS[:-1])} or fusion"
            )
        if self.neighbours < 1:
            raise SettingError(f"neighbours must be at least 1, got {self.neighbours}")


def make_table(
    databases: AnyDatabase | Sequence[AnyDatabase],
    queries: AnyDatabase | None = None,
    path: Path | str | None = None,
    options: TableOptions | None = None,
    *,
    part: Part = Part(),  # noqa: B008 - frozen
    maker: Maker = here,
    progress: Progress = no_progress,
) -> NeighbourTable | None:
    """Find the neighbours of every chunk, those that are missing, and write the table.

    Args:
        databases: what is searched, in the order in which ids count.
        queries: whose chunks need neighbours; None: the first database's own.
        path: the table's folder; None: next to the queries.
        options: how.
        part: this process's share; the one that finds all blocks there joins them.
        maker: makes the blocks of the share: this process, or workers that it starts.
        progress: called after each block.

    Returns:
        The table; None while other parts are missing.

    Raises:
        ModelError: queries and databases were embedded with different embedders.
        FolderError: another table is there, a database lacks a stage, or the disk fails.
    """
    options = options or TableOptions()
    searched = Databases.open(databases)
    own = searched.databases[0] if queries is None else ChunkDatabase.open(queries)
    folder = table_folder(searched.databases, own, path)
    record = _table_record(searched, own, options)
    if (folder / "table.json").exists():
        there = NeighbourTable.open(folder)
        if all(there.record.get(name) == value for name, value in record.items()):
            shutil.rmtree(folder / "blocks", ignore_errors=True)  # of a run killed just before
            return there
        raise FolderError(
            f"{folder} holds a table made otherwise: delete it, or choose another folder"
        )
    blocks = folder / "blocks"
    with disk_errors_explained(folder):
        blocks.mkdir(parents=True, exist_ok=True)
        write_once(blocks / "table.json", json.dumps(record, sort_keys=True).encode())
        if read_record(blocks / "table.json", FORMAT, "a table that was begun") != record:
            raise FolderError(
                f"{folder} was begun with other settings: go on with them, or delete it"
            )
        paths = block_paths(blocks, len(own.chunks))
        mine = part.blocks(len(own.chunks))
        judge = cache(lambda: Judge(own.chunks, searched.chunks, options.filters))

        def make(number: int, place: Path) -> None:
            rows = block_rows(mine[number], len(own.chunks))
            ids = np.arange(rows.start, rows.stop)
            found = find_neighbours(searched, own, ids, judge(), options)
            save_array(place, _as_rows(found))

        files = blocks_of(paths, mine, len(own.chunks), "neighbours", progress)
        if not maker(files, make):
            return None
        if all(path.exists() for path in paths):
            by_one(blocks / "whole", lambda: _join_blocks(folder, paths, record, options))
    return NeighbourTable.open(folder) if (folder / "table.json").exists() else None


def table_folder(
    databases: Sequence[ChunkDatabase], queries: ChunkDatabase | None, path: Path | str | None
) -> Path:
    """Where a table is; next to the queries where no folder is named."""
    own = databases[0] if queries is None else queries
    return own.path / "neighbours" if path is None else Path(path)


def find_neighbours(
    searched: Databases,
    own: ChunkDatabase,
    ids: Int[np.ndarray, " q"],
    judge: Judge,
    options: TableOptions,
) -> Found:
    """The neighbours of some chunks of a database."""
    vectors = None if options.method == "bm25" else own.vectors_of(ids)
    search = searched.search(options.method, own.chunks.rows(ids), vectors)
    return valid_neighbours(ids, search, judge, options.neighbours)


def _table_record(searched: Databases, own: ChunkDatabase, options: TableOptions) -> dict[str, Any]:
    """What a table belongs to; ModelError where vectors cannot be compared."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "chunk_size": searched.chunks.size,
        "queries": own.chunks.digest,
        "database": searched.chunks.digest,
        "versions": {
            "queries": own.version,
            "databases": [database.version for database in searched.databases],
        },
        "method": options.method,
        "neighbours": options.neighbours,
        "filters": asdict(options.filters),
        "embedder": None,
    }
    if own.chunks.size != searched.chunks.size:
        raise SettingError(
            f"chunks of {own.chunks.size} tokens get no neighbours of {searched.chunks.size}: "
            "prepare both with one chunk size"
        )
    if options.method != "bm25":
        for database in searched.databases:
            own.embedder.check_same(database.embedder, str(database.path))
        record["embedder"] = asdict(own.embedder)
        record["index"] = [database.index.to_dict() for database in searched.databases]
    return record


def _as_rows(found: Found) -> np.ndarray:
    """A block as it is written: a record for each query chunk."""
    k = found.kept.ids.shape[1]
    kinds = [("ids", "<i8", (k,)), ("distances", "<f4", (k,)), ("struck", "<i8", (len(REASONS),))]
    rows = np.empty(len(found.kept.ids), kinds)
    rows["ids"], rows["distances"], rows["struck"] = *found.kept, found.struck
    return rows


def _join_blocks(
    folder: Path, paths: list[Path], record: dict[str, Any], options: TableOptions
) -> None:
    """Write the table of all blocks, unless another part has."""
    if (folder / "table.json").exists():
        return shutil.rmtree(folder / "blocks", ignore_errors=True)
    struck, short, chunks = np.zeros(len(REASONS), np.int64), 0, 0
    for rows in map(read_array, paths):  # one is open at a time
        struck += rows["struck"].sum(0)
        short += int((rows["ids"][:, -1] < 0).sum())
        chunks += len(rows)
    reasons = dict(zip(REASONS, struck.tolist(), strict=True))
    whole = {**record, "counts": {"chunks": chunks, "short": short, "struck": reasons}}
    shape = chunks, options.neighbours
    save_table(folder, whole, shape, lambda name: (read_array(path)[name] for path in paths))
    shutil.rmtree(folder / "blocks", ignore_errors=True)


def check_table(table: NeighbourTable, searched: Databases, own: ChunkDatabase) -> None:
    """Refuse a table of other documents, chunk size, embedder or index, or of changed ones.

    Raises:
        ModelError, SettingError: says what differs.
    """
    table.check(own.chunks, searched.chunks)
    if table.record.get("embedder") is None:
        return
    made = EmbedderIdentity(**table.record["embedder"])
    for database in (own, *searched.databases):
        database.embedder.check_same(made, "the table")
    if table.record["index"] != [d.index.to_dict() for d in searched.databases]:
        raise SettingError(
            "the chunks have been indexed anew since the table was made, and an index may find "
            "others: run `nearest retro neighbours` again"
        )


def differing_rows(
    table: NeighbourTable,
    databases: Sequence[ChunkDatabase],
    queries: ChunkDatabase | None,
    options: TableOptions,
    sample: float,
    seed: int = 0,
) -> list[int]:
    """Search again for a sample of blocks' rows; query chunks whose neighbours differ.

    Args:
        table: to be checked, of these databases.
        databases, queries, options: as it was made from.
        sample: share of blocks, of which at least one is made anew.
        seed: of the sample.
    """
    searched = Databases(databases)
    own = searched.databases[0] if queries is None else queries
    check_table(table, searched, own)
    judge = Judge(own.chunks, searched.chunks, options.filters)
    blocks = -(-len(own.chunks) // BLOCK)
    count = min(blocks, max(1, round(blocks * sample)))
    wrong: list[int] = []
    for number in np.sort(np.random.default_rng(seed).choice(blocks, count, replace=False)):
        ids = np.arange(number * BLOCK, min((number + 1) * BLOCK, len(own.chunks)))
        found = find_neighbours(searched, own, ids, judge, options).kept
        same = (found.ids == table.ids[ids]) & (found.distances == table.distances[ids])
        wrong += ids[~same.all(1)].tolist()
    return wrong
