"""Folders and files as people have them: what is read, what is left out, and what is said of it."""

import gzip
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docx
import pypdf
import pytest

from nearest.corpus.reading import read_documents
from nearest.errors import CorpusError

MANY = "of a kind that is read"


@dataclass(frozen=True)
class Situation:
    """Files, what is read of them (text by id), and what is left out (count by reason)."""

    files: Mapping[str, bytes | str]
    texts: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[str, ...] = ("c",)


def pdf(password: str | None = None) -> bytes:
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def word(*paragraphs: str) -> bytes:
    document = docx.Document()
    for paragraph in paragraphs:
        document.add_paragraph(paragraph)
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def notebook(*cells: tuple[str, Any]) -> str:
    found = [{"cell_type": kind, "source": source, "outputs": ["no"]} for kind, source in cells]
    return json.dumps({"cells": found, "nbformat": 4, "metadata": {}})


pytestmark = pytest.mark.filterwarnings("ignore::nearest.corpus.report.CorpusWarning")

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FRENCH = "Le café est fermé, déjà. " * 20

SITUATIONS: dict[str, Situation] = {
    # --- line ends, marks and encodings
    "old Mac line ends": Situation({"c/a.txt": "one\rtwo\r"}, {"a.txt": "one\ntwo\n"}),
    "old Mac line ends of a table": Situation({"c/a.csv": "id,text\r1,one\r"}, {"1": "one"}),
    "old Mac line ends of rows": Situation(
        {"c/a.jsonl": '{"id":1,"text":"a"}\r{"id":2,"text":"b"}\r'}, {"1": "a", "2": "b"}
    ),
    "a carriage return in a cell": Situation({"c/a.csv": 'id,text\r\n1,"a\rb"\r\n'}, {"1": "a\rb"}),
    "DOS's mark of the end": Situation(
        {"c/a.txt": b"a few words\x1a"}, {"a.txt": "a few words\x1a"}
    ),
    "French, detected": Situation(
        {"c/a.txt": FRENCH.encode("latin-1")}, {"a.txt": FRENCH}, options={"encoding": "auto"}
    ),
    "a pickle": Situation(
        {"c/a.txt": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0", "c/b.txt": "b"},
        {"b.txt": "b"},
        {"binary": 1},
    ),
    "Git LFS pointers": Situation(
        {"c/a.txt": LFS, "c/b.parquet": LFS, "c/c.txt": "c"},
        {"c.txt": "c"},
        {"Git LFS pointers, not fetched": 2},
    ),
    "a Git LFS pointer by name": Situation(
        {"a.txt": LFS}, refused="git lfs pull", paths=("a.txt",)
    ),
    # --- tables
    "blank lines before a table": Situation({"c/a.csv": "\n\nid,text\n1,one\n"}, {"1": "one"}),
    "Excel's line about the separator": Situation(
        {"c/a.csv": "sep=;\nid;text\n1;one, two\n"}, {"1": "one, two"}
    ),
    "Excel's line about a quote": Situation(
        {"c/a.csv": 'sep="\nid,text\n1,one\n', "c/b.csv": "sep=\r\nid,text\r\n2,two\r\n"},
        {"1": "one", "2": "two"},
    ),
    "a table of one column": Situation({"c/a.csv": 'text\n"a, b"\n'}, {"a.csv#0": "a, b"}),
    # --- JSON that is no corpus, in a folder of other things
    "settings with comments": Situation(
        {"c/tsconfig.json": '{ // no\n "x": 1,\n}', "c/b.txt": "b"}, {"b.txt": "b"}, {"not JSON": 1}
    ),
    "numbers": Situation(
        {"c/a.json": "[1, 2]", "c/b.json": "null", "c/b.txt": "b"},
        {"b.txt": "b"},
        {"JSON without documents": 2},
    ),
    "settings of a package": Situation(
        {"c/package.json": '{"name": "x"}', "c/b.txt": "b"},
        {"b.txt": "b"},
        {"without a field 'text'": 1},
    ),
    "numbers by name": Situation({"a.json": "[1]"}, refused="not a JSON object", paths=("a.json",)),
    "an array named .jsonl": Situation(
        {"a.jsonl": '[{"text": "a"},\n{"text": "b"}]'}, refused="--format json", paths=("a.jsonl",)
    ),
    "an array named .jsonl, read as JSON": Situation(
        {"a.jsonl": '[{"id": 1, "text": "a"},\n{"id": 2, "text": "b"}]'},
        {"1": "a", "2": "b"},
        options={"format": "json"},
        paths=("a.jsonl",),
    ),
    "objects of one line and of several": Situation(
        {"c/a.json": '{"id": 1, "text": "a"}\n{\n"id": 2,\n"text": "b"}\n[{"id": 3, "text": "c"}]'},
        {"1": "a", "2": "b", "3": "c"},
    ),
    "JSON that is cut short after its first object": Situation(
        {"c/a.json": '{"text": "a"}\n\n{"text": "b'}, refused=r"a\.json from line 3 on is not JSON"
    ),
    "a row that is cut short": Situation(
        {"c/a.jsonl": '{"text": "a"}\n{"text": "b'}, refused=r"a\.jsonl:2 is not JSON"
    ),
    # --- pages
    "indented code of a page": Situation(
        {"c/a.html": "<p>So:<pre>def f():\n    return  1\n</pre><p>end"},
        {"a.html": "So:\ndef f():\n    return  1\nend"},
    ),
    "drawings and forms of a page": Situation(
        {"c/a.html": "<p>x</p><svg><title>t</title><text>t</text></svg><select><option>1<option>2"},
        {"a.html": "x\n1\n2"},
    ),
    "a page that declares its encoding as XML does": Situation(
        {
            "c/a.xhtml": '<?xml version="1.0" encoding="ISO-8859-1"?><p>caf\xe9</p>'.encode(
                "latin-1"
            )
        },
        {"a.xhtml": "café"},
    ),
    "a page without a body": Situation(
        {"c/a.html": "<frameset><frame src=x></frameset>", "c/b.txt": "b"},
        {"b.txt": "b"},
        {"empty": 1},
    ),
    "a notebook": Situation(
        {
            "c/a.ipynb": notebook(
                ("markdown", ["# Title\n", "words"]), ("code", "x = 1"), ("raw", ""), ("code", [])
            )
        },
        {"a.ipynb": "# Title\nwords\n\nx = 1"},
    ),
    "no notebook": Situation(
        {"c/a.ipynb": "[1]", "c/b.ipynb": "{", "c/b.txt": "b"}, {"b.txt": "b"}, {"damaged": 2}
    ),
    "PDF and Word files that cannot be read": Situation(
        {
            "c/a.pdf": b"%PDF-1.4 nothing",
            "c/b.pdf": b"<html>not found</html>",
            "c/c.docx": b"PK\x03\x04rest",
            "c/d.pdf": pdf("secret"),
            "c/e.pdf": pdf(),
            "c/f.docx": word(),
            "c/~$g.docx": b"\x05User",
            "c/g.docx": word("words", "more"),
        },
        {"g.docx": "words\nmore"},
        {"damaged": 3, "encrypted": 1, "empty": 2, "hidden": 1},
    ),
    "a damaged PDF file by name": Situation(
        {"a.pdf": b"%PDF-1.4"}, refused="is damaged", paths=("a.pdf",)
    ),
    "an empty PDF file": Situation({"c/a.pdf": b"", "c/b.txt": "b"}, {"b.txt": "b"}, {"empty": 1}),
    # --- what is named
    "one file twice": Situation(
        {"c/a.txt": "a"}, {"a.txt": "a"}, {"named twice": 1}, paths=("c/a.txt", "c/a.txt")
    ),
    "a folder, and a folder in it": Situation(
        {"c/x/a.txt": "a", "c/b.txt": "b"},
        {"b.txt": "b", "x/a.txt": "a"},
        {"named twice": 1},
        paths=("c", "c/x"),
    ),
    "an address": Situation(
        {}, refused="https://example.com/x.txt is an address", paths=("https://example.com/x.txt",)
    ),
    "an address as a file": Situation({}, refused="is an address", paths=("file:///x.txt",)),
    "nothing": Situation({"c/a.txt": "a"}, refused="empty", paths=("",)),
    "suffixes of two parts, of commas, of stars": Situation(
        {"c/a.d.ts": "a", "c/b.py": "b", "c/c.c": "c", "c/d.h": "d", "c/e.ts": "no"},
        {"a.d.ts": "a", "b.py": "b", "c.c": "c", "d.h": "d"},
        {".ts": 1},
        options={"suffixes": [".d.ts", ".py,.c", "*.H"]},
    ),
    "files without a suffix": Situation(
        {"c/LICENSE": "a", "c/b.py": "b"}, {"LICENSE": "a"}, {".py": 1}, options={"suffixes": [""]}
    ),
    "upper case": Situation(
        {"c/A.TXT": "a", "c/B.Md.GZ": gzip.compress(b"b")}, {"A.TXT": "a", "B.Md.GZ": "b"}
    ),
    "a folder left out": Situation(
        {"c/x/a.txt": "a", "c/b.txt": "b"}, {"b.txt": "b"}, {"excluded": 1}, "", {"exclude": ["x/"]}
    ),
    "a path left out": Situation(
        {"c/x/a.txt": "a", "c/x/b.txt": "b"},
        {"x/b.txt": "b"},
        {"excluded": 1},
        "",
        {"exclude": ["./x/a.txt"]},
    ),
    "a path left out, as it is typed": Situation(
        {"c/x/a.txt": "a", "c/x/b.txt": "b"},
        {"x/b.txt": "b"},
        {"excluded": 1},
        "",
        {"exclude": ["c/x/a.txt"]},
    ),
    # --- our own
    "a segment of a memory, copied": Situation(
        {
            "c/old/documents.jsonl.zst": b"x",
            "c/old/tokens.npy": b"x",
            "c/old/offsets.npy": b"x",
            "c/b.txt": "b",
        },
        {"b.txt": "b"},
        {"of our own": 1},
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_what_people_have_is_read_or_told(
    situation: Situation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in situation.files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    if situation.refused:
        with pytest.raises(CorpusError, match=situation.refused):
            list(read_documents(situation.paths, **situation.options))
        return
    corpus = read_documents(situation.paths, **situation.options)
    read = {d.id if "#" not in d.id else f"{d.id.split('#')[0]}#0": d.text for d in corpus}
    assert read == situation.texts
    assert corpus.report.skipped == situation.skipped


def test_a_pattern_that_leaves_nothing_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.log").write_text("b")
    corpus = read_documents(tmp_path, exclude=["*.log", "secret*"])
    assert [document.id for document in corpus] == ["a.txt"]
    assert corpus.report.notable
    assert "nothing is called 'secret*' (--exclude)" in str(corpus.report)
    assert corpus.report.to_dict()["unmatched"] == ["secret*"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(CorpusError, match=r"a\.txt cannot be read \(Permission denied"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["pipe", "link to itself", "link to nothing"],
)
def test_a_folder_with_what_is_no_file_is_read(make: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    make(tmp_path / "b.txt")
    corpus = read_documents(tmp_path)
    assert [document.id for document in corpus] == ["a.txt"]
    assert sum(corpus.report.skipped.values()) == 1
