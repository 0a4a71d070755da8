"""Corpora on the command line: pipes, folders that change, links, PDF files, and what is told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nearest import Memory, read_documents
from nearest.cli import app


def works(*arguments: Any) -> dict[str, Any]:
    """Run a command in this process: the object that it prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def ids(memory: Path) -> list[str]:
    opened = Memory.open(memory)
    return sorted(opened.document(number).id for number in range(opened.documents))


def text_pdf(text: str) -> bytes:
    """A PDF file of one page with a line of text, written by hand."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n"
        % (len(places) + 1, table, len(places) + 1, len(data))
        + b"%%EOF\n"
    )


@pytest.mark.filterwarnings("ignore::nearest.corpus.report.CorpusWarning")
def test_the_text_of_a_pdf_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(text_pdf("Bees need a permit"))
    (document,) = read_documents(tmp_path)
    assert (document.id, document.text) == ("a.pdf", "Bees need a permit")


def test_a_folder_that_changes_is_synced_by_the_command(tmp_path: Path, model_folder: str) -> None:
    folder, memory, outside = tmp_path / "c", tmp_path / "m", tmp_path / "outside"
    for path, text in {
        folder / "fee.md": "the fee is 10",
        folder / "old.md": "old",
        folder / "a.py": "x = 1",
        folder / "photo.png": "x",
        folder / "left-out.txt": "no",
        outside / "linked.md": "linked",
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "docs").symlink_to(outside)
    options = ["--suffix", ".py", "--exclude", "left-out*"]
    build = ["build", model_folder, folder, "--out", memory, "--keys", "none"]
    plan = works(*build, "--plan", *options)
    made = works(*build, *options)
    assert made["corpus"] == plan["corpus"]
    assert made["corpus"] == {"documents": 4, "skipped": {"excluded": 1, ".png": 1}}
    assert ids(memory) == ["a.py", "docs/linked.md", "fee.md", "old.md"]
    (folder / "fee.md").write_text("the fee is 99")
    (folder / "old.md").unlink()
    (folder / "new.md").write_text("new")
    counts = {"equal": 2, "replaced": 1, "removed": 1, "added": 1, "kept": 0}
    would = works("sync", memory, folder, "--dry-run", *options)
    assert counts.items() <= would.items()
    assert would["dry_run"] is True
    assert ids(memory) == ["a.py", "docs/linked.md", "fee.md", "old.md"]
    synced = works("sync", memory, folder, *options)
    assert counts.items() <= synced.items()
    assert ids(memory) == ["a.py", "docs/linked.md", "fee.md", "new.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "options", "texts"),
    [
        ('{"text": "a b"}\n{"text": "c"}\n', [], ["a b", "c"]),
        ("id,text\n1,one\n", ["--format", "csv"], ["one"]),
    ],
    ids=["rows", "a table"],
)
def test_standard_input_is_a_corpus(
    given: str, options: list[str], texts: list[str], tmp_path: Path, model_folder: str
) -> None:
    command = ["build", model_folder, "-", "--out", str(tmp_path / "m"), "--keys", "none", *options]
    done = subprocess.run(
        [sys.executable, "-m", "nearest", *command],
        input=given,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    memory = Memory.open(tmp_path / "m")
    assert [memory.document(number).text for number in range(memory.documents)] == texts
