"""add, update, remove, compact and verify on the command line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nearest
from conftest import edit_manifest, make_documents
from folders import replaced
from nearest import Document, Memory
from nearest.encode.loading import load_model_and_tokenizer
from test_bad_input import invoke, refused, works


def written(path: Path, documents: list[Document]) -> Path:
    lines = [json.dumps({"id": d.id, "text": d.text, **d.metadata}) for d in documents]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def world(tmp_path: Path, model_folder: str) -> SimpleNamespace:
    documents = make_documents(6, 20)
    first, later = (
        written(tmp_path / f"{name}.jsonl", part)
        for name, part in (("first", documents[:4]), ("later", documents[4:]))
    )
    memory = tmp_path / "law.memory"
    works("build", model_folder, first, "--out", memory)
    return SimpleNamespace(memory=memory, later=later, documents=documents, folder=tmp_path)


def test_documents_come_change_and_go(world: SimpleNamespace) -> None:
    (info,) = works("add", world.memory, world.later)
    assert (info["documents"], info["segments"], info["snapshot"]) == (6, 2, 2)
    new = Document("doc-1", "quite another text", {"title": "Changed"})
    (info,) = works("update", world.memory, written(world.folder / "new.jsonl", [new]))
    assert (info["documents"], info["removed_documents"], info["snapshot"]) == (6, 1, 3)
    removed = works("remove", world.memory, "--doc", "doc-0", "--doc", "doc-5")
    assert [record["removed"] for record in removed] == ["doc-0", "doc-5"]
    (record,) = works("remove", world.memory, "--where", "title=Changed")
    assert record == {"removed": "doc-1", "metadata": {"title": "Changed"}}
    (plan,) = works("compact", world.memory, "--plan")
    assert (plan["segments"], plan["removed"]) == (3, 4)
    assert 0 < plan["bytes_needed"] < plan["bytes_free"]
    assert len(Memory.open(world.memory).segments) == 3
    (info,) = works("compact", world.memory)
    assert (info["documents"], info["segments"], info["removed_documents"]) == (3, 1, 0)
    memory = Memory.open(world.memory)
    assert [memory.document(number).text for number in range(3)] == [
        d.text for d in (*world.documents[2:4], world.documents[4])
    ]
    (sound,) = works("verify", world.memory, "--keys")
    assert sound["sound"]


def test_a_memory_is_looked_into(world: SimpleNamespace, model_folder: str) -> None:
    told = works("documents", world.memory)
    assert [one["id"] for one in told] == [f"doc-{n}" for n in range(4)]
    assert [one["tokens"] for one in told] == [
        len(Memory.open(world.memory).document_tokens(n)) - 1 for n in range(4)
    ]
    new = Document("titled", "word3 word4 word5", {"title": "A [bold] title"})
    works("add", world.memory, written(world.folder / "new.jsonl", [new]))
    (one,) = works("documents", world.memory, "--where", "title=A [bold] title")
    assert one == {"id": "titled", "tokens": one["tokens"], "metadata": {"title": "A [bold] title"}}
    assert "A [bold] title" in invoke("documents", world.memory).out.splitlines()[-1]
    text = world.documents[2].text
    found = works("search", world.memory, text, "-k", "3")
    expected = Memory.open(world.memory).search_text(
        *load_model_and_tokenizer(model_folder), text, 3
    )
    assert found == [
        {"id": one.document.id, "position": one.position, "distance": one.distance}
        | {"before": one.before, "next": one.next, "after": one.after}
        for one in expected
    ]
    assert f"{found[0]['id']}: …" in invoke("search", world.memory, text, "-k", "1").out
    assert "give one" in refused("search", world.memory, " ")


def test_the_version_is_said() -> None:
    assert invoke("--version").out.strip() == nearest.__version__


def test_what_was_tuned_before_is_said(world: SimpleNamespace) -> None:
    works("tune", world.memory, "--text", world.later, "--method", "suffix")
    (info,) = works("info", world.memory)
    assert info["tuned_before_documents_changed"] == []
    (info,) = works("add", world.memory, world.later)
    assert info["tuned_before_documents_changed"] == ["suffix"]
    assert "settings_of_suffix" in info
    works("tune", world.memory, "--text", world.later, "--method", "suffix")
    (info,) = works("compact", world.memory)
    assert info["tuned_before_documents_changed"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remove", "{memory}"], "say which documents"),
        (["remove", "{memory}", "--doc", "x"], "no document with the id 'x'"),
        (["remove", "{memory}", "--where", "title"], "has no value: write KEY=VALUE"),
        (["add", "{memory}", "{folder}/first.jsonl"], "'doc-0' in"),
        (["update", "{memory}", "{later}"], "is not in"),
        (["compact", "{folder}"], "is not a memory"),
        (["add", "{folder}", "{later}"], "is not a memory"),
    ],
)
def test_mistakes_are_told(world: SimpleNamespace, arguments: list[str], message: str) -> None:
    before = (world.memory / "manifest.json").read_bytes()
    assert message in refused(*(argument.format(**vars(world)) for argument in arguments))
    assert (world.memory / "manifest.json").read_bytes() == before


def test_verify_reads_a_sample_again(world: SimpleNamespace) -> None:
    """Keys and tokens that are sound by themselves and not what the model makes."""
    place = "segments/000001/keys.npy"
    keys = np.load(world.memory / place)
    replaced(world.memory, place, -keys)
    works("verify", world.memory)
    result = invoke("verify", world.memory, "--keys")
    assert (result.code, result.out) == (2, "")
    assert "keys differ from what the model makes" in result.err.replace("\n", " ")
    replaced(world.memory, place, keys)
    works("verify", world.memory, "--keys")
    edit_manifest(world.memory, forget_model)
    assert "name it (--model)" in refused("verify", world.memory, "--keys")


def forget_model(manifest: dict[str, Any]) -> None:
    manifest["model"]["name"] = ""
