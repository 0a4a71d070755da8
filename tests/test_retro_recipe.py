"""The recipe of a RETROfit on law, on a corpus and a model that take seconds."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from nearest.cli import app

ROOT = Path(__file__).parents[1]
WORDS = [f"word{i}" for i in range(40)]


def script(name: str) -> Any:
    path = ROOT / f"examples/retrofit_law/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its commands run in this process, which has everything loaded."""
    module = script("recipe")

    def nearest(*words: Any) -> list[dict[str, Any]]:
        result = CliRunner().invoke(app, ["retro", *map(str, words), "--json"])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]

    monkeypatch.setattr(module, "nearest", nearest)
    return module


def corpus(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("valid", 4), ("test", 4)):
        texts = [" ".join(rng.choice(WORDS, int(rng.integers(60, 120)))) for _ in range(count)]
        lines = [json.dumps({"id": f"{name}-{i}", "text": t}) for i, t in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def model(folder: Path) -> Path:
    """Of the shipped tokenizer, and so of its vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src/nearest/demo/general-gpt2-7m")
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=6, n_head=2, n_positions=512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_from_two_files_to_a_table_and_a_page(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, text, base = tmp_path / "work", corpus(tmp_path / "law"), model(tmp_path / "base")
    arguments = ["--model", base, "--corpus", text, "--work", work, "--minutes", "0.01"]
    monkeypatch.setattr("sys.argv", ["recipe.py", *map(str, arguments)])
    recipe.main()
    results = json.loads((work / "results.json").read_text())
    readings = ["on", "off", "base", "shuffled", "no-continuation"]
    assert [result["reading"] for result in results] == readings
    assert results[1]["nll"] == results[2]["nll"]
    assert "shuffled  ppl" in capsys.readouterr().out
    curve = [json.loads(line) for line in (work / "run/curve.jsonl").read_text().splitlines()]
    assert curve[0]["step"] == 0
    assert curve[-1]["step"] == json.loads((work / "steps.json").read_text()) >= 10
    assert (work / "report/overlap.html").exists()
    before = (work / "run/model/adapter_model.safetensors").read_bytes()
    recipe.main()  # nothing is done twice
    assert (work / "run/model/adapter_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_what_it_is_compared_to(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, text, base = tmp_path / "work", corpus(tmp_path / "law"), model(tmp_path / "base")
    arguments = ["--model", base, "--corpus", text, "--work", work, "--minutes", "0.01"]
    monkeypatch.setattr("sys.argv", ["recipe.py", *map(str, arguments)])
    recipe.main()
    arguments = ["--model", base, "--work", work, "--steps", "4", "--layers", "1"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, arguments)])
    script("finetune").main()
    arguments = ["--model", base, "--corpus", text, "--work", work, "--together"]
    monkeypatch.setattr("sys.argv", ["table.py", *map(str, arguments)])
    capsys.readouterr()
    script("table").main()
    rows = {row.pop("row"): row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["RETROfit, base"]["ppl"] == pytest.approx(rows["base"]["ppl"], rel=1e-5)
    # the same neighbours, whether the table says them or they are looked up by their chunk
    assert rows["RETROfit + base"]["ppl"] == pytest.approx(rows["RETROfit, on"]["ppl"], rel=1e-5)
    assert rows["finetuned-1"]["ppl"] < rows["base"]["ppl"]
    assert {"knn", "hybrid", "RETROfit + hybrid"} < set(rows)
    assert len({row["tokens"] for row in rows.values()}) == 1
