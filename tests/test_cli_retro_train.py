# ruff: noqa: F811 - fixtures of another file
"""`nearest retro train`, `fit`, `eval`, `analyse` and `generate`, from a database to a text."""

import itertools
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from nearest.cli import app
from nearest.retro import RetrofitForCausalLM, RetroForCausalLM
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.opening import open_retro
from nearest.retro.runs import read_curve
from retro_models import SIZES
from test_cli_retro import bert, corpus, prepared, run  # noqa: F401 - fixtures

SMALL = {
    **{name: value for name, value in SIZES.items() if "dim" in name or "layers" in name},
    "decoder_heads": 2,
    "encoder_heads": 2,
}
CHANGES = [part for n, v in SMALL.items() for part in ("--set", f"{n}={json.dumps(v)}")]
STEPS = ("--max-steps", 4, "--batch-size", 2, "--save-every", 2, "--lr", 0.01, "--log-every", 1)


def called(*arguments: Any, code: int = 0, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["retro", *map(str, arguments)], input=typed)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def valid(prepared: Path) -> Path:
    corpus(prepared.parent / "valid.jsonl", 4, seed=5)
    table = prepared.parent / "valid.neighbours"
    run("neighbours", prepared, "--queries", prepared.parent / "valid.jsonl", "--table", table)
    return table


@pytest.fixture(scope="module")
def trained(prepared: Path, valid: Path) -> Path:
    out = prepared.parent / "run"
    told = run(
        *("train", prepared, "--out", out, *CHANGES, *STEPS),
        *("--validation", valid, "--validate-every", 2, "--schedule", "cosine", "--json"),
    )
    assert [line["step"] for line in told[:-1]] == [1, 2, 3, 4]
    assert told[-1]["model"] == str(out / "model")
    assert told[-1]["val_loss"] == told[-2]["validation"] == read_curve(out)[-1]["val_loss"]
    return out


@pytest.fixture(scope="module")
def base(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with the tokenizer of the chunks."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(prepared: Path, base: Path) -> Path:
    out = prepared.parent / "fitted"
    run("fit", base, prepared, "--out", out, "--layers", "0,1", *STEPS, "--shuffle-neighbours")
    return out


def test_a_run_leaves_a_model_that_is_known_by_its_folder(trained: Path) -> None:
    model, tokenizer = open_retro(trained, device="cpu")
    assert isinstance(model, RetroForCausalLM)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.chunk_size == 8
    assert model.config.decoder_dim == 32
    again = run(
        "train", trained.parent / "db", "--out", trained, *CHANGES, *STEPS, "--json", code=2
    )
    assert again == []
    checkpoint, _ = open_retro(trained / "checkpoint-2")
    assert not torch.equal(checkpoint.lm_head.weight, model.lm_head.weight)


def test_progress_is_told_with_speed_and_time_left(prepared: Path, tmp_path: Path) -> None:
    result = called("train", prepared, "--out", tmp_path / "run", *CHANGES, *STEPS)
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(" tokens/s  0:00:" in line and line.endswith(" left") for line in lines)


def test_several_texts_and_readings_in_one_call(trained: Path, valid: Path, prepared: Path) -> None:
    own = prepared / "neighbours"
    options = ("--readings", "on,off,shuffled,no-continuation,k=1", "--window", 16, "--json")
    told = run("eval", trained, prepared, "--text", f"{valid},{own}", *options)
    assert [(line["text"], line["reading"]) for line in told] == [
        (text, reading)
        for text in ("valid.neighbours", "neighbours")
        for reading in ("on", "off", "shuffled", "no-continuation", "k=1")
    ]
    first = told[0]
    assert first["delta_nll"] is None
    assert first["ppl"] == pytest.approx(np.exp(first["nll"]))
    assert first["bpb"] > 0
    assert told[1]["delta_low"] <= told[1]["delta_nll"] <= told[1]["delta_high"]
    table = called("eval", trained, prepared, "--text", valid, "--window", 16).stdout
    assert f"{first['ppl']:.3f}" in table


def test_a_retrofit_is_compared_to_its_base(fitted: Path, prepared: Path, base: Path) -> None:
    model, _ = open_retro(fitted)
    assert isinstance(model, RetrofitForCausalLM)
    told = run("eval", fitted, prepared, "--readings", "on,off,base", "--window", 16, "--json")
    on, off, plain = told
    assert off["nll"] == plain["nll"]
    assert plain["delta_nll"] == pytest.approx(plain["nll"] - on["nll"])
    moved = base.with_name("moved")
    base.rename(moved)
    try:
        result = called("eval", fitted, prepared, code=2)
        assert "cannot be loaded" in result.output
        named = run("eval", fitted, prepared, "--base", moved, "--window", 16, "--json")
        assert named[0]["nll"] == on["nll"]
    finally:
        moved.rename(base)


def test_the_public_figure_is_of_first_tokens(trained: Path, prepared: Path) -> None:
    (told,) = run(
        *("eval", trained, prepared, "--as", "norlund", "--window", 16, "--readings", "on"),
        "--json",
    )
    lengths = ChunkDatabase.open(prepared).chunks.lengths
    assert told["tokens"] == np.minimum(lengths, 16).sum() - len(lengths)


@pytest.mark.slow
def test_an_analysis_is_a_folder(trained: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    told = run("analyse", trained, prepared, "--out", out, "--window", 16, "--json")
    assert {line["by"] for line in told} == {"share", "match"}
    shares = [line["up_to"] for line in told if line["by"] == "share"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert "<svg" in (out / "overlap.html").read_text()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    result = called("analyse", trained, prepared, "--out", tmp_path / "full", code=2)
    assert "which is not of an earlier analysis" in result.output


PROMPT = " ".join(f"w{i}" for i in range(10))


def test_neighbours_from_a_database_are_shown_with_their_sources(
    trained: Path,
    prepared: Path,
) -> None:
    options = ("--database", prepared, "--max-new-tokens", 12, "--no-repeat-ngram", 2)
    more = ("--min-length", 12, "--prompt", PROMPT)
    (told,) = run("generate", trained, *options, *more, "--json")
    assert told["prompt"] == PROMPT
    words = told["text"].split()
    pairs = list(itertools.pairwise(words))
    assert len(set(pairs)) == len(pairs) >= 10
    assert len(told["chunks"]) == (10 + 12) // 8
    assert told["chunks"][0]["text"] == " ".join(PROMPT.split()[:8])
    names = {f"d0-{i}" for i in range(12)}
    for chunk in told["chunks"]:
        assert len(chunk["neighbours"]) == 2
        for neighbour in chunk["neighbours"]:
            source = neighbour["source"]
            assert source["document"] in names
            assert source["position"] % 8 == 0
    shown = called("generate", trained, *options, *more)
    source = told["chunks"][0]["neighbours"][0]["source"]
    assert f"{source['document']} at {source['position']}" in shown.stderr
    assert PROMPT + told["text"] in shown.stdout.replace("\n", "")


def test_prompts_are_read_until_they_end(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("w1 w2 w3\n\nw4 w5\n")
    given = ("--neighbours-file", tmp_path / "given.txt", "--max-new-tokens", 3, "--json")
    typed = f"{PROMPT}\n\nw3 w4\n"
    result = called("generate", trained, *given, typed=typed)
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert (first["prompt"], second["prompt"]) == (PROMPT, "w3 w4")
    assert first["chunks"][0]["neighbours"] == [
        {"text": "w1 w2 w3", "source": None},
        {"text": "w4 w5", "source": None},
    ]
    assert second["chunks"] == []


def test_neighbours_are_typed(trained: Path) -> None:
    options = ("--ask", "--neighbours", 1, "--max-new-tokens", 2, "--prompt", PROMPT, "--json")
    result = called("generate", trained, *options, typed="w9 w9\n")
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["chunks"][0]["neighbours"] == [{"text": "w9 w9", "source": None}]
    ended = called("generate", trained, *options, typed="", code=2)
    assert "ended before all neighbours were typed" in ended.output


def test_a_failing_prompt_does_not_end_the_loop(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nearest.errors import NearestError
    from nearest.retro import FixedNeighbours

    (tmp_path / "given.txt").write_text("w1 w2\n")
    calls: list[int] = []

    def gone(self: FixedNeighbours, chunks: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise NearestError("the service is gone")
        return self.ids.expand(len(chunks), -1, -1)

    monkeypatch.setattr(FixedNeighbours, "__call__", gone)
    given = ("--neighbours-file", tmp_path / "given.txt", "--max-new-tokens", 2, "--json")
    result = called("generate", trained, *given, typed=f"{PROMPT}\n{PROMPT}\n")
    assert "error: the service is gone" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_a_service_that_is_not_there_is_named(trained: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = called("generate", trained, "--service", url, "--prompt", PROMPT, code=2)
    assert "127.0.0.1" in result.output
    assert "Traceback" not in result.output
    both = called("generate", trained, "--ask", "--service", url, "--prompt", PROMPT, code=2)
    assert "--ask and --service are given" in both.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--validate-every", 5), "validate_every 5 is beyond the run's 4 steps"),
        (("--max-len", 12), "window 12 must be a multiple of the chunk size, 8"),
        (("--neighbours", 21), "21 neighbours are asked for, but the table stores 20"),
        (("--set", "decoder_dims=3"), "'decoder_dims' is no setting of a RETRO model"),
        (("--set", "decoder_dim"), "is no NAME=VALUE"),
        (("--set", "vocab_size=9"), "but the model's vocabulary has 9"),
        (("--set", "chunk_size=4"), "the model reads chunks of 4 tokens, the corpus has chunks"),
        (("--neighbour-dropout", 2), "neighbour_dropout must lie in"),
        (("--table", "nowhere"), "nowhere"),
    ],
)
def test_what_does_not_fit_is_named(
    prepared: Path,
    tmp_path: Path,
    options: tuple[Any, ...],
    message: str,
) -> None:
    result = called(
        "train", prepared, "--out", tmp_path / "run", *CHANGES, *STEPS, *options, code=2
    )
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_a_resume_with_other_settings_names_them(trained: Path, prepared: Path) -> None:
    options = ("--out", trained, *CHANGES, "--max-steps", 4, "--batch-size", 4, "--seed", 3)
    said = " ".join(called("train", prepared, *options, code=2).output.split())
    for difference in (
        "settings.seed was 0, is 3",
        "settings.passages_a_step was 2, is 4",
        "settings.learning_rate was 0.01, is None",
        "settings.schedule was cosine, is constant",
    ):
        assert difference in said


def test_other_models_are_told_apart(
    base: Path,
    trained: Path,
    prepared: Path,
    tmp_path: Path,
) -> None:
    plain = " ".join(called("eval", base, prepared, code=2).output.split())
    assert "is a plain gpt2 model, which reads no neighbours: fit them to it with" in plain
    nothing = " ".join(called("eval", tmp_path, prepared, code=2).output.split())
    assert "holds no RETRO model" in nothing
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in (trained / "model").iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps({**config, "decoder_layers": 4}))
    other = " ".join(called("eval", mixed, prepared, code=2).output.split())
    assert "holds other weights than its config.json tells of" in other
    scratch = " ".join(
        called("eval", trained, prepared, "--readings", "base", code=2).output.split()
    )
    assert "this model was trained from scratch" in scratch


def test_chunks_of_another_vocabulary_are_refused(
    base: Path,
    prepared: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["zzz"])
    model = GPT2LMHeadModel.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    result = called("fit", other, prepared, "--out", tmp_path / "run", "--layers", "1", code=2)
    assert "was cut with another tokenizer than the model's" in " ".join(result.output.split())
