"""Documents from files and folders, their tokens, and texts to be scored."""

import hashlib
import json
import os
import re
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
from nearest.corpus.documents import Document, as_documents
from nearest.corpus.long_text import tokenise_long
from nearest.corpus.reading import read_documents
from nearest.corpus.text import Text
from nearest.corpus.text_files import EncodingErrors
from nearest.corpus.tokens import TokenRules, check_vocabulary, token_dtype, tokenise
from nearest.corpus.unique import with_unique_ids
from nearest.errors import CorpusError

BOM = b"\xef\xbb\xbf"


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(*paths: str | Path, errors: EncodingErrors = "strict") -> list[Document]:
    return list(with_unique_ids(read_documents(paths, encoding_errors=errors)))


def texts(*paths: str | Path, errors: EncodingErrors = "strict") -> list[str]:
    return [document.text for document in read(*paths, errors=errors)]


def content_id(name: str, text: str) -> str:
    return f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"


# --- text files and folders -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "two.dots.md"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "hello")
    assert read(path) == [
        Document(f"{name}#2cf24dba5fb0a30e", "hello", {"path": name}, str(path)),
    ]


TREE = {
    "b.txt": "b",
    "a.md": "a",
    "Z.txt": "Z",
    "ä.txt": "ä",
    ".hidden.txt": "hidden",
    "notes.pdf": "%PDF",
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
        ("sub/x.txt#2cf24dba5fb0a30e", {"path": "sub/x.txt"}),
    ]
    monkeypatch.chdir(tmp_path)
    for given_path in (tmp_path / "here", tmp_path / "there/below", "here", "here/", "./here/."):
        assert [(d.id, d.metadata) for d in read(given_path)] == expected


def test_ids_change_with_the_text_and_with_the_place(tmp_path: Path) -> None:
    ids = [
        read(write(tmp_path / name, text))[0].id
        for name, text in [("a.txt", "one"), ("a.txt", "two"), ("b.txt", "one")]
    ]
    assert ids == [content_id(*pair) for pair in [("a.txt", "one"), ("a.txt", "two")]] + [
        content_id("b.txt", "one")
    ]


def test_line_ends_of_a_system_change_neither_text_nor_id(tmp_path: Path) -> None:
    unix = read(write(tmp_path / "unix" / "a.txt", "one\ntwo\n\n"))
    windows = read(write(tmp_path / "windows" / "a.txt", "one\r\ntwo\r\n\r\n"))
    marked = read(write(tmp_path / "marked" / "a.txt", BOM + b"one\r\ntwo\r\n\r\n"))
    assert unix[0].text == windows[0].text == marked[0].text == "one\ntwo\n\n"
    assert unix[0].id == windows[0].id == marked[0].id == content_id("a.txt", "one\ntwo\n\n")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (BOM + b"a", "a"),
        (BOM + BOM + b"a", "\ufeffa"),
        (b"a" + BOM, "a\ufeff"),
        (b"a\rb\r\r\nc", "a\rb\r\nc"),
        (b" \n", " \n"),
        (b"\0", "\0"),
        ("\u2028\x85\x0b".encode(), "\u2028\x85\x0b"),
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
            st.text(min_size=1),
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
    "text is null": '{"text": null}',
    "text is a number": '{"text": 3}',
    "text is a list": '{"text": ["a"]}',
    "text is an object": '{"text": {"text": "a"}}',
    "text is empty": '{"text": ""}',
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
    before=st.text(),
    wrong=st.sampled_from([b"\xff", b"\x80", b"\xc3(", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\xaf"]),
    after=st.text(alphabet=st.characters(max_codepoint=127)),
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
def test_other_encodings_are_refused_rather_than_guessed(tmp_path: Path, encoding: str) -> None:
    path = write(
        tmp_path / "a.txt", "“naïve café”, grüß Gott".replace("“", "").encode(encoding, "replace")
    )
    with pytest.raises(CorpusError, match="is not UTF-8 at byte"):
        read(path)


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
def test_an_empty_file_is_named(tmp_path: Path, name: str, data: bytes, in_folder: bool) -> None:
    path = write(tmp_path / "corpus" / name, data)
    with pytest.raises(CorpusError, match="is empty: remove it from the corpus") as caught:
        read(path.parent if in_folder else path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("given_name", "message"),
    [
        ("missing", "does not exist: check the path"),
        ("missing.txt", "does not exist: check the path"),
        ("folder/notes.txt/below.txt", "does not exist: check the path"),
        (
            "folder/image.png",
            "none of .txt, .md, .jsonl (or these with .gz, .zst), .parquet, .arrow: convert",
        ),
        (
            "folder/no_suffix",
            "none of .txt, .md, .jsonl (or these with .gz, .zst), .parquet, .arrow: convert",
        ),
        ("empty", "holds no .txt, .md, .jsonl (or these with .gz, .zst), .parquet, .arrow file"),
        ("unfit", "holds no .txt, .md, .jsonl (or these with .gz, .zst), .parquet, .arrow file"),
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


def test_a_dangling_link_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"b\.txt cannot be read \(No such file or directory\)"):
        read(tmp_path)


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


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.txt")  # a lone surrogate, which no JSON file can hold
    write(tmp_path / name, "text")
    with pytest.raises(CorpusError, match="name"):
        read(tmp_path)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "given_names", "places"),
    [
        ({"a.jsonl": '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}'}, ["a.jsonl"], "12"),
        ({"a.jsonl": '{"text": "a"}\n\n{"text": "a"}'}, ["a.jsonl"], "13"),
        (
            {"a.jsonl": '{"id": "x", "text": "a"}', "b.jsonl": '{"id": "x", "text": "a"}'},
            ["a.jsonl", "b.jsonl"],
            "11",
        ),
        ({"a.txt": "a"}, ["a.txt", "a.txt"], None),
        ({"a/x.txt": "a", "b/x.txt": "a"}, ["a", "b"], None),
    ],
)
def test_an_id_that_stands_twice_is_refused_with_both_places(
    tmp_path: Path, files: dict[str, str], given_names: list[str], places: str | None
) -> None:
    paths = [write(tmp_path / name, data) for name, data in files.items()]
    with pytest.raises(CorpusError, match="stands twice") as caught:
        read(*(tmp_path / name for name in given_names))
    first, second = paths[0], paths[-1]
    lines = ("", "") if places is None else (f":{places[0]}", f":{places[1]}")
    assert f"in {first}{lines[0]} and in {second}{lines[1]}: ids must" in str(caught.value)


def test_documents_given_in_memory_must_have_unique_ids_too() -> None:
    with pytest.raises(CorpusError, match="stands twice"):
        list(with_unique_ids(as_documents(["same text", "same text"])))
    with pytest.raises(CorpusError, match="'x' stands twice"):
        list(with_unique_ids([Document("x", "a"), Document("y", "b"), Document("x", "c")]))


def test_ids_are_told_apart_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a dictionary, over many merges of what has been seen."""
    monkeypatch.setattr(unique, "_RUN", 8)
    rng = np.random.default_rng(0)
    for _ in range(40):
        seen: dict[str, str] = {}
        ids = [f"{number % 9}#{number}" for number in rng.integers(0, 4_000, size=300)]
        stream = (Document(name, "x", origin=f"a:{at}") for at, name in enumerate(ids))
        expected = None
        for at, name in enumerate(ids):
            if name in seen:
                expected = f"'{name}' stands twice, in {seen[name]} and in a:{at}: ids must"
                break
            seen[name] = f"a:{at}"
        if expected is None:
            assert [document.id for document in with_unique_ids(stream)] == ids
        else:
            with pytest.raises(CorpusError, match=re.escape(expected)):
                list(with_unique_ids(stream))


def test_ids_whose_hashes_are_equal_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unique, "_RUN", 4)
    monkeypatch.setattr(unique, "id_hash", lambda name: np.uint64(len(name)))
    documents = [Document(str(number), "x", origin=f"a:{number}") for number in range(60)]
    assert list(with_unique_ids(documents)) == documents
    with pytest.raises(CorpusError, match="'17' stands twice, in a:17 and in b:1"):
        list(with_unique_ids([*documents, Document("17", "y", origin="b:1")]))


def test_ids_take_a_tenth_of_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unique, "_RUN", 1 << 8)
    count, names = 1 << 13, np.random.default_rng(0).bytes
    documents = (
        Document(f"corpus.jsonl#{names(8).hex()}", "x", origin=f"/a/folder/corpus.jsonl:{number}")
        for number in range(count)
    )
    tracemalloc.start()
    try:
        for last, document in enumerate(stream := with_unique_ids(documents), 1):
            if last == count:
                assert tracemalloc.get_traced_memory()[0] < 40 * count, document
        assert next(stream, None) is None
    finally:
        tracemalloc.stop()


def test_strings_stand_for_documents_with_ids_made_of_their_text() -> None:
    given_documents = ["hello", Document("x", "y", {"z": 1}), "other"]
    assert list(as_documents(given_documents)) == [
        Document("text#2cf24dba5fb0a30e", "hello"),
        given_documents[1],
        Document(content_id("text", "other"), "other"),
    ]


@pytest.mark.parametrize("bad", ["", Document("a", ""), "\ud800", Document("a", "b\udfff")])
def test_documents_given_in_memory_must_hold_text(bad: str | Document) -> None:
    with pytest.raises(CorpusError):
        list(as_documents([bad]))


# --- streaming ------------------------------------------------------------------------------------


def test_the_first_document_is_there_before_the_second_file_is_read(tmp_path: Path) -> None:
    first = write(tmp_path / "corpus" / "a.txt", "first")
    write(tmp_path / "corpus" / "b.jsonl", '{"text": "second"}\nbroken')
    write(tmp_path / "corpus" / "c.txt", b"\xff")
    stream = with_unique_ids(read_documents([tmp_path / "corpus"]))
    assert next(stream) == Document(
        content_id("a.txt", "first"), "first", {"path": "a.txt"}, str(first)
    )
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
    stream = read_documents([tmp_path])
    assert opened == []
    next(stream)
    assert opened == ["a.txt"]
    next(stream)
    assert opened == ["a.txt", "b.txt"]


# --- tokens ---------------------------------------------------------------------------------------


def characters(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """A tokenizer whose token ids are code points."""
    return {"input_ids": [[ord(character) for character in text] for text in texts]}


def test_tokens_are_the_start_token_and_the_tokenizers_ids(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(["hello", "ä\n", "<eos>", " "])]
    found = list(tokenise(documents, tiny_tokenizer, TokenRules(0, 258)))
    assert [item.document for item in found] == documents
    for item in found:
        expected = [0, *tiny_tokenizer.encode(item.document.text, add_special_tokens=False)]
        assert item.tokens.tolist() == expected
        assert item.tokens.dtype == np.int32
        assert tiny_tokenizer.decode(item.tokens[1:]) == item.document.text


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
