# ruff: noqa: F811 - fixtures of another file
"""An evaluation that workers share: the figures of one process."""

import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conftest import make_documents
from forked import Forks
from nearest import Document, Memory, evaluate, read_text
from nearest.build import workers as sharing
from nearest.cli import app
from nearest.errors import FolderError, ModelError, NearestError, SettingError
from nearest.models.scoring import Scorer
from nearest.verbs import evaluate_workers, tally
from nearest.verbs.results import Result
from segments import DOCUMENTS, Model, model, threads  # noqa: F401 - fixtures

LONG = [replace(d, id=f"long {d.id}") for d in make_documents(2, 40, seed=7)]
SHORT = [replace(d, id=f"short {d.id}") for d in make_documents(4, 20, seed=5)]
TEXT = [*SHORT, DOCUMENTS[3], *LONG]  # one of the memory's own
METHODS = ["base", "retomaton", "suffix", "in-context+knn"]
OPTIONS: dict[str, Any] = {
    "lam": 0.4,
    "temperature": 30.0,
    "k": 20,
    "passage_tokens": 8,
    "passage_stride": 32,
    "batch_size": 1,
}
TIMES = {"tok_s", "seconds", "added_ms"}


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Memory:
    path = tmp_path_factory.mktemp("of") / "m"
    return Memory.build(*model, DOCUMENTS, path, tune=False, window=16, keys="fp16")


def assert_same(found: Result, expected: Result) -> None:
    """All figures but times."""
    assert abs(found.nll - expected.nll) <= 1e-9
    np.testing.assert_allclose(found.document_nll, expected.document_nll, rtol=0, atol=1e-9)
    for field in fields(Result):
        if field.name in TIMES | {"document_nll", "document_tokens"}:
            continue
        one, other = (getattr(each, field.name) for each in (found, expected))
        if isinstance(one, float):
            assert one == pytest.approx(other, abs=1e-9), field.name
        elif field.name == "checks":
            assert json.dumps(_rounded(one.to_dict())) == json.dumps(_rounded(other.to_dict()))
        else:
            assert one == other, field.name


def _rounded(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _rounded(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [_rounded(value) for value in told]
    return round(told, 9) if isinstance(told, float) else told


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("workers", "leave_one_out"), [(1, False), (3, True)])
def test_workers_find_what_one_process_finds(
    workers: int, leave_one_out: bool, model: Model, memory: Memory
) -> None:
    seen: list[tuple[str, int, int | None]] = []
    options = {**OPTIONS, "tokenizer": model[1], "leave_one_out": leave_one_out}
    expected = evaluate(model[0], memory, TEXT, METHODS, **options)
    found = evaluate(
        model[0],
        memory,
        TEXT,
        METHODS,
        workers=workers,
        progress=lambda *said: seen.append(said),
        **options,
    )
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert seen[-1][1] == seen[-1][2]
    assert (seen[-1][2] or 0) > 2  # so that there was something to share


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_several_memories_and_the_model_alone(model: Model, memory: Memory, tmp_path: Path) -> None:
    other = Memory.build(*model, TEXT[-4:], tmp_path / "o", tune=False, window=16)
    options: dict[str, Any] = {"tokenizer": model[1], "batch_size": 1}
    several = {**options, "weights": [0.3, 0.5], "min_knns": float("inf")}
    for memories, method, asked in (
        ([memory, other], "retomaton", several),
        (None, "base", options),
    ):
        expected = evaluate(model[0], memories, TEXT, method, **asked)
        assert_same(evaluate(model[0], memories, TEXT, method, workers=2, **asked), expected)


def test_runs_are_of_the_text_alone(model: Model, memory: Memory) -> None:
    """Each block lies in one run, and a run alone gives the same blocks."""
    scorer = Scorer.prepare(model[0], memory, TEXT, tokenizer=model[1], batch_size=1)
    assert isinstance(scorer, Scorer)
    assert [n for run in scorer.runs for n in run] == list(range(len(TEXT)))
    blocks = list(scorer.blocks(lambda *_: None, ""))
    alone = [b for run in scorer.runs for b in scorer.only(run).blocks(lambda *_: None, "")]
    assert len(scorer.runs) > 2
    assert len(blocks) == len(alone)
    for one, other in zip(blocks, alone, strict=True):
        assert torch.equal(one.lm_log_probs, other.lm_log_probs)
        np.testing.assert_array_equal(one.queries.keys, other.queries.keys)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(
    model: Model, memory: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"lam": 0.4, "k": 20, "batch_size": 1, "tokenizer": model[1]}
    expected = evaluate(model[0], memory, TEXT, "retomaton", **options)
    read, mark = tally.read, tmp_path / "died"

    def mortal(patched: str = "nearest.verbs.evaluate_workers.read") -> None:
        def once(*args: Any, **options: Any) -> Any:
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return read(*args, **options)

        pytest.MonkeyPatch().setattr(patched, once)

    monkeypatch.setattr(sharing, "local_workers", forks := Forks(model, mortal))
    found = evaluate(model[0], memory, TEXT, "retomaton", workers=2, **options)
    assert len(forks.pids) == 3
    assert_same(found, expected)


def test_a_document_that_ends_its_process_is_named(
    model: Model, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mortal() -> None:
        def never(*_: Any, **__: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        pytest.MonkeyPatch().setattr("nearest.verbs.evaluate_workers.read", never)

    monkeypatch.setattr(sharing, "local_workers", Forks(model, mortal))
    text = [Document("only one", "a text")]
    with pytest.raises(NearestError, match="that reads document 'only one' ends each time"):
        evaluate(model[0], memory, text, tokenizer=model[1], workers=1)


@pytest.mark.usefixtures("threads")
def test_what_cannot_be_shared_is_said(
    model: Model, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, of: Any = model[0], text: Any = TEXT, **options: Any) -> None:
        with pytest.raises((SettingError, ModelError), match=message):
            evaluate(of, memory, text, tokenizer=model[1], **{"workers": 2, **options})

    refused("workers must be at least 1, got 0", workers=0)
    refused("no records of each token", records=tmp_path / "r.parquet")
    refused("read as one sequence", stream=True)
    refused("was read already", text=read_text(model[0], memory, TEXT, tokenizer=model[1]))
    changed = type(model[0])(model[0].config).eval()
    changed.config._name_or_path = model[0].config._name_or_path
    refused("has other weights than the model that is to be", of=changed, force=True)
    monkeypatch.setattr(changed.config, "_name_or_path", "")
    refused("in RAM alone: save it", of=changed, force=True)


@pytest.mark.usefixtures("threads")
def test_a_worker_that_finds_another_memory_is_told(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same path, and of the same number: as where disks are of each node alone."""
    path, aside = tmp_path / "m", tmp_path / "aside"
    Memory.build(*model, DOCUMENTS[:5], aside, tune=False, window=16)
    memory = Memory.build(*model, DOCUMENTS[5:], path, tune=False, window=16)
    opened = Memory.open

    def another(place: Any, *args: Any) -> Memory:
        return opened(aside if place == path else place, *args)

    monkeypatch.setattr(evaluate_workers.Memory, "open", another)
    with pytest.raises(FolderError, match="is not the snapshot that is evaluated"):
        evaluate(model[0], memory, TEXT, tokenizer=model[1], workers=1, batch_size=1)


@pytest.mark.slow  # to start processes takes seconds
def test_the_command(model_folder: str, memory: Memory, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"id": d.id, "text": d.text}) for d in TEXT))
    call = ["eval", str(memory.path), "--text", str(text), "--json", "--batch-size", "1"]
    call += ["--method", "base,retomaton"]
    told = []
    for more in ((), ("--workers", "2")):
        result = CliRunner().invoke(app, [*call, *more])
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        told.append([{k: v for k, v in json.loads(n).items() if k not in TIMES} for n in lines])
    assert [_rounded(one) for one in told[0]] == [_rounded(one) for one in told[1]]
