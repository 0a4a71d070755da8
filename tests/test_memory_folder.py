"""The memory folder: what is written, what is found damaged, and what an interruption leaves."""

import errno
import io
import itertools
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import nearest.store.documents
import nearest.store.manifest
import nearest.store.opening
from conftest import FULL, call_fails, edit_manifest, in_two_segments, make_documents, snapshot
from folders import Build, copied, files, flipped, found_by_verify, kill_writers, place_of, replaced
from nearest import Document, Memory, NearestError, __version__
from nearest.build.build import store_settings
from nearest.build.index import rebuild_index
from nearest.corpus.report import CorpusWarning
from nearest.corpus.windows import windows
from nearest.encode.fingerprint import model_fingerprint, tokenizer_fingerprint
from nearest.errors import CorpusError, FolderError, SettingError
from nearest.folder import ArrayFile, open_array, sha256_of, writer_lock
from nearest.index.approximate import ApproximateIndex
from nearest.index.faiss_module import load_faiss
from nearest.store.documents import DocumentReader, DocumentWriter
from nearest.store.manifest import FORMAT, Manifest, read_manifest
from nearest.store.parts.index import IndexChoice
from nearest.store.verify import verify
from oracle import keys_and_logits

DIM = 32
VOCABULARY = 258
IVF = "IVF4,SQ8"
SEGMENT = "segments/000001"
FILES = {
    "tokens": f"{SEGMENT}/tokens.npy",
    "offsets": f"{SEGMENT}/offsets.npy",
    "documents": f"{SEGMENT}/documents.jsonl.zst",
    "frames": f"{SEGMENT}/frames.npy",
    "ids": f"{SEGMENT}/ids.npy",
    "suffixes": f"{SEGMENT}/suffix.npy",
    "keys": f"{SEGMENT}/keys.npy",
}
INDEX = f"{SEGMENT}/index.faiss"
DOCUMENTS = [
    *make_documents(12, 30),
    Document("one letter", "x", {"nested": {"a": [1, None]}}),
    Document("long", "a rule and its exceptions, " * 60, {}),
    Document("unusual", "ä\n\r\n\u2028\x85\0\t“quoted” \\n 😀", {"title": "“ä\n”"}),
]

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def exact(build_memory: Build, tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, DOCUMENTS)


@pytest.fixture(scope="module")
def approximate(build_memory: Build, tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, DOCUMENTS, index=IVF)


@pytest.fixture
def folder(approximate: Memory, tmp_path: Path) -> Path:
    """A copy, to be damaged, of a memory that has every kind of file."""
    return copied(approximate.path, tmp_path)


def replace_file(folder: Path, kind: str, data: bytes | np.ndarray) -> None:
    """Write another file of a segment, as if it had been built so."""
    replaced(folder, INDEX if kind == "index" else FILES[kind], data)


def refusal(call: Callable[..., Any], *args: Any) -> str | None:
    """The message of the FolderError that a call raises, if it does; other errors pass."""
    try:
        call(*args)
    except FolderError as error:
        return str(error)
    return None


def queries_of(memory: Memory, count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).normal(scale=3, size=(count, DIM)).astype(np.float32)


def valued_entries(memory: Memory) -> list[int]:
    """Entries with a successor in their document, counted by hand."""
    entries, first = [], 0
    for number in range(memory.documents):
        length = len(memory.document_tokens(number))
        entries += range(first, first + length - 1)
        first += length
    return entries


# --- what a build writes --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_the_manifest_describes_everything_that_was_built(
    request: pytest.FixtureRequest,
    kind: str,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    memory: Memory = request.getfixturevalue(kind)
    manifest = json.loads((memory.path / "manifest.json").read_bytes())
    tokens = sum(1 + len(d.text.encode()) for d in DOCUMENTS)  # one token a byte
    indexes = {"index": INDEX, "trained": f"{SEGMENT}/trained.faiss"}
    live = {**FILES, **(indexes if kind == "approximate" else {})}
    assert files(memory.path) == {
        "manifest.json",
        *live.values(),
    }
    records = {
        name: {
            "path": path,
            "size": (memory.path / path).stat().st_size,
            "sha256": sha256_of(memory.path / path),
        }
        for name, path in live.items()
    }
    assert (manifest["format"], manifest["generation"]) == (FORMAT, 1)
    assert manifest["created_by"] == f"nearest {__version__}"
    assert (manifest["settings"], manifest["clusters"]) == ({}, None)
    assert (
        manifest["model"].items()
        >= {
            "fingerprint": model_fingerprint(tiny_model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tiny_tokenizer),
            "vocab_size": VOCABULARY,
            "start_token": 0,
        }.items()
    )
    assert manifest["keys"] == {
        "layer": "last_ffn_input",
        "module": "transformer.h.1.mlp.c_fc",
        "dim": DIM,
        "format": "fp16",
        "metric": "l2",
        "window": 64,
        "stride": 32,
        "projection": None,
        "codebooks": None,
        "index": "auto" if kind == "exact" else IVF,
        "dtype": "float32",
    }
    (segment,) = manifest["segments"]
    index = segment.pop("index")
    assert segment == {
        "name": "000001",
        "tokens": tokens,
        "documents": len(DOCUMENTS),
        "entries": tokens - len(DOCUMENTS),
        "frames": 1,
        "files": {name: records[name] for name in FILES},
        "kept": None,
        "members": None,
        "removed": 0,
        "made_on": {
            "device": "cpu",
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "simd": torch.backends.cpu.get_cpu_capability(),
            "batch_size": 32,
        },
    }
    assert index["entries"] == segment["entries"]
    assert index["spec"] == ("exact" if kind == "exact" else IVF)
    assert index["file"] == records.get("index")
    assert index["recall_target"] == 0.95
    assert 0 <= index["recall"] <= 1
    assert (memory.tokens, memory.entries, memory.documents) == (
        tokens,
        tokens - len(DOCUMENTS),
        len(DOCUMENTS),
    )


def test_a_model_without_a_name_is_not_named_after_the_working_folder(exact: Memory) -> None:
    assert exact.manifest.model.name == ""


def test_documents_and_tokens_come_back(
    exact: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for number, document in enumerate(DOCUMENTS):
        found = exact.document(number)
        assert (found.id, found.text, found.metadata) == (
            document.id,
            document.text,
            document.metadata,
        )
        ids = tiny_tokenizer.encode(document.text, add_special_tokens=False)
        assert exact.document_tokens(number).tolist() == [0, *ids]
    for number in (-1, len(DOCUMENTS)):
        with pytest.raises(IndexError, match=f"document {number} is outside"):
            exact.document(number)
        with pytest.raises(IndexError, match=f"document {number} is outside"):
            exact.document_tokens(number)


def test_every_entry_has_its_place_and_value(exact: Memory) -> None:
    entry = 0
    for number in range(len(DOCUMENTS)):
        tokens = exact.document_tokens(number)
        for position in range(len(tokens)):
            assert exact.place(entry) == (number, position)
            if position + 1 < len(tokens):
                assert exact.values(np.array([entry])).tolist() == [tokens[position + 1]]
            entry += 1
    entries = np.array(valued_entries(exact))
    values = exact.values(entries)
    assert values.dtype == np.int64
    expected = [int(t) for n in range(exact.documents) for t in exact.document_tokens(n)[1:]]
    assert values.tolist() == expected
    mixed = np.array([[entries[5], -1], [-1, entries[0]]])
    assert exact.values(mixed).tolist() == [[expected[5], -1], [-1, expected[0]]]


def test_keys_are_the_models_states_and_zero_where_a_document_ends(
    exact: Memory, tiny_model: PreTrainedModel
) -> None:
    keys = np.load(exact.path / FILES["keys"])
    assert keys.dtype == np.float16
    first = 0
    for number in range(len(DOCUMENTS)):
        tokens = torch.from_numpy(exact.document_tokens(number).astype(np.int64))
        for window in windows(len(tokens), 64, 32):
            states, _ = keys_and_logits(tiny_model, tokens[window.start : window.stop])
            np.testing.assert_allclose(
                keys[first + window.first : first + window.stop].astype(np.float32),
                states[window.first - window.start :].numpy(),
                rtol=2e-3,
                atol=2e-3,
            )
        first += len(tokens)
        assert not keys[first - 1].any()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("index", ["exact", "IVF4,Flat", "Flat"])
def test_ends_of_documents_are_never_found(
    build_memory: Build, tiny_model: PreTrainedModel, metric: str, index: str
) -> None:
    memory = build_memory(tiny_model, DOCUMENTS[:6], metric=metric, index=index)
    queries = np.concatenate([np.zeros((1, DIM), np.float32), queries_of(memory)])
    entries = valued_entries(memory)
    ends = sorted(set(range(memory.tokens)) - set(entries))
    assert not memory.keys.rows(np.array(ends)).any()  # what a query of zeros is nearest to
    counts = (1, 10, memory.entries, memory.tokens, 2 * memory.tokens)
    for k, distances in itertools.product(counts, ("keys", "index")):
        ids = memory.search(queries, k, distances).ids
        assert ids.shape == (len(queries), min(k, memory.entries))
        for row in ids:
            found = row[row >= 0].tolist()
            assert len(set(found)) == len(found)
            assert set(found) <= set(entries)
            if k >= memory.entries and index != "IVF4,Flat":
                assert sorted(found) == entries


def test_two_segments_are_one_memory(
    build_memory: Build, tiny_model: PreTrainedModel, exact: Memory, tmp_path: Path
) -> None:
    parts = [build_memory(tiny_model, part) for part in (DOCUMENTS[:7], DOCUMENTS[7:])]
    joined = in_two_segments(parts, tmp_path / "joined.memory")
    assert verify(joined.path) == []
    assert (joined.tokens, joined.entries, joined.documents) == (
        exact.tokens,
        exact.entries,
        exact.documents,
    )
    entries = np.array(valued_entries(joined))
    np.testing.assert_array_equal(joined.values(entries), exact.values(entries))
    for number in range(exact.documents):
        assert joined.document(number) == exact.document(number)
        assert joined.document_tokens(number).tolist() == exact.document_tokens(number).tolist()
    for entry in range(exact.tokens):
        assert joined.place(entry) == exact.place(entry)
    queries = queries_of(joined)
    for k in (5, exact.entries + 3):
        found, expected = joined.search(queries, k), exact.search(queries, k)
        np.testing.assert_allclose(found.distances, expected.distances, rtol=2e-2)
        assert set(found.ids.ravel().tolist()) <= {-1, *entries.tolist()}
        rows = joined.keys.rows(found.ids.ravel()).reshape(*found.ids.shape, DIM)
        keys = rows.astype(np.float64)
        np.testing.assert_allclose(
            found.distances, ((keys - queries[:, None]) ** 2).sum(-1), rtol=1e-3
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "longer than the model's 64 positions"),
        ({"window": 8, "stride": 8}, "must be at least 1 and below the window"),
        ({"metric": "cosine"}, "metric 'cosine' is unknown"),
        ({"key_layer": "first"}, "key layer 'first' is unknown"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"recall": 0.0}, "recall target must lie in"),
        ({"recall": 1.5}, "recall target must lie in"),
        ({"index": "no such index"}, "FAISS cannot build the index 'no such index'"),
        ({"index": ""}, "FAISS cannot build the index ''"),
        ({"index": "PQ7"}, "FAISS cannot build the index 'PQ7'"),
        ({"index": "IVF100000,Flat"}, "the index 'IVF100000,Flat' has more lists than"),
    ],
)
def test_settings_that_cannot_work_leave_nothing_behind(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SettingError) as caught:
        Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS[:4], tmp_path / "new", **options)
    assert message in str(caught.value)
    assert snapshot(tmp_path) == {}


@pytest.mark.filterwarnings("ignore::nearest.corpus.report.CorpusWarning")
@pytest.mark.parametrize("documents", [[], [""], [" \n", ""]])
def test_a_corpus_without_text_leaves_nothing_behind(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
) -> None:
    with pytest.raises(CorpusError, match="no documents"):
        Memory.build(tiny_model, tiny_tokenizer, documents, tmp_path / "new")
    assert snapshot(tmp_path) == {}


def test_documents_without_text_are_left_out_and_named(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.warns(CorpusWarning, match=r"1 document read.*2 empty.*document 1"):
        memory = Memory.build(tiny_model, tiny_tokenizer, ["", "a", " \n"], tmp_path / "new")
    assert [memory.document(number).text for number in range(memory.documents)] == ["a"]
    assert verify(tmp_path / "new") == []


# --- the documents store --------------------------------------------------------------------------


def store(folder: Path, documents: list[Document]) -> DocumentReader:
    with DocumentWriter(folder / "d.jsonl.zst", folder / "frames.npy") as writer:
        for document in documents:
            writer.append(document)
    assert writer.documents == len(documents)
    return reopened(folder, writer.frames, len(documents))


def reopened(folder: Path, frames: int, documents: int) -> DocumentReader:
    rows = open_array(folder / "frames.npy", np.dtype(np.int64), (frames, 2))
    file = (folder / "d.jsonl.zst").open("rb")
    reader = DocumentReader(file, rows, documents)
    weakref.finalize(reader, file.close)
    return reader


def same(found: Document, expected: Document) -> bool:
    return (found.id, found.text, found.metadata) == (expected.id, expected.text, expected.metadata)


def plain_lines(path: Path) -> list[dict[str, Any]]:
    """What any zstd program reads."""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return [json.loads(line) for line in io.TextIOWrapper(reader, "utf-8", newline="\n")]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60), min_size=1, max_size=12),
    frame_bytes=st.sampled_from([1, 60, 400, 1 << 18]),
    order=st.randoms(use_true_random=False),
)
def test_documents_are_read_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], frame_bytes: int, order: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    documents = [Document(f"{i}\n{t}", t, {t: [i, t, None]}) for i, t in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest.store.documents, "_FRAME_BYTES", frame_bytes)
        reader = store(folder, documents)
    assert len(reader) == len(documents)
    for number in order.choices(range(len(documents)), k=3 * len(documents)):
        assert same(reader[number], documents[number])
    assert plain_lines(folder / "d.jsonl.zst") == [
        {"id": d.id, "text": d.text, "metadata": d.metadata} for d in documents
    ]


def test_large_documents_lie_in_frames_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [300_000, 10, 20, 2_000_000, 5, 262_144, 1, 70_000, 70_000, 70_000, 70_000, 3]
    letters = "".join(map(chr, range(0x20, 0x220)))
    documents = [
        Document(f"d{i}", "".join(rng.choice(list(letters), size=size)), {"i": i})
        for i, size in enumerate(sizes)
    ]
    reader = store(tmp_path, documents)
    frames = np.load(tmp_path / "frames.npy")
    assert frames[:, 0].tolist() == [0, 1, 4, 6, 10]  # a frame ends once it holds 2**18 bytes
    whole = (tmp_path / "d.jsonl.zst").read_bytes()
    for (first, start), (stop, end) in itertools.pairwise([*frames.tolist(), [12, len(whole)]]):
        lines = zstandard.ZstdDecompressor().decompress(whole[start:end]).splitlines()
        assert [json.loads(line)["id"] for line in lines] == [f"d{i}" for i in range(first, stop)]
    for number in [11, 0, 3, 4, 5, 2, 10, 9, 8, 7, 6, 1, 0, 11]:
        assert same(reader[number], documents[number])
    assert [line["text"] for line in plain_lines(tmp_path / "d.jsonl.zst")] == [
        d.text for d in documents
    ]


def test_only_the_frame_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest.store.documents, "_FRAME_BYTES", 500)
    documents = [Document(str(i), f"{i} " * 40) for i in range(40)]
    reader = store(tmp_path, documents)
    frames = len(np.load(tmp_path / "frames.npy"))
    assert frames > 5
    read: list[int] = []
    read_frame = DocumentReader._read_frame
    monkeypatch.setattr(
        DocumentReader,
        "_read_frame",
        lambda self, frame: (read.append(frame), read_frame(self, frame))[1],
    )
    for number in range(40):
        assert same(reader[number], documents[number])
    assert read == list(range(frames))


@pytest.mark.parametrize("file", ["d.jsonl.zst", "frames.npy"])
def test_a_damaged_store_gives_a_document_or_a_folder_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, file: str
) -> None:
    monkeypatch.setattr(nearest.store.documents, "_FRAME_BYTES", 2000)
    store(tmp_path, make_documents(40, 60))
    frames = len(np.load(tmp_path / "frames.npy"))
    data = (tmp_path / file).read_bytes()
    header = 128 if file == "frames.npy" else 0
    refused = 0
    for position in rng.integers(header, len(data), size=150).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / file).write_bytes(damaged)
        reader = reopened(tmp_path, frames, 40)
        for number in range(0, 40, 3):
            message = refusal(lambda reader, number: reader[number], reader, number)
            assert message is None or "is damaged" in message
            refused += message is not None
    assert refused > 20
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        if file == "d.jsonl.zst":
            (tmp_path / file).write_bytes(data[:cut])
            with pytest.raises(FolderError, match=r"d\.jsonl\.zst is damaged"):
                _ = reopened(tmp_path, frames, 40)[39]


def test_a_memory_may_have_many_frames(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    monkeypatch.setattr(nearest.store.documents, "_FRAME_BYTES", 300)
    memory = Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS, tmp_path / "m")
    assert memory.segments[0].record.frames == len(np.load(tmp_path / "m" / FILES["frames"])) > 4
    for number in [14, 0, 7, 13, 3, 3, 12]:
        assert same(memory.document(number), DOCUMENTS[number])
    assert [line["text"] for line in plain_lines(tmp_path / "m" / FILES["documents"])] == [
        d.text for d in DOCUMENTS
    ]
    assert verify(tmp_path / "m") == []


# --- verify ---------------------------------------------------------------------------------------


def test_sound_memories_are_sound(exact: Memory, approximate: Memory) -> None:
    told: list[tuple[str, int, int | None]] = []
    assert verify(exact.path) == []
    assert verify(approximate.path, lambda *report: told.append(report)) == []
    sizes = sum(record.size for record in approximate.manifest.file_records())
    assert told[0] == ("checksums", 0, sizes)
    assert ("checksums", sizes, sizes) in told
    assert told[-1][0] == "parts"
    assert told[-1][1] == told[-1][2]


@pytest.mark.parametrize("path", [*FILES.values(), INDEX])
def test_verify_finds_every_flipped_byte(folder: Path, rng: np.random.Generator, path: str) -> None:
    file = folder / path
    for _ in flipped(file, rng, 16):
        assert verify(folder) == [f"{path} differs from its checksum"]
        message = refusal(Memory.open, folder)  # opening need not find it, but may not crash
        assert message is None or file.name in message
    assert verify(folder) == []


def test_verify_finds_every_flipped_byte_of_the_manifest(
    folder: Path, rng: np.random.Generator
) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()
    missed = []
    for position in rng.permutation(len(data))[:150].tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        if not found_by_verify(folder):
            missed.append((position, data[position - 20 : position + 20]))
    assert missed == []


@pytest.mark.parametrize("path", ["manifest.json", *FILES.values(), INDEX])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data * 2,
        lambda data: bytes(len(data)),
        None,
    ],
    ids=["emptied", "truncated", "halved", "extended", "doubled", "zeroed", "removed"],
)
def test_verify_finds_a_file_of_another_size_or_none(
    folder: Path, path: str, damage: Callable[[bytes], bytes] | None
) -> None:
    file = folder / path
    data = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(data))
    assert file.name in found_by_verify(folder)


def test_verify_finds_swapped_files(folder: Path) -> None:
    paths = [folder / path for path in ("manifest.json", *FILES.values(), INDEX)]
    for first, second in itertools.combinations(paths, 2):
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
        assert found_by_verify(folder)
        first.write_bytes(a)
        second.write_bytes(b)
    assert verify(folder) == []


def _documents_store(records: list[Any]) -> bytes:
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    return zstandard.ZstdCompressor().compress(lines)


RECORDS = [{"id": d.id, "text": d.text, "metadata": dict(d.metadata)} for d in DOCUMENTS]


def _changed(kind: str, at: Any, value: Any) -> Callable[[Path], np.ndarray]:
    def change(folder: Path) -> np.ndarray:
        array = np.load(folder / FILES[kind])
        array[at] = value(array) if callable(value) else value
        return array

    return change


def _stored(records: list[Any]) -> Callable[[Path], bytes]:
    return lambda _: _documents_store(records)


# Files that match their checksums but break what every segment promises.
LIES: dict[str, tuple[str, Callable[[Path], np.ndarray | bytes], str]] = {
    "offsets fall": ("offsets", _changed("offsets", 1, lambda a: a[2] + 1), "do not rise"),
    "offsets start late": ("offsets", _changed("offsets", 0, 1), "do not rise"),
    "offsets end early": ("offsets", _changed("offsets", -1, lambda a: a[-1] - 1), "do not rise"),
    "offsets end late": ("offsets", _changed("offsets", -1, lambda a: a[-1] + 1), "do not rise"),
    "an empty document": ("offsets", _changed("offsets", 1, lambda a: a[2]), "do not rise"),
    "offsets moved": ("offsets", _changed("offsets", 1, lambda a: a[1] + 1), "the start token"),
    "a wrong token": ("tokens", _changed("tokens", 5, VOCABULARY), "lie outside 0 to 257"),
    "a wrong start": ("tokens", _changed("tokens", 0, 7), "begin with the start token"),
    "an entry twice": ("suffixes", _changed("suffixes", 3, lambda a: a[4]), "every entry once"),
    "another position": ("suffixes", _changed("suffixes", 3, -7), "lie outside"),
    "two swapped": ("suffixes", _changed("suffixes", [40, 41], lambda a: a[[41, 40]]), "in order"),
    "reversed": ("suffixes", _changed("suffixes", ..., lambda a: a[::-1]), "in order"),
    "a key is NaN": ("keys", _changed("keys", (5, 2), np.nan), "is not finite"),
    "a key is infinite": ("keys", _changed("keys", (-2, 0), -np.inf), "is not finite"),
    "an id twice": ("documents", _stored([RECORDS[3], *RECORDS[1:]]), "found by its id"),
    "a document less": ("documents", _stored(RECORDS[:-1]), "is damaged"),
    "no ids": ("documents", _stored([{"text": "a"}] * len(RECORDS)), "is damaged"),
    "no records": ("documents", _stored([[]] * len(RECORDS)), "is damaged"),
    "not compressed": ("documents", lambda _: b"not zstd" * 10, "is damaged"),
    "frames elsewhere": ("frames", lambda _: np.array([[0, 10**9]]), "is damaged"),
    "frames before": ("frames", lambda _: np.array([[0, -5]]), "is damaged"),
    "a late frame": ("frames", lambda _: np.array([[3, 0]]), "is damaged"),
    "no index": ("index", lambda _: b"not an index", "index.faiss"),
}


@pytest.mark.parametrize("lie", LIES)
def test_verify_checks_what_the_files_say(folder: Path, approximate: Memory, lie: str) -> None:
    kind, data, message = LIES[lie]
    replace_file(folder, kind, data(approximate.path))
    problems = verify(folder)
    assert problems
    assert message in "; ".join(problems)


def test_verify_compares_the_index_with_the_keys(
    folder: Path, build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    other = build_memory(tiny_model, DOCUMENTS[:8], index=IVF)
    replace_file(folder, "index", (other.path / INDEX).read_bytes())
    message = f"holds {other.entries:,} vectors of {DIM} dims, the manifest says"
    assert message in "; ".join(verify(folder))
    memory = Memory.open(folder)
    with pytest.raises(FolderError, match="rebuild it with `nearest index`"):
        memory.search(queries_of(memory), 3)


def test_verify_counts_the_entries(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["segments"][0].update(entries=m["segments"][0]["tokens"]))
    assert "suffix.npy holds int32" in found_by_verify(folder)


# --- attacks on the manifest ----------------------------------------------------------------------


def _set(*keys: str | int, value: Any) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        item: Any = manifest
        for key in keys[:-1]:
            item = item[key]
        item[keys[-1]] = value

    return change


def _drop(*keys: str | int) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        item: Any = manifest
        for key in keys[:-1]:
            item = item[key]
        del item[keys[-1]]

    return change


KEYS_PATH = ("segments", 0, "files", "keys", "path")
MANIFEST_ATTACKS: dict[str, tuple[Change, str]] = {
    "newer format": (_set("format", value=FORMAT + 1), "use a newer one"),
    "much newer format": (_set("format", value=10**12), "use a newer one"),
    "older format": (_set("format", value=FORMAT - 1), "build the memory anew"),
    "negative format": (_set("format", value=-1), "format"),
    "format as text": (_set("format", value="1"), "is not a valid manifest"),
    "format as truth": (_set("format", value=True), "is not a valid manifest"),
    "format as fraction": (_set("format", value=1.5), "is not a valid manifest"),
    "no format": (_drop("format"), "is not a valid manifest"),
    "unknown field": (_set("pickle", value="x"), "is not a valid manifest"),
    "unknown nested field": (_set("keys", "norm", value=1), "is not a valid manifest"),
    "unknown field of a file": (
        _set("segments", 0, "files", "keys", "url", value="http://"),
        "is not a valid manifest",
    ),
    "missing field": (_drop("keys", "metric"), "is not a valid manifest"),
    "generation 0": (_set("generation", value=0), "is not a valid manifest"),
    "unknown metric": (_set("keys", "metric", value="cosine"), "is not a valid manifest"),
    "unknown key format": (_set("keys", "format", value="fp8"), "is not a valid manifest"),
    "no dimension": (_set("keys", "dim", value=0), "is not a valid manifest"),
    "other dimension": (_set("keys", "dim", value=33), "the manifest says float16"),
    "other vocabulary": (_set("model", "vocab_size", value=70_000), "the manifest says uint32"),
    "no vocabulary": (_set("model", "vocab_size", value=0), "is not a valid manifest"),
    "fingerprint cut": (_set("model", "fingerprint", value="abc"), "is not a valid manifest"),
    "no segments": (_set("segments", value=[]), "is not a valid manifest"),
    "segments are null": (_set("segments", value=None), "is not a valid manifest"),
    "segment name": (_set("segments", 0, "name", value="../../x"), "is not a valid manifest"),
    "fewer tokens": (_set("segments", 0, "tokens", value=5), "the manifest says uint16 (5,)"),
    "more documents": (_set("segments", 0, "documents", value=99), "the manifest says int64 (100,"),
    "more frames": (_set("segments", 0, "frames", value=2), "the manifest says int64 (2, 2)"),
    "huge number": (_set("segments", 0, "tokens", value=10**30), "the manifest says uint16 (10"),
    "no keys file": (_drop("segments", 0, "files", "keys"), "names no 'keys' file"),
    "size too small": (_set("segments", 0, "files", "keys", "size", value=5), "manifest says 5"),
    "size negative": (_set("segments", 0, "files", "keys", "size", value=-1), "not a valid manif"),
    "checksum in capitals": (
        _set("segments", 0, "files", "keys", "sha256", value="A" * 64),
        "is not a valid manifest",
    ),
    "path above": (_set(*KEYS_PATH, value="../secret.npy"), "outside the folder: do not use it"),
    "path through the middle": (
        _set(*KEYS_PATH, value=f"segments/../../{SEGMENT}/keys.npy"),
        "outside the folder: do not use it",
    ),
    "absolute path": (_set(*KEYS_PATH, value="/etc/passwd"), "outside the folder: do not use it"),
    "absolute path of the index": (
        _set("segments", 0, "index", "file", "path", value="//etc/passwd"),
        "outside the folder: do not use it",
    ),
    "path of a folder": (_set(*KEYS_PATH, value=SEGMENT), "is missing"),
    "path of the memory": (_set(*KEYS_PATH, value="."), "is missing"),
    "empty path": (_set(*KEYS_PATH, value=""), "is missing"),
    "path with a null": (_set(*KEYS_PATH, value="segments/\0/keys.npy"), ": "),
    "very long path": (_set(*KEYS_PATH, value="segments/" + "x" * 300), ": "),
}


@pytest.mark.parametrize("attack", MANIFEST_ATTACKS)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, attack: str) -> None:
    change, message = MANIFEST_ATTACKS[attack]
    edit_manifest(folder, change)
    for call in (Memory.open, verify):
        with pytest.raises(FolderError) as caught:
            call(folder)
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"manifest"',
        b"{}",
        b"\xff\xfe{}",
        b'{"format": 1, "created_by": "\xff"}',
        b'{"format": 1, "created_by": "\\ud800"}',
        b'{"format": 1} trailing',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"format": 1, "settings": ' + b'{"a":' * 100_000,
        b'{"format": NaN}',
        b'{"format": 1e400}',
        b'{"format": ' + b"9" * 5000 + b"}",
        bytes(1000),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_manifest_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(FolderError) as caught:
        Memory.open(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(folder))


def test_the_manifest_of_a_newer_format_may_be_quite_different(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 7, "shards": [1, 2]}')
    with pytest.raises(
        FolderError, match=f"format 7, this version reads up to {FORMAT}: use a newer"
    ):
        Memory.open(folder)


LINKED = {
    "a file": FILES["keys"],
    "a segment": SEGMENT,
    "all segments": "segments",
    "the manifest": "manifest.json",
}


@pytest.mark.parametrize("what", LINKED)
def test_links_are_not_followed(folder: Path, tmp_path: Path, what: str) -> None:
    inside = folder / LINKED[what]
    outside = tmp_path / "outside"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    with pytest.raises(FolderError, match=r"missing|link"):
        Memory.open(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "does not exist: check the path, or build it"),
        (lambda path: path.mkdir(), "is not a memory (it has no manifest.json"),
        (lambda path: path.write_text("a file"), "is not a memory"),
        (lambda path: (path / "manifest.json").mkdir(parents=True), "cannot be read"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "does not exist"),
    ],
)
def test_what_is_no_memory_is_refused(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "law.memory"
    make(path)
    for call in (Memory.open, verify, lambda path: rebuild_index(path, IndexChoice("exact"))):
        with pytest.raises(FolderError) as caught:
            call(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


# --- the index file -------------------------------------------------------------------------------


def test_an_index_is_read_only_after_its_checksum(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    def must_not_be_called(*_: Any) -> None:
        raise AssertionError("a damaged file was handed to FAISS")

    monkeypatch.setattr(load_faiss(), "read_index", must_not_be_called)
    file = folder / INDEX
    data = file.read_bytes()
    for position in [0, 4, len(data) - 1, *rng.integers(len(data), size=5).tolist()]:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        memory = Memory.open(folder)
        for distances in ("keys", "index"):
            with pytest.raises(FolderError, match=r"index\.faiss is damaged \(its checksum"):
                memory.search(queries_of(memory), 3, distances)


@pytest.mark.parametrize("data", [b"", b"IwFl", b"not an index at all", b"IxF2" + bytes(100)])
def test_a_file_that_faiss_cannot_read_is_refused(folder: Path, data: bytes) -> None:
    replace_file(folder, "index", data)
    memory = Memory.open(folder)
    with pytest.raises(FolderError, match=r"index\.faiss"):
        memory.search(queries_of(memory), 3)


@pytest.mark.parametrize("place", [FILES["documents"], FILES["tokens"], INDEX])
def test_a_file_that_may_not_be_read_is_named(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refused(file: Path, *arguments: Any, **options: Any) -> Any:
        if file == folder / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(FolderError) as caught:
        Memory.open(folder)
    assert f"{folder / place} cannot be read" in str(caught.value)


# --- interruptions --------------------------------------------------------------------------------

LAST_SYNC = 15  # of a build: of its folder, after the manifest's rename
BUILD_KILLS = [
    *(("build", "fsync", count) for count in range(1, LAST_SYNC + 1)),
    *(("build", "pwrite", count) for count in (1, 2, 9, 20)),
    ("build", "posix_fallocate", 1),
    ("build", "replace", 1),
]
INDEX_KILLS = [
    *(("index", "fsync", count) for count in range(1, 7)),
    ("index", "replace", 1),
    ("index", "unlink", 1),
]


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory,
    approximate: Memory,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Folders that processes killed in the middle of their work have left, named by the moment."""
    folder = tmp_path_factory.mktemp("killed")
    model, documents = (tiny_model, tiny_tokenizer), make_documents(12, 30)
    changes = {
        "build": lambda path: Memory.build(*model, documents, path, keys="fp16", index="IVF4,SQ8"),
        "index": lambda path: rebuild_index(path, IndexChoice("IVF8,Flat")),
    }
    for moment in INDEX_KILLS:
        shutil.copytree(approximate.path, place_of(folder, moment))
    kill_writers(changes, folder, [*BUILD_KILLS, *INDEX_KILLS])
    return folder


@pytest.mark.parametrize("moment", BUILD_KILLS, ids=lambda m: "-".join(map(str, m)))
def test_a_killed_build_leaves_no_memory_and_can_be_repeated(
    killed: Path,
    moment: tuple[str, str, int],
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = place_of(killed, moment)
    assert path.is_dir()
    if moment == ("build", "fsync", LAST_SYNC):  # the memory is whole
        assert verify(path) == []
        return
    assert not (path / "manifest.json").exists()
    with pytest.raises(FolderError, match="an interrupted build leaves none"):
        Memory.open(path)
    Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS[:3], path, keys="fp16")
    assert verify(path) == []
    assert Memory.open(path).documents == 3
    assert files(path) == {
        "manifest.json",
        *FILES.values(),
    }


@pytest.mark.parametrize("moment", INDEX_KILLS, ids=lambda m: "-".join(map(str, m)))
def test_a_killed_change_leaves_a_whole_generation(
    killed: Path, moment: tuple[str, str, int], approximate: Memory
) -> None:
    path = place_of(killed, moment)
    assert verify(path) == []
    memory = Memory.open(path)
    published = moment in [("index", "fsync", 6), ("index", "unlink", 1)]
    assert (memory.manifest.version, memory.segments[0].record.index.spec) == (
        (2, "IVF8,Flat") if published else (1, IVF)
    )
    rebuild_index(path, IndexChoice("exact"))
    assert verify(path) == []
    assert files(path) == {
        "manifest.json",
        *FILES.values(),
    }
    queries = queries_of(memory)
    expected = approximate.segments[0].exact_index().search(queries, 5)
    np.testing.assert_array_equal(Memory.open(path).search(queries, 5).ids, expected.ids)


FAILURES: dict[str, tuple[Any, str, int, BaseException]] = {
    **{f"write {n}": (ArrayFile, "_pwrite", n, FULL) for n in (1, 3, 10, 25)},
    **{f"sync {n}": (os, "fsync", n, FULL) for n in range(1, 11)},
    "reserve": (os, "posix_fallocate", 1, FULL),
    "index": (ApproximateIndex, "write", 1, FULL),
    "rename": (Path, "replace", 1, FULL),
    "interrupted write": (ArrayFile, "_pwrite", 10, KeyboardInterrupt()),
    "interrupted sync": (os, "fsync", 8, KeyboardInterrupt()),
    "interrupted rename": (Path, "replace", 1, KeyboardInterrupt()),
    "interrupted index": (ApproximateIndex, "write", 1, KeyboardInterrupt()),
    "out of memory": (ApproximateIndex, "search", 1, MemoryError()),
}


def _prepare(path: Path, before: str) -> dict[str, bytes | str | None]:
    """A folder as it may be before a build; what must be there after a failed one."""
    if before != "missing":
        path.mkdir()
    if before == "interrupted":
        (path / SEGMENT).mkdir(parents=True)
        for name in FILES.values():
            (path / name).write_bytes(b"stale")
    return {} if before == "missing" else {path.name: None}


@pytest.mark.parametrize(
    ("failure", "before"),
    [
        *((failure, "missing") for failure in FAILURES),
        *itertools.product(
            ["write 10", "rename", "interrupted sync"],
            ["empty", "interrupted"],
        ),
    ],
)
def test_a_failed_build_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    failure: str,
    before: str,
) -> None:
    path = tmp_path / "new.memory"
    expected = _prepare(path, before)
    *call, error = FAILURES[failure]
    call_fails(monkeypatch, *call, error)
    with pytest.raises(FolderError if error is FULL else type(error)) as caught:
        Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS, path, index=IVF)
    monkeypatch.undo()
    if error is FULL:
        assert str(caught.value) == (
            f"cannot write to {path}: the disk is full: free some space, then run again"
        )
    assert snapshot(tmp_path) == expected
    with writer_lock(tmp_path if before == "missing" else path):  # the lock has been given back
        pass


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("before", ["missing", "empty"])
def test_a_failure_after_publishing_never_leaves_half_a_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    error: BaseException,
    before: str,
) -> None:
    path = tmp_path / "new.memory"
    expected = _prepare(path, before)
    call_fails(monkeypatch, os, "fsync", 9, error)  # of the folder, after the manifest's rename
    with pytest.raises(FolderError if error is FULL else KeyboardInterrupt):
        Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS[:3], path)
    monkeypatch.undo()
    if (path / "manifest.json").exists():
        assert verify(path) == []
    else:
        assert snapshot(tmp_path) == expected


@pytest.mark.parametrize(
    "error",
    [CorpusError("mine"), ValueError("mine"), KeyboardInterrupt("mine"), SystemExit("mine")],
)
@pytest.mark.parametrize("read_before", [0, 1, 3])
def test_documents_that_fail_leave_nothing_behind(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    error: BaseException,
    read_before: int,
) -> None:
    def documents() -> Iterator[Document]:
        for document in DOCUMENTS[:read_before]:
            yield Document(document.id, document.text * 2000)  # so that batches are written before
        raise error

    with pytest.raises(type(error), match="mine"):
        Memory.build(tiny_model, tiny_tokenizer, documents(), tmp_path / "new.memory")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("stage", ["tokens", "suffix array", "keys", f"index {IVF}"])
def test_an_interruption_at_any_stage_leaves_nothing_behind(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    stage: str,
) -> None:
    def interrupt(current: str, _done: int, _total: int | None) -> None:
        if current == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Memory.build(
            tiny_model,
            tiny_tokenizer,
            DOCUMENTS,
            tmp_path / "new.memory",
            index=IVF,
            progress=interrupt,
        )
    assert snapshot(tmp_path) == {}


def test_folders_made_on_the_way_are_taken_away_too(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(CorpusError):
        Memory.build(tiny_model, tiny_tokenizer, [], tmp_path / "mine/a/b/new.memory")
    assert snapshot(tmp_path) == {"mine": None}


def test_what_someone_else_puts_there_meanwhile_stays(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "new.memory"

    def documents() -> Iterator[str]:
        yield "text"
        (path / "mine.txt").write_text("mine")
        raise CorpusError("the reason")

    with pytest.raises(CorpusError, match="the reason"):
        Memory.build(tiny_model, tiny_tokenizer, documents(), path)
    assert snapshot(path) == {"mine.txt": b"mine"}


# --- where nothing may be built -------------------------------------------------------------------


def refused_build(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, message: str
) -> None:
    with pytest.raises(FolderError) as caught:
        Memory.build(model, tokenizer, DOCUMENTS[:2], path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_memory_is_not_built_over(
    folder: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    before = snapshot(folder)
    refused_build(folder, tiny_model, tiny_tokenizer, "is already a memory: give another path")
    (folder / "manifest.json").write_text("damaged")
    refused_build(folder, tiny_model, tiny_tokenizer, "is already a memory: give another path")
    assert snapshot(folder) == {**before, "manifest.json": b"damaged"}


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        ".hidden",
        "deep/er/notes.txt",
        "manifest.json.bak",
        "segments",
        "segments/photo.jpg",
        "segments/000001/photo.jpg",
        "segments/holiday/keys.npy",
        "segments/000001/tokens.npy/photo.jpg",
        "build/machine.json.mine",
    ],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_folder_with_something_else_in_it_is_left_alone(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    name: str,
    interrupted: bool,
) -> None:
    path = tmp_path / "mine"
    file = path / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    if interrupted and not (path / SEGMENT / "tokens.npy").exists() and name != "segments":
        (path / SEGMENT).mkdir(parents=True, exist_ok=True)
        (path / SEGMENT / "tokens.npy").write_bytes(b"stale")
    before = snapshot(path)
    refused_build(path, tiny_model, tiny_tokenizer, "is not empty")
    assert snapshot(path) == before


def test_a_link_in_place_of_the_segments_is_left_alone(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/segments").symlink_to(tmp_path / "outside")
    before = snapshot(tmp_path)
    refused_build(tmp_path / "mine", tiny_model, tiny_tokenizer, "is not empty")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "given_name", ["file", "file/below", "dangling", "x" * 300, "nul\0", "loop", "loop/below"]
)
def test_a_path_that_cannot_be_a_folder_is_refused(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    given_name: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = snapshot(tmp_path)
    refused_build(tmp_path / given_name, tiny_model, tiny_tokenizer, ": ")
    assert snapshot(tmp_path) == before


def test_a_link_to_an_empty_folder_may_be_built_into(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorpusError):
        Memory.build(tiny_model, tiny_tokenizer, [], tmp_path / "link")
    assert snapshot(tmp_path) == {"elsewhere": None, "link": str(tmp_path / "elsewhere")}
    memory = Memory.build(tiny_model, tiny_tokenizer, ["text"], tmp_path / "link")
    assert memory.document(0).text == "text"
    assert verify(tmp_path / "elsewhere") == []


# --- later generations ----------------------------------------------------------------------------


def test_another_index_is_a_new_generation_and_old_readers_go_on(
    folder: Path, exact: Memory
) -> None:
    store_settings(folder, "knn", {"lam": 0.5})
    queries = queries_of(exact)
    truth = exact.search(queries, 7)
    readers = [Memory.open(folder)]
    expected = [readers[0].search(queries, 7)]
    readers.append(Memory.open(folder))  # has not read its index yet
    expected.append(expected[0])
    live = {"manifest.json", *FILES.values()}
    for generation, spec in enumerate(["Flat", "exact", "HNSW8", "IVF2,Flat", "auto"], 3):
        rebuild_index(folder, IndexChoice(spec))
        memory = Memory.open(folder)
        record = memory.segments[0].record.index
        assert memory.manifest.version == generation
        assert record.spec == ("exact" if spec == "auto" else spec)
        assert memory.settings("knn") == {"lam": 0.5}
        assert files(folder) == {
            *live,
            *(file.path for file in record.file_records()),
        }
        assert verify(folder) == []
        if spec in ("Flat", "exact", "auto"):
            np.testing.assert_array_equal(memory.search(queries, 7).ids, truth.ids)
        readers.append(Memory.open(folder))
        expected.append(memory.search(queries, 7))
    shutil.rmtree(folder)  # even then every reader keeps the generation that it opened
    for reader, found in zip(readers, expected, strict=True):
        np.testing.assert_array_equal(reader.search(queries, 7).ids, found.ids)
        assert reader.document(14).text == DOCUMENTS[14].text
        assert reader.document_tokens(0).tolist() == exact.document_tokens(0).tolist()


def test_settings_are_kept_by_method(folder: Path) -> None:
    records = Memory.open(folder).manifest.segments
    before = snapshot(folder)
    store_settings(folder, "knn", {"lam": 0.25, "k": 16, "distances": "keys"})
    store_settings(folder, "other", {"nested": {"a": [1, None, "ä"]}})
    store_settings(folder, "knn", {"lam": 0.5})
    memory = Memory.open(folder)
    assert memory.settings("knn") == {"lam": 0.5}
    assert memory.settings("other") == {"nested": {"a": [1, None, "ä"]}}
    assert memory.settings("never tuned") == {}
    memory.settings("knn")["lam"] = 1.0
    assert memory.settings("knn") == {"lam": 0.5}
    assert memory.manifest.version == 4
    assert memory.manifest.segments == records
    after = snapshot(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}


CHANGES: dict[str, Callable[[Path], None]] = {
    "index": lambda path: rebuild_index(path, IndexChoice("IVF2,Flat")),
    "exact": lambda path: rebuild_index(path, IndexChoice("exact")),
    "settings": lambda path: store_settings(path, "knn", {"lam": 0.1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_writers_are_one_too_many(folder: Path, change: str) -> None:
    before = snapshot(folder)
    with (
        writer_lock(folder),
        pytest.raises(FolderError, match="is being written by another process: wait"),
    ):
        CHANGES[change](folder)
    assert snapshot(folder) == before
    CHANGES[change](folder)
    assert Memory.open(folder).manifest.version == 2


def test_a_build_waits_for_no_other_writer(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with writer_lock(tmp_path):
        refused_build(tmp_path, tiny_model, tiny_tokenizer, "is being written by another process")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (os, "fsync", 1),
        (os, "fsync", 2),
        (Path, "replace", 1),
        (ApproximateIndex, "write", 1),
        (ApproximateIndex, "search", 1),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_failed_change_leaves_everything_as_it_was(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    count: int,
    error: BaseException,
) -> None:
    before = snapshot(folder)
    call_fails(monkeypatch, owner, name, count, error)
    with pytest.raises(FolderError if error is FULL else KeyboardInterrupt):
        rebuild_index(folder, IndexChoice("IVF2,Flat"))
    monkeypatch.undo()
    assert snapshot(folder) == before


@pytest.mark.parametrize("spec", ["no such index", "IVF100000,Flat", "PQ7"])
def test_an_index_that_cannot_be_built_changes_nothing(folder: Path, spec: str) -> None:
    before = snapshot(folder)
    with pytest.raises(SettingError, match=f"the index '{spec}'"):
        rebuild_index(folder, IndexChoice(spec))
    with pytest.raises(SettingError, match="recall target"):
        rebuild_index(folder, IndexChoice("auto", recall=2.0))
    assert snapshot(folder) == before


def test_a_change_removes_its_own_rubbish_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (folder / "segments/000002").symlink_to(outside)
    (folder / SEGMENT / "g000009.index.faiss").write_bytes(b"an interrupted writer's")
    (folder / SEGMENT / "link").symlink_to(outside / "mine.txt")
    (folder / SEGMENT / "notes.txt").write_text("a user's")
    rebuild_index(folder, IndexChoice("exact"))
    assert snapshot(outside) == {"mine.txt": b"mine"}
    assert verify(folder) == []
    live = {Path(path).name for path in FILES.values()}
    assert {item.name for item in (folder / SEGMENT).iterdir()} == {*live, "link", "notes.txt"}


def test_a_stray_folder_does_not_stop_a_change(folder: Path) -> None:
    (folder / SEGMENT / "stray").mkdir()
    rebuild_index(folder, IndexChoice("exact"))
    assert Memory.open(folder).manifest.version == 2
    assert verify(folder) == []


# --- readers beside a writer ----------------------------------------------------------------------


def test_a_reader_that_has_read_an_old_manifest_reads_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def published_after_reading(*where: Any) -> Manifest:
        manifest = read_manifest(*where)
        if next(calls) == 0:
            rebuild_index(folder, IndexChoice("IVF2,Flat"))
        return manifest

    monkeypatch.setattr(nearest.store.opening, "read_manifest", published_after_reading)
    memory = Memory.open(folder)
    assert memory.manifest.version == 2
    assert memory.search(queries_of(memory), 3).ids.min() >= 0


@pytest.mark.parametrize("call", [Memory.open, verify], ids=["open", "verify"])
def test_a_writer_may_publish_while_a_manifest_is_being_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], Any]
) -> None:
    calls = itertools.count()
    original = nearest.store.manifest.check_file

    def publish_first(*args: Any) -> None:
        if next(calls) == 0:
            rebuild_index(folder, IndexChoice("IVF2,Flat"))
        original(*args)

    monkeypatch.setattr(nearest.store.manifest, "check_file", publish_first)
    result = call(folder)
    assert result == [] if call is verify else result.manifest.version == 2


def test_a_writer_may_publish_while_everything_is_verified(folder: Path) -> None:
    calls = itertools.count()

    def publish(_stage: str, _done: int, _total: int | None) -> None:
        if next(calls) == 0:
            rebuild_index(folder, IndexChoice("IVF2,Flat"))

    assert verify(folder, publish) == []


def test_a_missing_file_is_still_an_error_when_no_writer_was_there(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(NearestError, match=r"index\.faiss is missing: restore it"):
        Memory.open(folder)
