"""A memory that a tokenizer alone makes: no language model, no keys."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import make_documents, make_tokenizer
from nearest import Memory, evaluate
from nearest.cli import app
from nearest.errors import ModelError, SettingError

DOCUMENTS = make_documents(8, 30)


@pytest.fixture
def memory(tmp_path: Path, tiny_tokenizer: Any) -> Memory:
    return Memory.build(None, tiny_tokenizer, DOCUMENTS[:5], tmp_path / "m.memory")


def test_its_tokens_are_those_that_a_model_would_read(
    memory: Memory, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    whole = Memory.build(
        tiny_model, tiny_tokenizer, DOCUMENTS[:5], tmp_path / "whole", keys="none", tune=False
    )
    for number in range(5):
        tokens = memory.document_tokens(number)
        np.testing.assert_array_equal(tokens, whole.document_tokens(number))
    info = memory.info()
    assert (info["model"], info["keys"], info["documents"]) == ("none", "none", 5)
    for method in ("suffix", "base"):
        one, other = (
            evaluate(tiny_model, m, DOCUMENTS[5:], method=method, tokenizer=tiny_tokenizer)
            for m in (memory, whole)
        )
        assert one.nll == other.nll


def test_its_life_needs_no_model(memory: Memory, tiny_tokenizer: Any) -> None:
    grown = memory.add(None, tiny_tokenizer, DOCUMENTS[5:7])
    assert grown.documents == 7
    shrunk = grown.remove([DOCUMENTS[0].id]).compact()
    assert [shrunk.document(n).id for n in range(6)] == [d.id for d in DOCUMENTS[1:7]]
    synced, counts = shrunk.sync(None, tiny_tokenizer, DOCUMENTS[2:8])
    assert (counts.equal, counts.removed, counts.added) == (5, 1, 1)
    assert synced.verify() == []
    again = synced.update(None, tiny_tokenizer, [DOCUMENTS[7]])
    assert again.documents == 6


def test_what_needs_keys_or_a_model_says_so(
    memory: Memory, tiny_memory: Memory, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"no keys .*tokenizer alone.*build it with a model"):
        evaluate(tiny_model, memory, DOCUMENTS[5:], method="knn", tokenizer=tiny_tokenizer)
    with pytest.raises(SettingError, match="no keys"):
        memory.cluster(4)
    with pytest.raises(SettingError, match="tokenizer alone is given: give a model"):
        Memory.build(None, tiny_tokenizer, DOCUMENTS, tmp_path / "k", keys="int8")
    assert not (tmp_path / "k").exists()
    with pytest.raises(SettingError, match=r"needs the model .* to read documents"):
        tiny_memory.add(None, tiny_tokenizer, DOCUMENTS[:1])
    other = make_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ModelError, match="tokenizer differs"):
        memory.add(None, other, DOCUMENTS[5:])


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_on_the_command_line(model_folder: str, tmp_path: Path) -> None:
    corpus, more, path = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "m"
    for file, some in ((corpus, DOCUMENTS[:6]), (more, DOCUMENTS[6:])):
        file.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in some))
    run("build", "--tokenizer", model_folder, corpus, "--out", path)
    run("add", path, more)
    assert json.loads(run("info", path, "--json"))["documents"] == 8
    run("remove", path, "--doc", DOCUMENTS[0].id)
    run("sync", path, more)
    run("compact", path)
    run("verify", path)
    output = run("eval", path, "--text", corpus, "--method", "suffix", code=2)
    assert "alone: name a language model" in " ".join(output.split())
    run("eval", path, "--text", corpus, "--method", "suffix", "--model", model_folder)
    output = run("build", "--tokenizer", tmp_path / "no", corpus, "--out", tmp_path / "n", code=2)
    assert "no tokenizer can be loaded" in " ".join(output.split())
    output = run("build", model_folder, "--out", tmp_path / "n", code=2)
    assert "name a corpus, too" in " ".join(output.split())
    assert not (tmp_path / "n").exists()
