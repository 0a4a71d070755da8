"""The neighbours of every chunk of a corpus, as a file says them and a data set reads them."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, sha256_of, write_atomically
from nearest.retro.data.chunks import PADDING, Chunks
from nearest.retro.data.folders import read_array, read_record, save_blocks

FORMAT = 1
_IDS, _DISTANCES, _RECORD = "ids.npy", "distances.npy", "table.json"


@dataclass(frozen=True, eq=False)
class NeighbourTable:
    """For each query chunk the ids of its neighbours, nearest first.

    Attributes:
        ids: int64; −1 after the last neighbour of a row.
        distances: float32, smaller is nearer; +inf where the id is −1.
        record: what the table belongs to and how it was made: "queries" and "database" (digests of
            their chunks), "chunk_size", "embedder", "method", "filters", and counts.
    """

    ids: Int[np.ndarray, "chunks saved"]
    distances: Float[np.ndarray, "chunks saved"]
    record: Mapping[str, Any]

    def __len__(self) -> int:
        """Query chunks."""
        return len(self.ids)

    @property
    def saved(self) -> int:
        """Neighbours stored of each chunk."""
        return self.ids.shape[1]

    def first(self, count: int) -> Int[np.ndarray, "chunks count"]:
        """The nearest `count` of each row (SettingError where fewer are stored)."""
        if not 1 <= count <= self.saved:
            raise SettingError(
                f"{count} neighbours are asked for, but the table stores {self.saved} of each "
                f"chunk: take 1 to {self.saved}, or make a table with --neighbours {count}"
            )
        return self.ids[:, :count]

    def check(self, queries: Chunks, database: Chunks) -> None:
        """Refuse a table of other corpora or of corpora that have changed since.

        Raises:
            SettingError: says what differs.
        """
        for name, chunks in (("queries", queries), ("database", database)):
            size = self.record["chunk_size"]
            if chunks.size != size:
                raise SettingError(
                    f"the table is of chunks of {size} tokens, the {name} have {chunks.size}: "
                    "make a table for them"
                )
            if self.record[name] != chunks.digest:
                raise SettingError(
                    f"the table was made for other {name}, or they have changed since: run "
                    "`nearest retro neighbours` again"
                )
        if len(self.ids) != len(queries):
            raise SettingError(
                f"the table has {len(self.ids):,} rows for {len(queries):,} query chunks: it is "
                "damaged; make it anew"
            )
        check_ids(self.ids, len(database), "the table")

    def save(self, folder: Path | str) -> None:
        """Write the table to a folder, whole or not at all.

        Raises:
            FolderError: there is another table already, or the disk fails.
        """
        arrays = {"ids": self.ids, "distances": self.distances}
        shape = len(self.ids), self.saved
        save_table(Path(folder), self.record, shape, lambda name: [arrays[name]])

    @classmethod
    def open(cls, folder: Path | str) -> "NeighbourTable":
        """Read a table's folder; its arrays stay on disk.

        Raises:
            FolderError: it is no table, damaged, or of a newer format.
        """
        folder = Path(folder)
        record = read_record(folder / _RECORD, FORMAT, "a neighbour table")
        ids, distances = read_array(folder / _IDS), read_array(folder / _DISTANCES)
        if ids.ndim != 2 or ids.shape != distances.shape or ids.dtype != np.int64:
            raise FolderError(
                f"{folder} is damaged: ids {ids.shape} and distances {distances.shape} should be "
                "int64 and float32 of one shape; make the table anew"
            )
        return cls(ids, distances, record)

    @classmethod
    def build(cls, database: Any, queries: Any = None, path: Any = None, **options: Any) -> Any:
        """As `nearest.retro.data.stages.make_table`."""
        from nearest.retro.data.stages import make_table

        return make_table(database, queries, path, **options)


def save_table(
    folder: Path,
    record: Mapping[str, Any],
    shape: tuple[int, int],
    blocks: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Write a table of this record and shape whose "ids" and "distances" come in blocks of rows.

    Raises:
        FolderError: there is another table already, or the disk fails.
    """
    if (folder / _RECORD).exists():
        raise FolderError(f"{folder} holds a table already: delete it, or choose another folder")
    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_blocks(folder / _IDS, np.dtype(np.int64), shape, blocks("ids"))
        save_blocks(folder / _DISTANCES, np.dtype(np.float32), shape, blocks("distances"))
        sums = {name: sha256_of(folder / name) for name in (_IDS, _DISTANCES)}
        whole = {**record, "format": FORMAT, "files": sums}
        write_atomically(folder / _RECORD, json.dumps(whole, indent=1, sort_keys=True).encode())


def check_ids(ids: Int[np.ndarray, "chunks k"], chunks: int, what: str) -> None:
    """Refuse ids of chunks that there are not (SettingError)."""
    if ids.size and not (ids.min() >= PADDING and ids.max() < chunks):
        raise SettingError(
            f"{what} has ids in {ids.min()} … {ids.max()}, but the database has {chunks:,} "
            "chunks: it belongs to another one"
        )
