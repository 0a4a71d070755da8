"""Documents from files and folders, their tokens, and texts to be scored."""

import gzip
import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nearest.corpus import unique
from nearest.corpus.decoding import EncodingErrors
from nearest.corpus.documents import Document
from nearest.corpus.incoming import incoming_documents
from nearest.corpus.long_text import tokenise_long
from nearest.corpus.reading import read_documents
from nearest.corpus.text import Text
from nearest.corpus.tokens import (
    SpecialTokensWarning,
    TokenRules,
    check_vocabulary,
    token_dtype,
    tokenise,
)
from nearest.corpus.unique import SeenIds
from nearest.errors import CorpusError, SettingError

BOM = b"\xef\xbb\xbf"

pytestmark = pytest.mark.filterwarnings("ignore::nearest.corpus.report.CorpusWarning")


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(*paths: str | Path, errors: EncodingErrors = "strict") -> list[Document]:
    return list(read_documents(paths, encoding_errors=errors))


def incoming(documents: Any) -> list[Document]:
    return list(incoming_documents(documents, TokenRules(0, 300)))


def texts(*paths: str | Path, errors: EncodingErrors = "strict") -> list[str]:
    return [document.text for document in read(*paths, errors=errors)]


def content_id(name: str, text: str) -> str:
    return f"{name}#{sha256(text)[:16]}"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- text files and folders -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "two.dots.md"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "hello")
    assert read(path) == [
        Document(name, "hello", {"path": name, "sha256": sha256("hello")}, str(path)),
    ]


TREE = {
    "b.txt": "b",
    "a.md": "a",
    "Z.txt": "Z",
    "ä.txt": "ä",
    ".hidden.txt": "hidden",
    "notes.odt": "no kind that is read",
    "no_suffix": "nothing",
    ".git/config.txt": "git",
    "sub/.private/c.txt": "private",
    "sub/c.jsonl": '{"text": "c1"}\n{"text": "c2"}\n',
    "sub/.d.md": "hidden too",
    "sub/b/1.txt": "sub/b/1",
    "sub.txt/2.txt": "a folder may have any name",
    "sub2/deep/er/e.txt": "e",
}


@pytest.mark.parametrize("names", [list(TREE), sorted(TREE, reverse=True)])
def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_files(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        write(tmp_path / "corpus" / name, TREE[name])
    (tmp_path / "corpus" / "empty").mkdir()
    assert [(d.text, d.id.split("#")[0]) for d in read(tmp_path / "corpus")] == [
        ("Z", "Z.txt"),
        ("a", "a.md"),
        ("b", "b.txt"),
        ("ä", "ä.txt"),
        ("c1", "sub/c.jsonl"),
        ("c2", "sub/c.jsonl"),
        ("sub/b/1", "sub/b/1.txt"),
        ("a folder may have any name", "sub.txt/2.txt"),
        ("e", "sub2/deep/er/e.txt"),
    ]


def test_ids_are_the_same_wherever_the_folder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there/below"):
        write(tmp_path / place / "sub" / "x.txt", "hello")
        write(tmp_path / place / "y.jsonl", '{"text": "hello"}\n')
    expected = [
        ("y.jsonl#2cf24dba5fb0a30e", {}),
        ("sub/x.txt", {"path": "sub/x.txt", "sha256": sha256("hello")}),
    ]
    monkeypatch.chdir(tmp_path)
    for given_path in (tmp_path / "here", tmp_path / "there/below", "here", "here/", "./here/."):
        assert [(d.id, d.metadata) for d in read(given_path)] == expected


def test_the_id_of_a_text_file_is_its_path_and_stays_when_the_text_changes(tmp_path: Path) -> None:
    found = [
        read(write(tmp_path / name, text))[0]
        for name, text in [("a.txt", "one"), ("a.txt", "two"), ("b.txt", "one")]
    ]
    assert [(d.id, d.metadata["sha256"]) for d in found] == [
        ("a.txt", sha256("one")), ("a.txt", sha256("two")), ("b.txt", sha256("one"))
    ]  # fmt: skip


def test_line_ends_of_a_system_change_neither_text_nor_id(tmp_path: Path) -> None:
    unix = read(write(tmp_path / "unix" / "a.txt", "one\ntwo\n\n"))
    windows = read(write(tmp_path / "windows" / "a.txt", "one\r\ntwo\r\n\r\n"))
    marked = read(write(tmp_path / "marked" / "a.txt", BOM + b"one\r\ntwo\r\n\r\n"))
    assert unix[0].text == windows[0].text == marked[0].text == "one\ntwo\n\n"
    assert unix[0].metadata == windows[0].metadata == marked[0].metadata


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (BOM + b"a", "a"),
        (BOM + BOM + b"a", "\ufeffa"),
        (b"a" + BOM, "a\ufeff"),
        (b"a\rb\r\r\nc", "a\rb\r\nc"),
        ("\u2028\x85\x0bx".encode(), "\u2028\x85\x0bx"),
    ],
)
def test_only_a_leading_mark_and_line_ends_are_touched(
    tmp_path: Path, data: bytes, text: str
) -> None:
    assert texts(write(tmp_path / "a.txt", data)) == [text]


# --- JSON lines -----------------------------------------------------------------------------------


def test_given_ids_and_metadata_are_kept(tmp_path: Path) -> None:
    metadata = {"title": "Ü", "nested": {"a": [1, None, 2.5]}, "path": "mine", "metadata": {}}
    records = [
        {"id": "seven", "text": "a", **metadata},
        {"id": 7, "text": "b"},
        {"id": 0, "text": "c"},
        {"id": None, "text": "d"},
        {"text": "e", "ID": "not an id"},
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert read(path) == [
        Document("seven", "a", metadata, f"{path}:1"),
        Document("7", "b", {}, f"{path}:2"),
        Document("0", "c", {}, f"{path}:3"),
        Document(content_id("a.jsonl", "d"), "d", {}, f"{path}:4"),
        Document(content_id("a.jsonl", "e"), "e", {"ID": "not an id"}, f"{path}:5"),
    ]


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "b"}',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\n \n{"text": "a"}\n\t\r\n\n{"text": "b"}\n\n',
        BOM + b'{"text": "a"}\n{"text": "b"}\n',
        BOM + b'\n{"text": "a"}\n{"text": "b"}\n',
        b' {"text": "a"} \n\t{"text": "b"}\n',
        b'{"text": "\\u0061"}\n{"text": "b", "text": "b"}\n',
    ],
)
def test_blank_lines_line_ends_and_marks_do_not_matter(tmp_path: Path, data: bytes) -> None:
    assert texts(write(tmp_path / "a.jsonl", data)) == ["a", "b"]


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.tuples(
            st.text(min_size=1).filter(lambda text: not text.isspace()),
            st.booleans(),
            st.dictionaries(
                st.text().filter(lambda key: key not in ("id", "text")),
                st.none() | st.integers() | st.text() | st.lists(st.booleans()),
                max_size=3,
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
)
def test_json_lines_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[str, bool, dict[str, Any]]],
    line_end: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    lines = [
        json.dumps({**metadata, "text": text, "id": i}, ensure_ascii=ascii_only)
        for i, (text, ascii_only, metadata) in enumerate(records)
    ]
    write(path, line_end.join(lines))
    assert [(d.id, d.text, d.metadata) for d in read(path)] == [
        (str(i), text, metadata) for i, (text, _, metadata) in enumerate(records)
    ]


BAD_LINES = {
    "not JSON": "hello",
    "cut off": '{"text": "a',
    "two values": '{"text": "a"} {"text": "b"}',
    "a comma too many": '{"text": "a",}',
    "a mark in the middle of the file": '\ufeff{"text": "a"}',
    "a number of 5,000 digits": '{"text": "a", "n": ' + "1" * 5000 + "}",
    "not a number": '{"text": "a", "n": NaN}',
    "no number either": '{"text": "a", "n": [-Infinity]}',
    "nested too deeply": '{"text": "a", "n": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "an array": '["text"]',
    "a string": '"text"',
    "null": "null",
    "no text": '{"id": "a"}',
    "text is a number": '{"text": 3}',
    "text is a list": '{"text": ["a"]}',
    "text is an object": '{"text": {"text": "a"}}',
    "id is a fraction": '{"text": "a", "id": 1.5}',
    "id is a list": '{"text": "a", "id": ["a"]}',
    "id is an object": '{"text": "a", "id": {}}',
    "high surrogate alone": '{"text": "ab\\ud83d"}',
    "low surrogate alone": '{"text": "ab\\ude00c"}',
    "surrogates in the wrong order": '{"text": "ab\\ude00\\ud83d"}',
    "surrogate in the id": '{"text": "a", "id": "\\ud83d"}',
    "surrogate in the metadata": '{"text": "a", "title": "\\ud83d"}',
    "surrogate in a name": '{"text": "a", "\\ud83d": [1]}',
    "surrogate deep in the metadata": '{"text": "a", "n": [{"m": ["\\ud83d"]}]}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "after"}}\n')
    with pytest.raises(CorpusError) as caught:
        read(path)
    message = str(caught.value)
    assert f"{path}:3 " in message
    assert len(message) < 400 + len(str(path))  # the line itself is not repeated
    assert ": " in message.split(":3 ")[1]  # how to mend it


def test_escaped_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}')) == ["😀"]


def test_a_huge_line(tmp_path: Path) -> None:
    text = "a long line of words " * 250_000
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text, "id": 1}) + '\n{"text": "b"}')
    assert texts(path) == [text, "b"]


# --- encodings ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    before=st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc"))),
    wrong=st.sampled_from([b"\xff", b"\x80", b"\xc3(", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\xaf"]),
    after=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)),
    marked=st.booleans(),
)
def test_text_that_is_not_utf8_is_named_by_its_byte(
    tmp_path_factory: pytest.TempPathFactory, before: str, wrong: bytes, after: str, marked: bool
) -> None:
    start = (BOM if marked else b"") + before.encode()
    path = tmp_path_factory.getbasetemp() / "encoding.txt"
    write(path, start + wrong + after.encode())
    with pytest.raises(CorpusError, match="--encoding-errors replace") as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} is not UTF-8 at byte {len(start):,}:")
    given_bytes = start.removeprefix(BOM) if marked or before.startswith("\ufeff") else start
    expected = (given_bytes + wrong + after.encode()).decode("utf-8", "replace")
    assert texts(path, errors="replace") == [expected.replace("\r\n", "\n")]


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_byte_counts_from_the_start_of_a_jsonl_file(
    tmp_path: Path, mark: bytes, line_end: bytes
) -> None:
    lines = [b'{"text": "' + "grün ".encode() * 400 + b'"}', b"", b'{"text": "ab\xffcd"}', b"{}"]
    data = mark + line_end.join(lines)
    path = write(tmp_path / "a.jsonl", data)
    offset = data.index(b"\xff")
    assert offset > 1000
    with pytest.raises(CorpusError) as caught:
        read(path)
    assert f"{path} is not UTF-8 at byte {offset:,}:" in str(caught.value)
    path.write_bytes(data.removesuffix(b"{}"))
    assert texts(path, errors="replace") == ["grün " * 400, "ab\ufffdcd"]


MARKED = ["utf-8-sig", "utf-16", "utf-32"]  # as Python writes them, with a byte-order mark
PROSE = "Grüß Gott, “naïve café”: 10 € für 𝕏\r\n" * 3


@pytest.mark.parametrize("encoding", [*MARKED, "utf-16-be", "utf-32-be"])
def test_byte_order_marks_decide(encoding: str, tmp_path: Path) -> None:
    mark = "" if encoding in MARKED else "\ufeff"
    text = write(tmp_path / "a.txt", (mark + PROSE).encode(encoding))
    assert texts(text) == [PROSE.replace("\r\n", "\n")]
    rows = "".join(json.dumps({"text": PROSE + str(n)}, ensure_ascii=False) + "\n" for n in (1, 2))
    assert texts(write(tmp_path / "a.jsonl", (mark + rows).encode(encoding))) == [
        PROSE + "1", PROSE + "2"
    ]  # fmt: skip
    table = 'text,id\r\n"a\nb",1\r\nc,2\r\n'
    assert texts(write(tmp_path / "a.csv", (mark + table).encode(encoding))) == ["a\nb", "c"]


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_told_and_never_taken(
    encoding: str, errors: EncodingErrors, tmp_path: Path
) -> None:
    """Most of it would pass as UTF-8 with zero bytes."""
    path = write(tmp_path / "a.txt", "plain English text".encode(encoding))
    with pytest.raises(CorpusError, match=f"--encoding {encoding}"):
        read(path, errors=errors)
    assert texts_with(path, encoding=encoding) == ["plain English text"]
    assert texts_with(path, encoding="auto") == ["plain English text"]


def texts_with(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_other_encodings_are_refused_rather_than_guessed(tmp_path: Path, encoding: str) -> None:
    prose = "Das Café grüßt die Gäste, und für die Größe der Häuser dankt man schön. " * 4
    path = write(tmp_path / "a.txt", prose.encode(encoding))
    with pytest.raises(CorpusError, match=r"is not UTF-8 at byte.*--encoding auto"):
        read(path)
    assert texts_with(path, encoding=encoding) == [prose]
    corpus = read_documents(path, encoding="auto")
    assert [document.text for document in corpus] == [prose]
    assert sum(corpus.report.encodings.values()) == 1
    assert texts_with(write(tmp_path / "u.txt", prose), encoding="auto") == [prose]


@pytest.mark.parametrize("words", ["Café", "Å ære", "Straße größe", "Straße und Größe, größer"])
def test_a_few_western_words_are_enough(tmp_path: Path, words: str) -> None:
    path = write(tmp_path / "a.txt", words.encode("cp1252"))
    assert texts_with(path, encoding="auto") == [words]


def test_an_encoding_that_does_not_exist_is_refused() -> None:
    for wrong in ("utf-9", "base64", ""):
        with pytest.raises(SettingError, match="no text encoding"):
            read_documents("-", encoding=wrong)


BINARY = {
    "zero bytes": b"some text\0 and more",
    "PDF": b"%PDF-1.4 text",
    "gzip": gzip.compress(b"text"),
    "PNG": b"\x89PNG\r\n\x1a\n",
    "controls": bytes(range(1, 9)) * 20,
}


@pytest.mark.parametrize("data", BINARY.values(), ids=BINARY)
def test_what_is_no_text_is_refused_by_name_and_left_out_of_folders(
    data: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path / "b.txt", data)
    for errors in ("strict", "replace"):
        with pytest.raises(CorpusError, match=r"b\.txt (is|holds)"):
            list(read_documents(path, encoding_errors=errors))
    write(tmp_path / "a.txt", "text")
    corpus = read_documents(tmp_path)
    assert [document.id for document in corpus] == ["a.txt"]
    assert corpus.report.skipped == {"binary": 1}


# --- nothing to read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b""),
        ("a.md", b""),
        ("a.txt", BOM),
        ("a.jsonl", b""),
        ("a.jsonl", BOM),
        ("a.jsonl", b"\n \n\r\n"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_an_empty_file_is_left_out_and_counted(
    tmp_path: Path, name: str, data: bytes, in_folder: bool
) -> None:
    path = write(tmp_path / "corpus" / name, data)
    with pytest.raises(CorpusError, match=r"no documents \(skipped: 1 empty") as caught:
        read(path.parent if in_folder else path)
    assert path.name in str(caught.value)
    write(tmp_path / "corpus" / "other.txt", "text")
    corpus = read_documents([path.parent])
    assert [document.text for document in corpus] == ["text"]
    assert corpus.report.skipped == {"empty": 1}


@pytest.mark.parametrize(
    ("given_name", "message"),
    [
        ("missing", "does not exist: check the path"),
        ("missing.txt", "does not exist: check the path"),
        ("folder/notes.txt/below.txt", "does not exist: check the path"),
        (
            "folder/image.png",
            "pass --suffix .png or --format text",
        ),
        ("folder/no_suffix", "pass --format text"),
        ("empty", "holds no file of a kind that is read: .txt"),
        ("unfit", "skipped: 1 hidden (.hidden.txt), 1 .png (image.png)"),
        ("dangling.txt", "does not exist: check the path"),
        ("x" * 300 + ".txt", ": "),
        ("nul\0.txt", ": "),
    ],
)
def test_a_path_that_gives_no_document_is_named(
    tmp_path: Path, given_name: str, message: str
) -> None:
    write(tmp_path / "folder" / "notes.txt", "text")
    write(tmp_path / "folder" / "image.png", b"\x89PNG")
    write(tmp_path / "folder" / "no_suffix", "text")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    write(tmp_path / "unfit" / "image.png", b"\x89PNG")
    write(tmp_path / "unfit" / ".hidden.txt", "hidden")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    path = tmp_path / given_name
    with pytest.raises(CorpusError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_no_path_at_all() -> None:
    with pytest.raises(CorpusError, match="no corpus was given"):
        read()


def test_a_dangling_link_in_a_folder_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c.txt").symlink_to(tmp_path / "c.txt")
    corpus = read_documents(tmp_path)
    assert [document.id for document in corpus] == ["a.txt"]
    assert corpus.report.skipped == {"that lead nowhere": 2}


def test_a_folder_that_cannot_be_listed_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt", "text")
    locked = write(tmp_path / "locked" / "b.txt", "text").parent
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if Path(os.fspath(path)) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError) as caught:
        read(tmp_path)
    assert str(locked) in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.txt")  # a lone surrogate, which no JSON file can hold
    write(tmp_path / name, "text")
    for given_path in (tmp_path, tmp_path / name):
        (document,) = read(given_path)
        assert (document.id, document.metadata["path"]) == ("\\xff.txt", "\\xff.txt")
        assert document.origin == f"{tmp_path}/\\xff.txt"


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "given_names", "places"),
    [
        ({"a.jsonl": '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}'}, ["a.jsonl"], "12"),
        (
            {"a.jsonl": '{"id": "x", "text": "a"}', "b.jsonl": '{"id": "x", "text": "a"}'},
            ["a.jsonl", "b.jsonl"],
            "11",
        ),
    ],
)
def test_a_given_id_that_stands_twice_is_refused_with_both_places(
    tmp_path: Path, files: dict[str, str], given_names: list[str], places: str
) -> None:
    paths = [write(tmp_path / name, data) for name, data in files.items()]
    with pytest.raises(CorpusError, match="stands twice") as caught:
        read(*(tmp_path / name for name in given_names))
    first, second = paths[0], paths[-1]
    wanted = f"in {first}:{places[0]} and in {second}:{places[1]}: ids must"
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("files", "given_names", "ids"),
    [
        (
            {"a.jsonl": '{"text": "a"}\n\n{"text": "b"}\n{"text": "a"}\n{"text": "a"}'},
            ["a.jsonl"],
            [f"a.jsonl#{sha256(text[0])[:16]}{text[1:]}" for text in ("a", "b", "a#2", "a#3")],
        ),
        ({"a/x.txt": "a", "b/x.txt": "b"}, ["a", "b"], ["x.txt", "x.txt#2"]),
        (
            {"a/x.txt": "a", "b/x.txt#2.txt": "b", "b/x.txt": "c", "c/x.txt": "d"},
            ["a", "b", "c"],
            ["x.txt", "x.txt#2", "x.txt#2.txt", "x.txt#3"],
        ),
    ],
)  # fmt: skip
def test_ids_that_the_library_makes_are_numbered_apart(
    tmp_path: Path, files: dict[str, str], given_names: list[str], ids: list[str]
) -> None:
    for name, data in files.items():
        write(tmp_path / name, data)
    corpus = read_documents([tmp_path / name for name in given_names])
    assert [document.id for document in corpus] == ids
    assert corpus.report.numbered_ids == sum(i.endswith(("#2", "#3")) for i in ids)
    assert "numbered apart" in str(corpus.report)


def test_documents_given_in_memory_are_told_apart_too() -> None:
    made = content_id("text", "same text")
    assert [d.id for d in incoming(["same text", "same text"])] == [made, f"{made}#2"]
    with pytest.raises(CorpusError, match="'x' stands twice"):
        incoming([Document("x", "a"), Document("y", "b"), Document("x", "c")])


def test_ids_are_told_apart_however_many_there_are() -> None:
    """Against a set, over many sizes of the table."""
    rng = np.random.default_rng(0)
    ids = [f"{number % 9}#{number}" for number in rng.integers(0, 20_000, size=30_000)]
    seen, expected = SeenIds(), set[str]()
    for name in ids:
        assert seen.add(name) == (name not in expected)
        expected.add(name)
    assert len(seen) == len(expected)


def test_ids_whose_hashes_are_equal_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unique, "_hash", len)
    documents = [Document(str(number), "x", origin=f"a:{number}") for number in range(60)]
    assert incoming(documents) == documents
    with pytest.raises(CorpusError, match="'17' stands twice, in a:17 and in b:1"):
        incoming([*documents, Document("17", "y", origin="b:1")])


def test_ids_take_at_most_48_bytes_each() -> None:
    """16 where the table is half full; three tables of half that while it grows."""
    count, seen = 1 << 14, SeenIds()
    tracemalloc.start()
    try:
        for number in range(count):
            seen.add(f"corpus.jsonl#{number}")
        assert tracemalloc.get_traced_memory()[1] < 48 * count
    finally:
        tracemalloc.stop()


def test_strings_stand_for_documents_with_ids_made_of_their_text() -> None:
    given_documents = ["hello", Document("x", "y", {"z": 1}), "other"]
    assert incoming(given_documents) == [
        Document("text#2cf24dba5fb0a30e", "hello", origin="document 1"),
        given_documents[1],
        Document(content_id("text", "other"), "other", origin="document 3"),
    ]


@pytest.mark.parametrize(
    "bad",
    [
        "\ud800",
        Document("a", "b\udfff"),
        Document("a", None),
        7,
        b"a",
        {"text": "a\ud800b"},
        {"id": "x", "text": "a\ud800b"},
        {"id": "\ud800", "text": "a"},
        {"text": "a", "encoder_text": "\ud800"},
        {"text": "a", "more": ["\ud800"]},
    ],
)
def test_documents_given_in_memory_must_hold_text(bad: Any) -> None:
    with pytest.raises(CorpusError, match=r"document 2|given in memory"):
        incoming(["good", bad])


# --- streaming ------------------------------------------------------------------------------------


def test_the_first_document_is_there_before_the_second_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "a.txt", "first")
    write(tmp_path / "corpus" / "b.jsonl", '{"text": "second"}\nbroken')
    write(tmp_path / "corpus" / "c.txt", b"\xff")
    stream = iter(read_documents([tmp_path / "corpus"]))
    assert next(stream).text == "first"
    assert next(stream).text == "second"
    with pytest.raises(CorpusError, match=r"b\.jsonl:2 is not JSON"):
        next(stream)


def test_nothing_is_read_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        write(tmp_path / name, name)
    opened: list[str] = []
    path_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode: (opened.append(self.name), path_open(self, mode))[1]
    )
    corpus = read_documents([tmp_path])
    stream = iter(corpus)
    assert opened == []
    next(stream)
    assert [name for name in opened if name.endswith(".txt")] == ["a.txt"]
    next(stream)
    assert [name for name in opened if name.endswith(".txt")] == ["a.txt", "b.txt"]
    assert [document.id for document in corpus] == ["a.txt", "b.txt", "c.txt"]  # and once more


# --- tokens ---------------------------------------------------------------------------------------


def characters(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """A tokenizer whose token ids are code points."""
    return {"input_ids": [[ord(character) for character in text] for text in texts]}


@pytest.mark.filterwarnings("ignore::nearest.corpus.tokens.SpecialTokensWarning")
def test_tokens_are_the_start_token_and_the_tokenizers_ids(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(["hello", "ä\n", "<eos>", " "])]
    found = list(tokenise(documents, tiny_tokenizer, TokenRules(0, 258)))
    assert [item.document for item in found] == documents
    for item in found:
        text = tiny_tokenizer(
            item.document.text, add_special_tokens=False, split_special_tokens=True
        )
        expected = [0, *text["input_ids"]]
        assert item.tokens.tolist() == expected
        assert item.tokens.dtype == np.int32
        assert tiny_tokenizer.decode(item.tokens[1:]) == item.document.text


@pytest.mark.slow
@pytest.mark.parametrize("repeat", [1, 90_000])
def test_special_tokens_that_a_document_mentions_are_text_unless_asked_for(
    tiny_tokenizer: PreTrainedTokenizerFast, repeat: int
) -> None:
    documents = [Document("a", "ab<eos>c" * repeat), Document("b", "plain"), Document("c", "<bos>")]
    with pytest.warns(SpecialTokensWarning, match=r"'<eos>' are mentioned in 2 documents"):
        as_text = list(tokenise(documents, tiny_tokenizer, TokenRules(0, 258)))
    assert [len(item.tokens) for item in as_text] == [1 + 8 * repeat, 6, 6]
    assert not any(token in item.tokens[1:] for item in as_text for token in (0, 1))
    rules = TokenRules(0, 258, special_tokens=True)
    as_tokens = list(tokenise(documents, tiny_tokenizer, rules))
    assert [len(item.tokens) for item in as_tokens] == [1 + 4 * repeat, 6, 2]
    assert as_tokens[2].tokens.tolist() == [0, 0]


def test_a_corpus_streams_through_the_tokenizer_in_batches() -> None:
    taken: list[int] = []
    calls: list[int] = []

    def documents() -> Iterator[Document]:
        for i in range(10):
            taken.append(i)
            yield Document(str(i), chr(97 + i) * 100_000)

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        calls.append(len(texts))
        return {"input_ids": [[ord(text[0])] for text in texts]}

    stream = tokenise(documents(), tokenizer, TokenRules(1, 200))
    assert next(stream).tokens.tolist() == [1, 97]
    assert taken == [0, 1, 2]
    assert [item.tokens.tolist() for item in stream] == [[1, 97 + i] for i in range(1, 10)]
    assert calls == [3, 3, 3, 1]


LONG_TEXTS = {
    "words": "the court shall grün\n" * 400,
    "no spaces": "a" * 5_000,
    "spaces": " " * 5_000,
    "characters of several tokens": "🙂é中" * 1_000,
    "specials": "ab<eos>c" * 600,
}


@pytest.fixture(scope="module")
def fast_tokenizers(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, PreTrainedTokenizerFast]:
    """Bytes; BPE over words; BPE that takes a whole text for one word; Unigram; WordPiece."""
    found = {"bytes": tiny_tokenizer}
    for name, model, trainer, split in [
        ("BPE", models.BPE(), trainers.BpeTrainer, pre_tokenizers.Metaspace()),
        ("Unigram", models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace()),
        ("WordPiece", models.WordPiece(), trainers.WordPieceTrainer, pre_tokenizers.Whitespace()),
    ]:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = split
        options = {"unk_token": "<unk>"} if name == "Unigram" else {}
        special = ["<eos>", "<unk>", "[UNK]"]
        tokenizer.train_from_iterator(
            ["the court shall grant the courts' shells"] * 3,
            trainer(vocab_size=60, special_tokens=special, show_progress=False, **options),
        )
        found[name] = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        if name == "BPE":
            wordless = Tokenizer.from_str(tokenizer.to_str())
            wordless.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
            found["no words"] = PreTrainedTokenizerFast(tokenizer_object=wordless)
    return found


@pytest.mark.parametrize("name", ["bytes", "BPE", "no words", "Unigram", "WordPiece"])
@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_pieces_give_the_tokens_of_the_whole(
    name: str, kind: str, fast_tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer, text = fast_tokenizers[name], LONG_TEXTS[kind]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenise_long(text, tokenizer, piece=1_000, overlap=300).tolist() == whole


def test_a_long_document_is_taken_in_pieces(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lengths: list[int] = []

    class Watched:
        is_fast = True

        def __call__(self, text: Any, **options: Any) -> Any:
            lengths.extend([len(text)] if isinstance(text, str) else map(len, text))
            return tiny_tokenizer(text, **options)

    text = "word " * 80_000
    documents = [Document("a", "short"), Document("b", text), Document("c", "short too")]
    found = list(tokenise(documents, Watched(), TokenRules(0, 258)))
    assert [len(item.tokens) for item in found] == [6, 400_001, 10]
    assert found[1].tokens.tolist() == [0, *tiny_tokenizer("word ")["input_ids"] * 80_000]
    assert max(lengths) < len(text)


@pytest.mark.parametrize(
    ("text", "start", "wrong"), [("ab~", 1, ord("~")), ("ab", 126, 126), ("ab", -1, -1)]
)
def test_a_token_outside_the_vocabulary_is_named(text: str, start: int, wrong: int) -> None:
    documents = [Document("x", "abc", origin="here:1"), Document("y", text, origin="here:2")]
    stream = tokenise(documents, characters, TokenRules(start, 126))
    place = "here:2" if start == 1 else "here:1"
    with pytest.raises(CorpusError) as caught:
        list(stream)
    assert str(caught.value).startswith(
        f"token {wrong} in {place} is outside the model's vocabulary of 126: "
    )


def test_the_whole_vocabulary_is_allowed() -> None:
    check_vocabulary(np.array([0, 125]), 126, "here")
    check_vocabulary(np.array([], dtype=np.int64), 126, "here")
    for wrong in (126, -1, 2**40):
        with pytest.raises(CorpusError, match=f"token {wrong} in here"):
            check_vocabulary(np.array([0, wrong, 125]), 126, "here")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (1, "uint16"),
        (65_535, "uint16"),
        (65_536, "uint16"),
        (65_537, "uint32"),
        (256_000, "uint32"),
    ],
)
def test_token_dtype_holds_the_largest_id(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert int(np.array(vocab_size - 1).astype(token_dtype(vocab_size))) == vocab_size - 1


# --- texts to be scored ---------------------------------------------------------------------------


def test_a_text_counts_words_bytes_and_predictions() -> None:
    text = Text.from_documents(["ab  cd\n", "é"], characters, TokenRules(1, 300))
    assert [tokens.tolist() for tokens in text.documents] == [
        [1, *map(ord, "ab  cd\n")],
        [1, 233],
    ]
    assert (text.words, text.utf8_bytes, text.predictions) == (3, 9, 8)
    ended = Text.from_documents(["ab", "c"], characters, TokenRules(1, 300), end_token=2)
    assert [tokens.tolist() for tokens in ended.documents] == [[1, 97, 98, 2], [1, 99, 2]]
    assert ended.predictions == 5


def test_a_text_of_tokens_has_neither_words_nor_bytes() -> None:
    text = Text.from_tokens([np.array([5, 6, 7], np.uint16), np.array([8])], 9)
    assert [tokens.tolist() for tokens in text.documents] == [[5, 6, 7], [8]]
    assert (text.words, text.utf8_bytes, text.predictions) == (None, None, 2)
    with pytest.raises(CorpusError, match="token 9 in the token arrays given"):
        Text.from_tokens([np.array([5, 9])], 9)


@pytest.mark.parametrize("arrays", [[], [np.array([3])], [np.array([3]), np.array([4])]])
def test_a_text_without_predictions_is_refused(arrays: list[np.ndarray]) -> None:
    with pytest.raises(CorpusError, match="no token to predict"):
        Text.from_tokens(arrays, 9)
