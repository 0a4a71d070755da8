"""The command line with an encoder–decoder: from a file of pairs to a translation with sources."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import make_documents
from nearest import Memory, evaluate, read_documents
from pairs import make_pair_model, make_pair_tokenizer, pair_documents
from test_cli import invoke, json_lines, write_jsonl

DOCUMENTS = pair_documents(6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model's folder, files of pairs, and a memory built by the command."""
    folder = tmp_path_factory.mktemp("pairs")
    make_pair_model().save_pretrained(folder / "t5")
    make_pair_tokenizer().save_pretrained(folder / "t5")
    corpus = write_jsonl(folder / "pairs.jsonl", DOCUMENTS)
    text = write_jsonl(folder / "text.jsonl", pair_documents(2, seed=5))
    memory = folder / "m"
    (info,) = json_lines("build", folder / "t5", corpus, "--out", memory)
    return SimpleNamespace(folder=folder, model=folder / "t5", text=text, memory=memory, info=info)


def test_a_memory_of_pairs_is_built_and_described(world: Any) -> None:
    assert world.info["model_kind"] == "encoder–decoder"
    assert world.info["documents"] == len(DOCUMENTS)
    assert {"sources", "source_offsets"} <= world.info["files"].keys()
    assert "encoder–decoder" in invoke("info", world.memory).out
    corpus = world.folder / "pairs.jsonl"
    (plan,) = json_lines("build", world.model, corpus, "--out", world.folder / "new", "--plan")
    assert plan["entries"] == pytest.approx(world.info["entries"], rel=0.02)


def test_a_text_of_pairs_is_tuned_on_and_scored(world: Any) -> None:
    json_lines("tune", world.memory, "--text", world.text)
    methods = ["base", "knn", "retomaton", "suffix"]
    results = json_lines("eval", world.memory, "--text", world.text, "--method", ",".join(methods))
    memory, tokenizer = Memory.open(world.memory), make_pair_tokenizer()
    texts = read_documents([world.text])
    expected = evaluate(make_pair_model(), memory, texts, methods, tokenizer=tokenizer)
    for result, one in zip(results, expected, strict=True):
        assert result["nll"] == pytest.approx(one.nll, rel=1e-5)
    stays = invoke("eval", world.memory, "--text", world.text, "--score-eos")
    assert (stays.code, "ends are always scored" in stays.err) == (2, True)


def test_a_source_is_answered_with_its_documents(world: Any) -> None:
    document = DOCUMENTS[2]
    options = ["--lam", "1", "--knn-temperature", "0.001", "--k", "1", "--sources"]
    prompt = ["--prompt", document.encoder_text, "--max-new-tokens", "70"]
    (answer,) = json_lines("generate", world.memory, *prompt, *options)
    assert answer["text"] == document.text
    assert answer["documents"][0]["id"] == document.id
    shown = invoke("generate", world.memory, *prompt, *options).out
    assert shown.startswith(f"{document.encoder_text}\n")
    for nothing in ("base", "knn"):
        empty = invoke("generate", world.memory, "--prompt", "", "--method", nothing)
        assert (empty.code, "no text for the encoder" in empty.err) == (2, True)


def test_pairs_come_and_go(world: Any, tmp_path: Path) -> None:
    memory = tmp_path / "m"
    first = write_jsonl(tmp_path / "first.jsonl", DOCUMENTS[:3])
    more = write_jsonl(tmp_path / "more.jsonl", DOCUMENTS[3:])
    json_lines("build", world.model, first, "--out", memory)
    (added,) = json_lines("add", memory, more)
    assert added["documents"] == 6
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps({"id": "pair-1", "source": "neu", "text": "new"}) + "\n")
    json_lines("update", memory, changed)
    json_lines("remove", memory, "--doc", "pair-2")
    assert json_lines("verify", memory, "--keys")[0]["sound"]
    (compacted,) = json_lines("compact", memory)
    assert (compacted["documents"], compacted["segments"]) == (5, 1)
    assert json_lines("verify", memory, "--keys")[0]["sound"]


def test_what_has_no_source_is_explained(world: Any, tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", make_documents(2, 9))
    refused = "no text for the encoder, and this model is an encoder–decoder"
    for command in (
        ["build", world.model, plain, "--out", tmp_path / "m"],
        ["build", world.model, plain, "--out", tmp_path / "m", "--plan"],
        ["add", world.memory, plain],
        ["eval", world.memory, "--text", plain],
    ):
        result = invoke(*command)
        assert result.code == 2
        assert refused in result.err.replace("\n", " ")
        assert "Traceback" not in result.err
    assert not (tmp_path / "m").exists()


def test_models_of_the_other_kind_are_explained(
    world: Any, tmp_path: Path, model_folder: str
) -> None:
    result = invoke("eval", world.memory, "--text", world.text, "--model", model_folder, "--force")
    assert result.code == 2
    assert "is a memory of an encoder–decoder" in result.err.replace("\n", " ")
