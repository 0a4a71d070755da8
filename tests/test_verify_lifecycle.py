"""What verify and opening say of memories that have lived: removed documents, ids, indexes."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import nearest.store.documents
from conftest import random_documents
from folders import Build, copied, replaced
from nearest import Document, Memory
from nearest.build.cluster import KMeans, cluster_memory
from nearest.corpus.unique import id_hash
from nearest.errors import CorpusError, FolderError
from nearest.folder import sha256_of
from nearest.store.documents import DocumentWriter
from nearest.store.parts import PARTS
from nearest.store.segment import Segment
from nearest.store.verify import verify

DOCUMENTS = random_documents()
SEGMENT = "segments/000001"


@pytest.fixture(scope="module")
def lived(
    build_memory: Build, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    memory = build_memory(tiny_model, DOCUMENTS[:5], index="IVF4,Flat", recall=1.0)
    cluster_memory(memory.path, KMeans(10))
    memory.refresh().add(tiny_model, tiny_tokenizer, DOCUMENTS[5:7]).remove(["doc-1", "doc-3"])
    return memory.path


@pytest.fixture
def folder(lived: Path, tmp_path: Path) -> Path:
    return copied(lived, tmp_path)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (f"{SEGMENT}/ids.npy", lambda ids: ids[::-1].copy(), "cannot be found by its id"),
        (f"{SEGMENT}/g000004.removed.npy", lambda r: r[::-1].copy(), "do not rise"),
        (f"{SEGMENT}/g000004.removed.npy", lambda r: r + 3, "lie outside 0 to 4"),
    ],
)
def test_verify_checks_what_the_files_say(
    folder: Path, place: str, change: object, message: str
) -> None:
    assert verify(folder) == []
    replaced(folder, place, change(np.load(folder / place)))
    assert message in "; ".join(verify(folder))


def test_verify_finds_an_id_in_two_segments(folder: Path) -> None:
    store = zstandard.ZstdCompressor().compress(
        b"".join(
            json.dumps({"id": d.id, "text": d.text, "metadata": {}}).encode() + b"\n"
            for d in (DOCUMENTS[0], DOCUMENTS[6])
        )
    )
    replaced(folder, "segments/000002/documents.jsonl.zst", store)
    hashes = np.array([id_hash(d.id) for d in (DOCUMENTS[0], DOCUMENTS[6])], np.uint64)
    replaced(folder, "segments/000002/ids.npy", hashes)
    assert "a document id stands twice" in "; ".join(verify(folder))


def test_verify_measures_the_recall(
    folder: Path, build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    """An index of as many vectors that are not the keys."""
    other = build_memory(tiny_model, DOCUMENTS[:5], index="IVF4,Flat", key_layer="last_hidden")
    replaced(folder, f"{SEGMENT}/index.faiss", (other.path / SEGMENT / "index.faiss").read_bytes())
    assert "of the nearest entries, 100% when it was built" in "; ".join(verify(folder))


def test_a_reader_that_ignores_what_was_removed_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check goes by the removed documents themselves, not by the mask that readers apply."""
    assert verify(folder) == []

    def ignored(segment: Segment) -> np.ndarray:
        return np.ones(segment.record.tokens, dtype=bool)

    monkeypatch.setattr(Segment, "alive", property(ignored))
    found = "; ".join(verify(folder))
    for part in PARTS:
        if part.name == "chunks":  # this memory has none, and no mask of tokens decides about them
            continue
        assert f"segment 000001: the {part.name} leads to a document that was removed" in found


def test_a_document_that_is_back_after_its_replacement_is_found(
    build_memory: Build, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """`removed.npy`, its checksum forged, names another document than the one replaced."""
    memory = build_memory(tiny_model, DOCUMENTS)
    memory = memory.update(tiny_model, tiny_tokenizer, [Document(DOCUMENTS[0].id, "a b c")])
    record = memory.manifest.segments[0].files["removed"]
    replaced(memory.path, record.path, np.array([1]))
    assert "a document id stands twice" in "; ".join(verify(memory.path))


# --- bounded decompression ------------------------------------------------------------------------


def test_a_frame_that_says_no_size_is_refused(folder: Path) -> None:
    lines = zstandard.ZstdDecompressor().decompress(
        (folder / SEGMENT / "documents.jsonl.zst").read_bytes()
    )
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(lines)
    replaced(folder, f"{SEGMENT}/documents.jsonl.zst", silent)
    with pytest.raises(FolderError, match="a frame does not say its size"):
        Memory.open(folder).document(0)


def test_a_frame_that_is_too_large_is_refused_and_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest.store.documents, "_LARGEST_FRAME", 200)
    with pytest.raises(FolderError, match="or says one that no writer makes"):
        Memory.open(folder).document(0)
    with (
        DocumentWriter(tmp_path / "d.zst", tmp_path / "frames.npy") as writer,
        pytest.raises(CorpusError, match=r"document 'long' in .* is longer than a gigabyte"),
    ):
        writer.append(Document("long", "x" * 201))


def test_a_file_that_the_disk_cannot_read_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> str:
        if path.name == "tokens.npy":
            raise OSError(errno.EIO, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr("nearest.store.verify.sha256_of", fails)
    problems = verify(folder)
    assert problems[:1] == ["segments/000001/tokens.npy cannot be read (Input/output error)"]
