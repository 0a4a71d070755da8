"""The files of both public implementations, read and written."""

import json
from pathlib import Path

import numpy as np
import pytest

from nearest.errors import FolderError, SettingError
from nearest.retro.data import norlund, retro_pytorch
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.table import NeighbourTable
from retro_data import documents

M = 4
TEXTS = documents(6, longest=14)


def table_for(queries: Chunks, database: Chunks, saved: int = 3) -> NeighbourTable:
    random = np.random.default_rng(1)
    ids = random.integers(-1, len(database), (len(queries), saved))
    record = {"chunk_size": M, "queries": queries.digest, "database": database.digest}
    return NeighbourTable(ids, np.where(ids < 0, np.inf, 0).astype(np.float32), record)


def write_shard(folder: Path, name: str, texts: list[list[int]]) -> dict[str, str]:
    """As tokenize_and_chunk.py does: padded with 0, a document a row of first chunks."""
    rows, first, owner = [], [], []
    for number, text in enumerate(texts):
        first.append(len(rows))
        for start in range(0, len(text), M):
            row = text[start : start + M]
            rows.append(row + [0] * (M - len(row)))
            owner.append(number)
    arrays = {
        "chunks": np.array(rows, np.uint16),
        "seq2chunk": np.array(first, np.int64),
        "chunk2seq": np.array(owner, np.int32),
    }
    for kind, array in arrays.items():
        np.save(folder / f"{name}.{kind}.npy", array)
    return {kind: f"{name}.{kind}.npy" for kind in arrays}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """Two shards of queries, and an index spec of two in a folder beside them."""
    data, index = tmp_path / "data", tmp_path / "index"
    data.mkdir()
    index.mkdir()
    shards = [write_shard(data, "a", TEXTS[:1]), write_shard(data, "b", TEXTS[1:3])]
    for shard, texts in zip(shards, (TEXTS[:1], TEXTS[1:3]), strict=True):
        rows = len(Chunks.of(texts, M))
        shard["neighbours"] = shard["chunks"].replace("chunks", "neighbours")
        ids = np.arange(rows * 3).reshape(rows, 3) % 5 - 1
        np.save(data / shard["neighbours"], ids.astype(np.int64))
    listed = [write_shard(index, "c", TEXTS[3:5]), write_shard(index, "d", TEXTS[5:])]
    (index / "index.spec.json").write_text(json.dumps(listed))
    neighbours = {"faiss_index": "x.index", "index_spec": "../index/index.spec.json"}
    (data / "data.spec.json").write_text(json.dumps({"shards": shards, "neighbours": neighbours}))
    return data / "data.spec.json"


@pytest.mark.parametrize("spelling", ["list", "shards"])
def test_specs_of_several_shards_in_other_folders(spelling: str, spec: Path) -> None:
    index = spec.parent.parent / "index" / "index.spec.json"
    if spelling == "shards":
        index.write_text(json.dumps({"shards": json.loads(index.read_text())}))
    read = norlund.read_spec(spec)
    assert read.chunks.digest == Chunks.of(TEXTS[:3], M).digest
    assert read.database.digest == Chunks.of(TEXTS[3:], M).digest
    assert len(read.table) == len(read.chunks)
    first = len(Chunks.of(TEXTS[:1], M))
    assert read.table.ids[0].tolist() == read.table.ids[first].tolist() == [-1, 0, 1]
    read.table.check(read.chunks, read.database)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_written_is_read(own: bool, tmp_path: Path) -> None:
    database = Chunks.of(TEXTS, M)
    chunks = database if own else Chunks.of(TEXTS[:2], M)
    table = table_for(chunks, database)
    vectors = np.random.default_rng(0).normal(size=(len(database), 5)).astype(np.float16)
    path = norlund.write_spec(tmp_path, chunks, database, table, embeddings=vectors, neighbours=3)
    read = norlund.read_spec(path)
    assert read.chunks.digest == chunks.digest
    assert read.database.digest == database.digest
    np.testing.assert_array_equal(read.table.ids, table.ids)
    np.testing.assert_array_equal(norlund.read_embeddings(tmp_path / "index.spec.json")[0], vectors)
    shard = json.loads(path.read_text())["shards"][0]
    stored = np.load(tmp_path / shard["chunks"])
    assert stored.dtype == np.uint16
    assert np.load(tmp_path / shard["seq2chunk"]).dtype == np.int64
    assert np.load(tmp_path / shard["chunk2seq"]).dtype == np.int32
    assert np.load(tmp_path / shard["chunk2seq"]).tolist() == (
        chunks.document_of(np.arange(len(chunks))).tolist()
    )


def test_tokens_that_the_format_cannot_hold(tmp_path: Path) -> None:
    for text, message in (([70_000], "65,536"), ([5, 0], "padding")):
        chunks = Chunks.of([text], M)
        with pytest.raises(SettingError, match=message):
            norlund.write_spec(tmp_path, chunks, chunks, table_for(chunks, chunks), neighbours=1)


def break_spec(spec: Path, how: str) -> None:
    content = json.loads(spec.read_text())
    shard = content["shards"][0]
    ids = np.load(spec.parent / shard["neighbours"])
    if how == "missing":
        (spec.parent / shard["chunks"]).unlink()
    elif how == "ids":
        np.save(spec.parent / shard["neighbours"], ids + 1000)
    elif how == "rows":
        np.save(spec.parent / shard["neighbours"], ids[:-1])
    elif how == "documents":
        np.save(spec.parent / shard["seq2chunk"], np.array([0, 99]))
    elif how == "empty":
        (spec.parent / shard["chunks"]).write_bytes(b"")
    elif how == "unnamed":
        del shard["chunk2seq"], shard["seq2chunk"]
    elif how == "keys":
        del content["neighbours"]
    elif how == "json":
        spec.write_text("{")
        return
    spec.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", r"a\.chunks\.npy.*is missing"),
        ("ids", r"neighbours\.npy has ids"),
        ("rows", "one row each"),
        ("documents", "seq2chunk"),
        ("empty", r"a\.chunks\.npy is damaged"),
        ("unnamed", "'seq2chunk'"),
        ("keys", "neighbours"),
        ("json", "JSON"),
    ],
)
def test_broken_specs(how: str, named: str, spec: Path) -> None:
    break_spec(spec, how)
    with pytest.raises((FolderError, SettingError), match=named):
        norlund.read_spec(spec)


def test_an_index_spec_whose_embeddings_are_missing(spec: Path) -> None:
    index = spec.parent.parent / "index" / "index.spec.json"
    with pytest.raises(FolderError, match="'embeddings'"):
        norlund.read_embeddings(index)
    shards = json.loads(index.read_text())
    shards[0]["embeddings"] = "gone.npy"
    index.write_text(json.dumps(shards))
    with pytest.raises(FolderError, match=r"gone\.npy"):
        norlund.read_embeddings(index)
    with pytest.raises(FolderError, match="missing"):
        norlund.read_index_spec(spec.parent / "none.json")


def dat_files(folder: Path, texts: list[list[int]], room: int) -> dict[str, int]:
    """As text_folder_to_chunks_ does: of a fixed size, zeros after what is used."""
    chunks = np.zeros((room, M + 1), np.int32)
    owner, sequences = np.zeros(room, np.int32), np.zeros(room, np.int32)
    count = seqs = 0
    for number, text in enumerate(texts):
        first = count
        for start in range(0, len(text), M):
            row = text[start : start + M + 1]
            chunks[count, : len(row)] = row
            owner[count] = number
            count += 1
        for start in range(first, count, 2):
            sequences[seqs] = start
            seqs += 1
    for name, array in (("chunks", chunks), ("doc_ids", owner), ("seq", sequences)):
        (folder / f"train.{name}.dat").write_bytes(array.tobytes())
    return {"chunks": count, "docs": len(texts), "seqs": seqs}


def paths(folder: Path) -> dict[str, Path]:
    return {
        "chunks": folder / "train.chunks.dat",
        "doc_ids": folder / "train.doc_ids.dat",
        "sequences": folder / "train.seq.dat",
    }


@pytest.mark.parametrize("told", [True, False])
def test_raw_files_longer_than_what_is_used(told: bool, tmp_path: Path) -> None:
    texts = [*TEXTS, list(range(2, 2 + 2 * M))]  # one that ends with its chunk
    stats = dat_files(tmp_path, texts, room=100)
    sizes = {path: path.stat().st_size for path in paths(tmp_path).values()}
    for path in sizes:
        path.chmod(0o400)
    if told:
        (tmp_path / "stats.json").write_text(json.dumps(stats))
        stats = retro_pytorch.read_stats(tmp_path / "stats.json")
    read = retro_pytorch.read_files(**paths(tmp_path), stats=stats if told else None, size=M)
    expected = Chunks.of(texts, M)
    assert read.chunks.digest == expected.digest
    ids = np.arange(len(expected))
    np.testing.assert_array_equal(read.chunks.rows(ids, 2), expected.rows(ids, 2))
    assert len(read.sequences) == stats["seqs"]
    assert sizes == {path: path.stat().st_size for path in sizes}


def test_raw_files_that_are_written_are_read(tmp_path: Path) -> None:
    chunks = Chunks.of(TEXTS, M)
    table = table_for(chunks, chunks)
    stats = retro_pytorch.write_files(tmp_path, chunks, table, seq_len=2 * M, neighbours=3)
    assert retro_pytorch.read_stats(tmp_path / "processed-stats.json") == stats
    knn = tmp_path / "train.chunks.knn.dat"
    for told in (None, 3):
        read = retro_pytorch.read_files(
            **paths(tmp_path), knn=knn, stats=stats, neighbours=told, size=M
        )
        np.testing.assert_array_equal(read.table.ids, table.ids)
    other = tmp_path / "other"
    other.mkdir()
    assert dat_files(other, TEXTS, room=stats["chunks"]) == stats
    for name in ("chunks", "doc_ids"):
        one, two = (folder / f"train.{name}.dat" for folder in (tmp_path, other))
        assert one.read_bytes() == two.read_bytes()
    with pytest.raises(SettingError, match="seq_len"):
        retro_pytorch.write_files(tmp_path, chunks, seq_len=M + 1)
    with pytest.raises(SettingError, match="token 0"):
        retro_pytorch.write_files(tmp_path, Chunks.of([[0]], M), seq_len=M)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 7, "int32"),
        (b"\1\0\0\0" * (M + 2), "whole number of rows"),
        (b"\0" * 4 * (M + 1), "no chunk"),
        (b"\1\0\0\0" * (M + 1), "cut short"),
    ],
)
def test_broken_raw_files(data: bytes, message: str, tmp_path: Path) -> None:
    stats = dat_files(tmp_path, TEXTS, room=30)
    (tmp_path / "train.chunks.dat").write_bytes(data)
    stats = None if message == "no chunk" else stats
    with pytest.raises(FolderError, match=message):
        retro_pytorch.read_files(**paths(tmp_path), stats=stats, size=M)


def test_broken_tables_and_document_numbers(tmp_path: Path) -> None:
    chunks = Chunks.of(TEXTS, M)
    stats = retro_pytorch.write_files(tmp_path, chunks, seq_len=2 * M)
    knn = tmp_path / "knn.dat"
    for ids, message in (
        (np.zeros(len(chunks) * 2 + 1, np.int32), "whole number"),
        (np.full(len(chunks) * 2, len(chunks), np.int32), "another one"),
    ):
        knn.write_bytes(ids.tobytes())
        with pytest.raises((FolderError, SettingError), match=message):
            retro_pytorch.read_files(**paths(tmp_path), knn=knn, stats=stats, size=M)
    owner = tmp_path / "train.doc_ids.dat"
    owner.write_bytes(owner.read_bytes()[::-1])
    with pytest.raises(FolderError, match="must not fall"):
        retro_pytorch.read_files(**paths(tmp_path), stats=stats, size=M)
    with pytest.raises(FolderError, match="is missing"):
        retro_pytorch.read_stats(tmp_path / "none.json")
