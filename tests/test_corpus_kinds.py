"""Compressed corpora, Parquet, Arrow, folders that `datasets` saved, and the hub."""

import contextlib
import datetime
import decimal
import gzip
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nearest.corpus import documents as documents_module
from nearest.corpus import text_files
from nearest.corpus.documents import Document
from nearest.corpus.reading import read_documents
from nearest.corpus.report import CorpusWarning
from nearest.errors import CorpusError, NearestError

pytestmark = pytest.mark.filterwarnings("ignore::nearest.corpus.report.CorpusWarning")

ROWS: list[dict[str, Any]] = [
    {"text": "the first", "id": "a", "title": "A", "nested": {"n": [{"deep": None}, {"deep": 1}]}},
    {"text": "ä second\r\nline", "id": "b", "title": None, "nested": None},
    {"text": "x" * 100_000, "id": "c", "title": "C", "nested": {"n": []}},
]


def compress(data: bytes, kind: str) -> bytes:
    return gzip.compress(data) if kind == ".gz" else zstandard.compress(data)


def read(*paths: str | Path, **options: Any) -> list[Document]:
    return list(read_documents(paths, **options))


def contents(documents: list[Document]) -> list[tuple[Any, ...]]:
    return [(d.id, d.text, dict(d.metadata)) for d in documents]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_compressed_files_are_read_as_what_they_hold(
    kind: str, members: int, plain: Path, tmp_path: Path
) -> None:
    data, path = plain.read_bytes(), tmp_path / f"a.jsonl{kind}"
    cuts = np.linspace(0, len(data), members + 1).astype(int)
    parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
    path.write_bytes(b"".join(compress(part, kind.lower()) for part in parts))
    assert contents(read(path)) == contents(read(plain))
    text = tmp_path / f"t.md{kind}"
    text.write_bytes(compress("\ufeffgrün\r\n".encode(), kind.lower()))
    (document,) = read(text)
    assert (document.id, document.text) == (text.name, "grün\n")


def test_a_folder_may_mix_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(b"two"))
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "3.parquet")
    (tmp_path / "4.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "four"}'))
    (tmp_path / "5.parquet.gz").write_bytes(b"passed over, as other unknown kinds are")
    assert [document.text for document in read(tmp_path)] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_damage_to_a_compressed_file_is_named(kind: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / f"a.jsonl{kind}"
    rows = [{"text": rng.bytes(300).hex()} for _ in range(300)]
    whole = compress("\n".join(map(json.dumps, rows)).encode(), kind)
    for size in [1, 5, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=r"is cut short|is damaged") as caught:
            read(path)
        assert str(path) in str(caught.value)
    for data in [b"plain text", whole + b"rest", b"\0" * 100, whole[:100] + b"\0\0" + whole[102:]]:
        path.write_bytes(data)
        with pytest.raises(CorpusError) as caught:
            read(path)
        assert str(path) in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match="1 empty"):
        read(path)


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_what_grows_a_thousandfold_takes_no_more_memory(kind: str, tmp_path: Path) -> None:
    line = json.dumps({"text": "spaces " + " " * 100_000}).encode() + b"\n"
    path = tmp_path / f"a.jsonl{kind}"
    path.write_bytes(compress(line * 1_000, kind))  # 100 MB
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    stream = iter(read_documents([path]))
    assert sum(1 for _ in zip(range(600), stream, strict=False)) == 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt", "a.jsonl"])
def test_a_document_beyond_the_limit_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LARGEST_DOCUMENT", 1000)
    assert documents_module.LARGEST_DOCUMENT == 1 << 30
    data = b'{"text": "%b"}' % (b"a" * 1000)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(CorpusError, match="more than a gigabyte: cut it") as caught:
        read(path)
    assert str(path) in str(caught.value)


# --- Parquet and Arrow ----------------------------------------------------------------------------


def save(table: pa.Table, path: Path) -> Path:
    """A table in the format that the name says: .parquet, .arrow as a stream, .file.arrow."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
        return path
    new = pa.ipc.new_file if ".file" in path.suffixes else pa.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


FORMATS = ["a.parquet", "a.arrow", "a.file.arrow"]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_documents_as_lines_of_json_are(name: str, plain: Path, tmp_path: Path) -> None:
    path = save(pa.Table.from_pylist(ROWS), tmp_path / name)
    found = read(path)
    expected = contents(read(plain))
    expected[1] = (expected[1][0], ROWS[1]["text"], expected[1][2])  # strings stay as they are
    assert contents(found)[:2] == expected[:2]
    assert contents(found)[2][1] == expected[2][1]
    assert [document.origin for document in found] == [f"{path}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_texts_of_any_string_type_get_ids_of_their_content(
    name: str, kind: pa.DataType, tmp_path: Path
) -> None:
    texts = pa.array(["hello", "other"]).cast(kind)
    path = save(pa.table({"text": texts, "id": pa.array([None, 7])}), tmp_path / name)
    assert [d.id for d in read(path)] == [f"{name}#2cf24dba5fb0a30e", "7"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_json_has_no_word_for_is_text_or_refused(name: str, tmp_path: Path) -> None:
    when = datetime.datetime(2020, 1, 2, 3, 4, 5)
    row = {"text": "t", "when": when, "price": decimal.Decimal("1.50"), "in": {"d": [when.date()]}}
    (document,) = read(save(pa.Table.from_pylist([row]), tmp_path / name))
    assert document.metadata == {
        "when": "2020-01-02T03:04:05", "price": "1.50", "in": {"d": ["2020-01-02"]}
    }  # fmt: skip
    for value in (b"\xff", float("nan"), float("inf")):
        rows = [{"text": "t", "v": None}, {"text": "u", "v": value}]
        path = save(
            pa.Table.from_pylist(
                rows, pa.schema([("text", pa.string()), ("v", pa.scalar(value).type)])
            ),
            tmp_path / name,
        )
        with pytest.raises(CorpusError, match="metadata that JSON cannot hold") as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:2 ")


BAD: dict[str, tuple[pa.Table, str]] = {
    "no text": (pa.table({"body": ["a"]}), "no column 'text'.*it has 'body'.*--text-field"),
    "no columns": (pa.table({}), "no column 'text'.*it has none"),
    "two texts": (
        pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]),
        "column 'text' more than once",
    ),
    "no rows": (pa.table({"text": pa.array([], pa.string())}), "no documents"),
    "number": (pa.table({"text": [1, 2]}), ":1 has no text in its field 'text', but"),
    "bytes": (pa.table({"text": [b"a"]}), ":1 has no text in its field 'text', but"),
    "id": (pa.table({"text": ["a"], "id": [1.5]}), ":1 has in its field 'id' neither"),
    "not UTF-8": (
        pa.table({"text": pa.array([b"a", b"\xff"]).view(pa.string())}),
        ":2 cannot be read|Invalid UTF8",
    ),
    "twice": (pa.table({"text": ["a", "b"], "id": ["x", "x"]}), "'x' stands twice"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", BAD)
def test_rows_that_are_no_documents_are_named(name: str, case: str, tmp_path: Path) -> None:
    table, message = BAD[case]
    path = save(table, tmp_path / name)
    with pytest.raises(CorpusError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_tables_are_read_or_refused(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = save(pa.Table.from_pylist(ROWS * 20), tmp_path / name)
    whole, refused = path.read_bytes(), 0
    cases = [b"", whole[:3], whole[: len(whole) // 2], whole[:-1]]
    for _ in range(30):
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        cases.append(bytes(changed))
    for data in cases:
        path.write_bytes(data)
        with contextlib.suppress(CorpusError):
            list(read_documents([path]))
            continue
        refused += 1
    assert refused >= 3


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = [np.random.default_rng(n).bytes(5_000).hex() for n in range(3_000)]  # 30 MB, one group
    pq.write_table(pa.table({"text": text}), path, use_dictionary=False)
    before = pa.total_allocated_bytes()
    stream, most = iter(read_documents([path])), 0
    for document, expected in zip(stream, text, strict=True):
        assert document.text == expected
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 16 << 20


def test_what_is_missing_is_named_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("nearest.errors.find_spec", lambda _: None)
    with pytest.raises(NearestError, match=r"pyarrow is needed.*'\.\[data\]'"):
        read(tmp_path / "a.parquet")
    with pytest.raises(NearestError, match=r"datasets is needed.*'\.\[data\]'"):
        read("hf://owner/name")


# --- datasets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two splits as `datasets` saves it, the training split in three files."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets") / "saved"
    train = datasets.Dataset.from_list([{"text": f"text {n}", "id": n} for n in range(30)])
    test = datasets.Dataset.from_list([{"text": "held out", "id": 99}])
    datasets.DatasetDict(train=train, test=test).save_to_disk(
        folder, num_shards={"train": 3, "test": 1}
    )
    return folder


def test_a_folder_that_datasets_saved_is_read_in_its_order(saved: Path) -> None:
    found = read(saved / "train")
    assert [(d.id, d.text) for d in found] == [(str(n), f"text {n}") for n in range(30)]
    with pytest.raises(CorpusError, match=r"holds the splits train, test: name one") as caught:
        read(saved)
    assert str(saved / "train") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", "{"),
        ("state.json", "{}"),
        ("state.json", '{"_data_files": []}'),
        ("state.json", '{"_data_files": [{"filename": "../data.arrow"}]}'),
        ("dataset_dict.json", '{"splits": 3}'),
        ("dataset_dict.json", '{"splits": []}'),
    ],
)
def test_a_dataset_that_describes_itself_wrongly(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match="does not say which files") as caught:
        read(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_only_the_files_of_the_dataset_are_read(tmp_path: Path) -> None:
    for name in ("mine.arrow", "stale.arrow"):
        save(pa.table({"text": [name]}), tmp_path / name)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "mine.arrow"}]}')
    assert [d.text for d in read(tmp_path)] == ["mine.arrow"]
    (tmp_path / "mine.arrow").unlink()
    with pytest.raises(CorpusError, match=r"mine\.arrow"):
        read(tmp_path)


def test_a_file_of_a_dataset_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a.arrow", "b.arrow"):
        save(pa.table({"text": [name]}), tmp_path / name)
    (tmp_path / "dataset_info.json").write_text("{}")
    files = [{"filename": "a.arrow"}, {"filename": "b.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    corpus = read_documents(tmp_path, exclude=["b.arrow"])
    with pytest.warns(CorpusWarning, match="1 excluded"):
        assert [d.text for d in corpus] == ["a.arrow"]
    assert (corpus.report.skipped, corpus.report.unmatched) == ({"excluded": 1}, set())


def test_the_hub_is_asked_as_the_name_says(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "no/such":
            raise ConnectionError("no network\nand more")
        found = datasets.load_from_disk(saved)
        parts = {key: value.to_iterable_dataset() for key, value in found.items()}
        if name == "one/split":
            return datasets.IterableDatasetDict(train=parts["train"])
        return parts[split] if split else datasets.IterableDatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (document,) = read("hf://owner/name:test")
    assert (document.id, document.text, document.origin) == (
        "99",
        "held out",
        "hf://owner/name:test:1",
    )
    assert len(read("hf://owner/name/english:train")) == len(read("hf://one/split")) == 30
    with pytest.raises(CorpusError, match=r"holds the splits train, test: name one.*name:train"):
        read("hf://owner/name")
    with pytest.raises(CorpusError, match=r"cannot be read \(no network\): check"):
        read("hf://no/such:train")
    assert asked[:3] == [
        ("owner/name", None, "test", True),
        ("owner/name", "english", "train", True),
        ("one/split", None, None, True),
    ]
    for wrong in ("hf://", "hf:///name", "hf://a/b/c/d", "hf://a/"):
        with pytest.raises(CorpusError, match="names no dataset"):
            read(wrong)
