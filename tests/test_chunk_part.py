"""Chunks as a part of a memory: what adding, removing, compacting and verifying make of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearest import Memory
from nearest.errors import FolderError, SettingError
from nearest.folder import ArrayFile
from nearest.retro.data import database as database_module
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.embedders import Embedder
from nearest.retro.data.stages import Ends, chunk_memory, make_table
from nearest.store import chunks as chunks_module
from nearest.store.parts.chunks import vectors_of
from nearest.store.records import ChunksRecord
from nearest.store.segment import Segment
from retro_data import M, database, documents, embedder, stored, tokenizer, words

TEXTS = documents(24, longest=30)


def counted() -> tuple[Embedder, list[str]]:
    """The tiny embedder, and the texts that it has read."""
    plain, seen = embedder(), list[str]()

    def encode(texts: list[str]) -> Any:
        seen.extend(texts)
        return plain._encode(texts)

    return Embedder(encode, plain.identity, plain.batch_size), seen


def completed(path: Path, spec: str = "exact") -> ChunkDatabase:
    made = ChunkDatabase.open(path)
    made.embed(embedder(), words)
    made.build_index(spec)
    return made


def equal(one: ChunkDatabase, other: ChunkDatabase) -> None:
    """The same chunks, vectors, and neighbours of everything."""
    assert one.chunks.digest == other.chunks.digest
    np.testing.assert_array_equal(one.embeddings, other.embeddings)
    queries = np.asarray(other.embeddings, np.float32)
    found, expected = one.index.search(queries, 5), other.index.search(queries, 5)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_a_life_of_chunks(tmp_path: Path) -> None:
    """Build, add, remove, compact: after each, as if it were built so at once."""
    database(tmp_path / "m", TEXTS[:10])
    memory = Memory.open(tmp_path / "m").add(None, tokenizer(), stored(TEXTS[10:16], first=10))
    partly = ChunkDatabase.open(memory)
    info = memory.info()["chunks"]
    assert info["without_vector"] == len(partly.chunks) - partly.chunks.first[10]
    for use in (lambda: partly.embedder, lambda: partly.index, lambda: make_table(partly)):
        with pytest.raises(FolderError, match=f"of {info['without_vector']} chunks: run `nearest"):
            use()
    counting, seen = counted()
    assert partly.embed(counting, words)
    assert len(seen) == info["without_vector"]  # and no more
    with pytest.raises(FolderError, match="not of all chunks: run `nearest retro index"):
        _ = partly.index
    partly.build_index("exact")
    equal(partly, database(tmp_path / "16", TEXTS[:16]))
    removed = memory.refresh().remove(["doc-3", "doc-12", "doc-0"])
    kept = [text for number, text in enumerate(TEXTS[:16]) if number not in (0, 3, 12)]
    fresh = database(tmp_path / "13", kept)
    equal(ChunkDatabase.open(removed), fresh)
    table = make_table(removed)
    compacted = removed.compact()
    assert len(compacted.segments) == 1
    equal(ChunkDatabase.open(compacted), fresh)
    table.check(ChunkDatabase.open(compacted).chunks, fresh.chunks)  # ids are what they were
    assert compacted.info()["chunks"]["without_vector"] == 0
    grown = compacted.add(None, tokenizer(), stored(TEXTS[16:], first=16))
    equal(completed(grown.path), database(tmp_path / "21", [*kept, *TEXTS[16:]]))
    assert Memory.open(grown.path).verify() == []


def test_vectors_are_written_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several segments, some of whose chunks have vectors, and some are gone."""
    monkeypatch.setattr(database_module, "BLOCK", 3)
    monkeypatch.setattr(chunks_module, "_BLOCK", 5)
    database(tmp_path / "m", TEXTS[:6])
    memory = Memory.open(tmp_path / "m").add(None, tokenizer(), stored(TEXTS[6:10], first=6))
    memory = memory.remove(["doc-2", "doc-7"]).add(None, tokenizer(), stored(TEXTS[10:], first=10))
    write, sizes = ArrayFile.write, list[int]()

    def noting(file: ArrayFile, first: int, rows: np.ndarray) -> None:
        sizes.append(len(rows))
        write(file, first, rows)

    monkeypatch.setattr(ArrayFile, "write", noting)
    own = ChunkDatabase.open(memory)
    assert own.embed(embedder(), words)
    assert max(sizes) == 5
    assert sum(sizes) == sum(segment.record.chunk_rows or 0 for segment in own.memory.segments)
    rows = own.chunks.rows(np.arange(len(own.chunks)))
    expected = embedder()([words(row[row >= 0].tolist()) for row in rows]).astype(np.float16)
    np.testing.assert_array_equal(own.embeddings, expected)


@pytest.mark.parametrize("spec", ["exact", "IVF4,Flat"])
def test_a_removed_document_is_found_no_more(spec: str, tmp_path: Path) -> None:
    database(tmp_path / "m", TEXTS[:12], indexed=False)
    own = completed(tmp_path / "m", spec)
    gone = np.asarray(own.embeddings[list(own.chunks.of_document(5))], np.float32)
    assert (own.index.search(gone, 1).distances < 1e-3).all()
    text = set(map(tuple, own.chunks.rows(np.asarray(own.chunks.of_document(5))).tolist()))

    def assert_gone(memory: Memory) -> None:
        left = ChunkDatabase.open(memory)
        found = left.index.search(gone, len(left.chunks))
        rows = left.chunks.rows(found.ids[found.ids >= 0])
        assert not text & set(map(tuple, rows.tolist()))
        there = left.chunks.document_of(found.ids[found.ids >= 0]).tolist()
        names = {left.chunks.name(number) for number in there}
        assert "doc-5" not in names
        table = make_table(left, left, memory.path.with_name(f"t{memory.manifest.version}"))
        assert not text & set(map(tuple, left.chunks.rows(table.ids).reshape(-1, M).tolist()))
        assert memory.verify() == []

    memory = own.memory.remove(["doc-5"])
    assert_gone(memory)
    memory = memory.compact()
    assert_gone(memory)
    memory = memory.add(None, tokenizer(), stored(TEXTS[12:15], first=12))
    assert_gone(completed(memory.path, spec).memory)


def test_an_updated_document_needs_new_vectors(tmp_path: Path) -> None:
    own = database(tmp_path / "m", TEXTS[:6])
    table = make_table(own)
    (new,) = stored([TEXTS[20]], first=2)
    memory = own.memory.update(None, tokenizer(), [new])
    changed = completed(memory.path)
    order = [0, 1, 3, 4, 5]
    equal(changed, database(tmp_path / "n", [*(TEXTS[number] for number in order), TEXTS[20]]))
    with pytest.raises(SettingError, match="changed since"):
        table.check(changed.chunks, changed.chunks)
    with pytest.raises(FolderError, match="made otherwise"):
        make_table(changed)  # the old one lies there


def test_small_segments_that_are_merged_keep_their_vectors(tmp_path: Path) -> None:
    memory = database(tmp_path / "m", TEXTS[:4]).memory
    for number in range(4, 10):
        memory = memory.add(None, tokenizer(), stored([TEXTS[number]], first=number))
        if number == 5:
            completed(memory.path)
    assert len(memory.segments) < 7
    last = ChunkDatabase.open(memory)
    known = int(last.chunks.first[6])
    assert last.vectors.missing.tolist() == list(range(known, len(last.chunks)))
    equal(completed(memory.path), database(tmp_path / "n", TEXTS[:10]))


def test_vectors_of_documents_that_changed_meanwhile_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = database(tmp_path / "m", TEXTS[:6], indexed=False)
    own.memory.remove(["doc-1"])
    with pytest.raises(FolderError, match="has changed since"):
        own.embed(embedder(), words)
    with pytest.raises(FolderError, match="begun with other chunks"):
        ChunkDatabase.open(own.path).embed(embedder(), words)
    assert Memory.open(own.path).verify() == []
    monkeypatch.setattr(database_module, "BLOCK", 3)


def test_how_documents_are_cut_can_be_changed_before_they_are_embedded(tmp_path: Path) -> None:
    made = database(tmp_path / "m", TEXTS[:5], indexed=False)
    again = chunk_memory(made.path, 6, Ends(start=1, end=0))
    rows = again.chunks.rows(np.asarray(again.chunks.of_document(2)))
    assert rows[rows >= 0].tolist() == [1, *TEXTS[2], 0]
    assert len(again.chunks) == sum(-(-(len(text) + 2) // 6) for text in TEXTS[:5])
    number = again.memory.manifest.version
    assert chunk_memory(made.path, 6, Ends(1, 0)).memory.manifest.version == number
    with pytest.raises(SettingError, match="at least 2"):
        chunk_memory(made.path, 1)


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    own = database(tmp_path / "m", documents(30, longest=30), indexed=False)
    completed(own.path, "IVF4,Flat")
    assert Memory.open(own.path).verify() == []
    for name, message in (("vectors.npy", "vectors.npy differs"), ("index.faiss", "faiss differs")):
        (path,) = own.path.glob(f"segments/*/*chunks.{name}")
        whole = path.read_bytes()
        path.write_bytes(whole[:-4] + b"\1\2\3\4")
        (problem,) = Memory.open(own.path).verify()
        assert message in problem
        path.write_bytes(whole)


@pytest.mark.parametrize("spec", ["exact", "IVF4,Flat"])
def test_verify_finds_a_search_that_ignores_what_was_removed(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database(tmp_path / "m", TEXTS[:12], indexed=False)
    memory = completed(tmp_path / "m", spec).memory.remove(["doc-5"])
    assert memory.verify() == []

    def all_rows(segment: Segment, chunks: ChunksRecord) -> np.ndarray:
        return np.arange(len(vectors_of(segment, chunks)))

    monkeypatch.setattr("nearest.store.chunks.left_rows", all_rows)
    (problem,) = Memory.open(memory.path).verify()
    assert "the chunks leads to a document that was removed" in problem


def test_a_memory_with_keys_has_chunks_as_well(
    tmp_path: Path, tiny_memory: Memory, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    texts = [tiny_memory.document(number) for number in range(tiny_memory.documents)]
    options = {"keys": "fp16", "tune": False}
    memory = Memory.build(tiny_model, tiny_tokenizer, texts[:3], tmp_path / "m", **options)
    own = chunk_memory(memory, 16)
    own.embed(embedder(), words)
    own.build_index()
    for number in range(3):
        tokens = own.chunks.document_tokens(number)
        np.testing.assert_array_equal(tokens, memory.document_tokens(number)[1:])
    grown = own.memory.add(tiny_model, tiny_tokenizer, texts[3:4]).remove([texts[0].id]).compact()
    assert len(ChunkDatabase.open(grown).vectors.missing) > 0
    assert grown.verify() == []
    queries = memory.keys.rows(memory.valued_entries()[:4])
    assert (grown.search(queries, 3).ids >= 0).all()
