"""The files of the retro-pytorch code: raw int32 arrays without a header, both ways.

`chunks.dat` [chunks, m + 1] holds in its last column the next chunk's first token; `seq.dat` the
first chunk of each training sequence, `doc_ids.dat` a document number for each chunk, `knn.dat`
[chunks, k] neighbour ids. The files are made for a fixed number of rows and end in zeros: how many
are in use stands in `processed-stats.json` alone, is given, or follows from the sizes. Here they
are opened read-only and never grow.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, write_atomically
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.table import NeighbourTable, check_ids

PAD = 0
_DTYPE = np.dtype("<i4")


@dataclass(frozen=True)
class RetroPytorchData:
    """What the files hold.

    Attributes:
        chunks: of all documents.
        sequences: the first chunk of each training sequence.
        table: neighbours; None where there is no knn file. Distances are not stored: 0.
    """

    chunks: Chunks
    sequences: Int[np.ndarray, " n"]
    table: NeighbourTable | None


def read_stats(path: Path | str) -> dict[str, int]:
    """`processed-stats.json`: numbers of chunks, docs and seqs (FolderError where it is none)."""
    path = Path(path)
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        return {name: int(stats[name]) for name in ("chunks", "docs", "seqs")}
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing: give the numbers of chunks and sequences") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} is no statistics of chunks ({error!r}): restore it") from error


def read_files(
    chunks: Path | str,
    doc_ids: Path | str,
    sequences: Path | str | None = None,
    knn: Path | str | None = None,
    *,
    stats: Mapping[str, int] | None = None,
    neighbours: int | None = None,
    size: int = 64,
) -> RetroPytorchData:
    """Map the files.

    Args:
        chunks, doc_ids, sequences, knn: the `.dat` files.
        stats: how many "chunks" and "seqs" are in use; None: as many as the zeros at the end leave.
        neighbours: columns of the knn file; None: from its size.
        size: tokens of a chunk, without the column for the next token.

    Raises:
        FolderError: a file is missing, empty, cut short, or of no whole number of rows.
        SettingError: neighbour ids are out of range.
    """
    rows = _matrix(chunks, size + 1)
    count = stats["chunks"] if stats else _used(rows)
    if count > len(rows):
        raise FolderError(f"{chunks} holds {len(rows):,} chunks, not {count:,}: it is cut short")
    if not count:
        raise FolderError(f"{chunks} holds no chunk: make it anew")
    rows = rows[:count]
    owner = _vector(doc_ids, count)
    if (np.diff(owner) < 0).any() or owner[0] < 0:
        raise FolderError(f"{doc_ids} is damaged: document numbers must not fall")
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    bounds = np.append(first, count)
    ends = (rows[bounds[1:] - 1, :size] != PAD).sum(1)
    stops = (np.diff(bounds) - 1) * size + ends
    made = Chunks(
        rows.reshape(-1), first * (size + 1), first * (size + 1) + stops, size, stride=size + 1
    )
    if len(made) != count:
        raise FolderError(f"{doc_ids} does not fit {chunks}: a document's last chunk is empty")
    begins = np.empty(0, np.int64)
    if sequences is not None:
        raw = _vector(sequences, stats["seqs"] if stats else None)
        used = len(raw) if stats else max(_used(raw[:, None]), 1)  # the first begins at chunk 0
        begins = np.asarray(raw[:used], np.int64)
    table = None if knn is None else _table(knn, made, neighbours)
    return RetroPytorchData(made, begins, table)


def _table(path: Path | str, chunks: Chunks, neighbours: int | None) -> NeighbourTable:
    data = _raw(path)
    if neighbours is None:
        neighbours, rest = divmod(len(data), len(chunks))
        if rest or not neighbours:
            raise FolderError(
                f"{path} holds {len(data):,} ids, no whole number for each of {len(chunks):,} "
                "chunks: say how many neighbours a chunk has"
            )
    ids = _matrix(path, neighbours)
    if len(ids) < len(chunks):
        raise FolderError(
            f"{path} holds {len(ids):,} rows for {len(chunks):,} chunks: it is cut short"
        )
    ids = np.asarray(ids[: len(chunks)], dtype=np.int64)
    check_ids(ids, len(chunks), str(path))
    record = {
        "chunk_size": chunks.size,
        "queries": chunks.digest,
        "database": chunks.digest,
        "method": "retro-pytorch",
    }
    return NeighbourTable(ids, np.where(ids < 0, np.inf, 0).astype(np.float32), record)


def write_files(
    folder: Path | str,
    chunks: Chunks,
    table: NeighbourTable | None = None,
    *,
    seq_len: int = 2048,
    neighbours: int = 2,
) -> dict[str, int]:
    """Write `train.chunks.dat`, `train.seq.dat`, `train.doc_ids.dat` and the statistics; and knn.

    Returns:
        The numbers of chunks, documents and sequences, as `text_folder_to_chunks_` gives them.

    Raises:
        SettingError: a sequence is no whole number of chunks, or a document holds token 0.
        FolderError: the disk fails.
    """
    if seq_len % chunks.size or seq_len < chunks.size:
        raise SettingError(f"seq_len {seq_len} must be a multiple of the chunk size {chunks.size}")
    read = chunks.rows(np.arange(len(chunks)), continuation=1)
    if (read == PAD).any():
        raise SettingError("a document holds token 0, which this format takes for padding")
    rows = np.where(read < 0, PAD, read)[:, : chunks.size + 1].astype(_DTYPE)
    counts = np.diff(chunks.first)
    counts = counts[counts > 0]
    owner = np.repeat(np.arange(len(counts)), counts).astype(_DTYPE)
    step = seq_len // chunks.size
    begins = np.cumsum(np.append(0, counts))
    spans = zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)
    sequences = [start for first, stop in spans for start in range(first, stop, step)]
    stats = {"chunks": len(chunks), "docs": len(counts), "seqs": len(sequences)}
    folder = Path(folder)
    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "train.chunks.dat", rows.tobytes())
        write_atomically(folder / "train.seq.dat", np.array(sequences, _DTYPE).tobytes())
        write_atomically(folder / "train.doc_ids.dat", owner.tobytes())
        if table is not None:
            table.check(chunks, chunks)
            ids = table.first(neighbours).astype(_DTYPE)
            write_atomically(folder / "train.chunks.knn.dat", ids.tobytes())
        write_atomically(folder / "processed-stats.json", json.dumps(stats).encode())
    return stats


def _raw(path: Path | str) -> np.ndarray:
    path = Path(path)
    try:
        bytes_held = path.stat().st_size
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing: restore it, or make it anew") from error
    if not bytes_held:
        raise FolderError(f"{path} is empty: make it anew")
    if bytes_held % _DTYPE.itemsize:
        raise FolderError(
            f"{path} has {bytes_held:,} bytes, no whole number of int32: it is cut short"
        )
    return np.memmap(path, dtype=_DTYPE, mode="r")


def _matrix(path: Path | str, columns: int) -> np.ndarray:
    data = _raw(path)
    if len(data) % columns:
        raise FolderError(
            f"{path} holds {len(data):,} numbers, no whole number of rows of {columns}: it is cut "
            "short, or of another chunk size"
        )
    return data.reshape(-1, columns)


def _vector(path: Path | str, count: int | None) -> Int[np.ndarray, " n"]:
    data = _raw(path)
    if count is not None and len(data) < count:
        raise FolderError(f"{path} holds {len(data):,} numbers, not {count:,}: it is cut short")
    return np.asarray(data[:count])


def _used(rows: Any) -> int:
    """Rows up to the last that is not all zeros, looked for from the end."""
    step = 1 << 16
    for stop in range(len(rows), 0, -step):
        start = max(stop - step, 0)
        used = np.flatnonzero(np.asarray(rows[start:stop]).any(1))
        if len(used):
            return start + int(used[-1]) + 1
    return 0
