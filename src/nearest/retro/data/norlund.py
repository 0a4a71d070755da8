"""The files of the norlund code (arXiv:2302.12128): specs of shards of `.npy` arrays, both ways.

A shard is `chunks` [n, m], padded with 0 at each document's end, `seq2chunk` (the first chunk of
each document), and `chunk2seq`; neighbour ids count through the shards of the index spec. Paths are
relative to the spec that names them; of an index spec in another folder, to that one's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, write_atomically
from nearest.retro.data.chunks import Chunks, joined
from nearest.retro.data.folders import read_array, save_array
from nearest.retro.data.table import NeighbourTable, check_ids

PAD = 0
_LARGEST = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class NorlundData:
    """What a data spec names.

    Attributes:
        chunks: of all its shards, in their order.
        database: of all shards of its index spec.
        table: neighbours of the chunks; distances are not stored and read as 0.
        faiss_index: the file that is named, which may be missing.
    """

    chunks: Chunks
    database: Chunks
    table: NeighbourTable
    faiss_index: Path


def read_index_spec(path: Path | str) -> list[dict[str, Path]]:
    """The files of each shard, in either spelling: a list, or {"shards": […]}.

    Raises:
        FolderError: it is no such file.
    """
    path = Path(path)
    content = _read_json(path)
    shards = content.get("shards") if isinstance(content, dict) else content
    if not isinstance(shards, list) or not shards or not all(isinstance(s, dict) for s in shards):
        raise FolderError(f"{path} is no index spec: it should list shards of files")
    return [
        {name: path.parent / file for name, file in shard.items() if isinstance(file, str)}
        for shard in shards
    ]


def read_shard(files: dict[str, Path], spec: Path | str, pad: int = PAD) -> Chunks:
    """The chunks of one shard (FolderError where a file is missing, damaged, or does not fit)."""
    chunks = _array(files, "chunks", spec)
    first = np.asarray(_array(files, "seq2chunk", spec), dtype=np.int64)
    if chunks.ndim != 2 or chunks.dtype.kind not in "iu":
        raise FolderError(
            f"{files['chunks']} has the shape {chunks.shape} and dtype {chunks.dtype}: chunks are "
            "whole numbers, (chunks, m)"
        )
    bounds = np.append(first, len(chunks))
    if len(first) == 0 or first[0] != 0 or (np.diff(bounds) < 1).any():
        raise FolderError(
            f"{files['seq2chunk']} does not fit {files['chunks']}: first chunks of documents must "
            f"rise from 0 to below {len(chunks)}"
        )
    ends = (chunks[bounds[1:] - 1] != pad).sum(1)
    size = chunks.shape[1]
    starts = first * size
    stops = (bounds[1:] - 1) * size + ends
    return Chunks(chunks.reshape(-1), starts, stops, size)


def read_embeddings(spec: Path | str) -> list[Float[np.ndarray, "n dim"]]:
    """The vectors of each shard, mapped (FolderError names a missing file)."""
    return [_array(files, "embeddings", spec) for files in read_index_spec(spec)]


def read_spec(path: Path | str, pad: int = PAD) -> NorlundData:
    """What a data spec names, checked.

    Raises:
        FolderError: a file is missing, damaged, or does not fit the others.
        SettingError: neighbour ids are out of the database, or chunks differ in size.
    """
    path = Path(path)
    content = _read_json(path)
    try:
        shards, neighbours = content["shards"], content["neighbours"]
        index_spec = path.parent / neighbours["index_spec"]
        faiss_index = path.parent / neighbours.get("faiss_index", "")
        files = [{name: path.parent / file for name, file in shard.items()} for shard in shards]
    except (KeyError, TypeError, AttributeError) as error:
        raise FolderError(
            f"{path} is no data spec ({error!r} is missing): it should have 'shards' and "
            "'neighbours' with an 'index_spec'"
        ) from error
    if not files:
        raise FolderError(f"{path} lists no shard")
    parts = [read_shard(shard, path, pad) for shard in files]
    database = joined([read_shard(shard, index_spec, pad) for shard in read_index_spec(index_spec)])
    arrays = [_array(shard, "neighbours", path) for shard in files]
    for part, array, shard in zip(parts, arrays, files, strict=True):
        if array.ndim != 2 or len(array) != len(part):
            raise FolderError(
                f"{shard['neighbours']} has the shape {array.shape} for {len(part)} chunks: one "
                "row each"
            )
        check_ids(array, len(database), str(shard["neighbours"]))
    fewest = min(array.shape[1] for array in arrays)
    ids = np.concatenate([np.asarray(array[:, :fewest], dtype=np.int64) for array in arrays])
    chunks = joined(parts)
    record = {
        "chunk_size": chunks.size,
        "queries": chunks.digest,
        "database": database.digest,
        "method": "norlund",
    }
    table = NeighbourTable(ids, np.where(ids < 0, np.inf, 0).astype(np.float32), record)
    return NorlundData(chunks, database, table, faiss_index)


def write_spec(
    folder: Path | str,
    chunks: Chunks,
    database: Chunks,
    table: NeighbourTable,
    *,
    embeddings: Float[np.ndarray, "n dim"] | None = None,
    faiss_index: str = "index.faiss",
    neighbours: int = 4,
    pad: int = PAD,
) -> Path:
    """Write what the norlund code reads: a shard of queries, one of the database, and both specs.

    A table of a database for its own chunks gives one shard, which both specs name.

    Args:
        folder: is made; files of these names are replaced.
        chunks, database, table: the corpus, what is searched, and the neighbours of one in other.
        embeddings: of the database; written where they are given, and named in any case.
        faiss_index: the name of the index file, which is only named.
        neighbours: columns written.
        pad: the padding token, which no document may hold.

    Returns:
        The data spec.

    Raises:
        SettingError: a token does not fit uint16, or is the padding token.
        FolderError: the disk fails.
    """
    folder = Path(folder)
    table.check(chunks, database)
    same = chunks.digest == database.digest
    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        index_shard = _write_shard(folder, "train" if same else "database", database, pad)
        index_shard["embeddings"] = "embeddings.npy"
        if embeddings is not None:
            save_array(folder / "embeddings.npy", np.asarray(embeddings, np.float16))
        shard = dict(index_shard) if same else _write_shard(folder, "queries", chunks, pad)
        shard.pop("embeddings", None)
        shard["neighbours"] = "neighbours.npy"
        save_array(folder / "neighbours.npy", np.ascontiguousarray(table.first(neighbours)))
        write_atomically(folder / "index.spec.json", json.dumps([index_shard], indent=2).encode())
        data = {
            "shards": [shard],
            "neighbours": {"faiss_index": faiss_index, "index_spec": "index.spec.json"},
        }
        write_atomically(folder / "data.spec.json", json.dumps(data, indent=2).encode())
    return folder / "data.spec.json"


def _write_shard(folder: Path, name: str, chunks: Chunks, pad: int) -> dict[str, str]:
    rows = chunks.rows(np.arange(len(chunks)))
    if rows.max(initial=0) > _LARGEST:
        raise SettingError(
            f"token {rows.max()} does not fit the two bytes that this format has for one: it "
            "holds vocabularies of up to 65,536 tokens"
        )
    if (rows == pad).any():
        raise SettingError(
            f"a document holds the padding token {pad}, which this format cannot tell from padding"
        )
    held = np.diff(chunks.first) > 0
    first = chunks.first[:-1][held]
    owner = np.repeat(np.arange(len(first)), np.diff(chunks.first)[held])
    files = {
        "chunks": f"{name}.chunks.npy",
        "seq2chunk": f"{name}.seq2chunk.npy",
        "chunk2seq": f"{name}.chunk2seq.npy",
    }
    save_array(folder / files["chunks"], np.where(rows < 0, pad, rows).astype(np.uint16))
    save_array(folder / files["seq2chunk"], first.astype(np.int64))
    save_array(folder / files["chunk2seq"], owner.astype(np.int32))
    return files


def _array(files: dict[str, Path], name: str, spec: Path | str) -> Shaped[np.ndarray, "..."]:
    if name not in files:
        raise FolderError(f"{spec} names no {name!r} file in one of its shards: add it")
    if not files[name].exists():
        raise FolderError(f"{files[name]}, which {spec} names, is missing: restore it, or make it")
    return read_array(files[name])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} is missing: give a spec file") from error
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read as JSON ({error}): restore it") from error
