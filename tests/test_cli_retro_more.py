# ruff: noqa: F811 - fixtures of another file
"""Options of `nearest retro` that say which part of a text is read, and what does not fit them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nearest import Memory
from nearest.retro import MemoryNeighbours, NeighbourTable
from nearest.retro.convert import to_norlund
from nearest.retro.data.database import ChunkDatabase
from retro_models import tiny_model
from serving import roomy_model, serving
from test_cli_retro import bert, corpus, prepared, run  # noqa: F401 - fixtures
from test_cli_retro_train import (
    CHANGES,
    PROMPT,
    STEPS,
    base,  # noqa: F401
    called,
    fitted,  # noqa: F401
    trained,  # noqa: F401
    valid,  # noqa: F401
)

ONE = ("--max-steps", 1, "--batch-size", 2)
WORDS_AND_SPECIAL = 64


def said(*arguments: Any) -> str:
    """What a refusal tells, on one line."""
    return " ".join(called(*arguments, code=2).output.split())


@pytest.mark.slow
def test_which_part_of_a_text_is_learnt_from(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("3\n1\n7\n")
    part = ("--subset", tmp_path / "some.txt", "--continuations", 2, "--first-only")
    run("train", prepared, "--out", tmp_path / "run", *CHANGES, *ONE, *part, "--max-len", 16)
    told = json.loads((tmp_path / "run/settings.json").read_text())["data"]
    assert (told["documents"], told["continuation"], told["window"]) == (3, 2, 16)
    lengths = ChunkDatabase.open(prepared).chunks.lengths[[3, 1, 7]]
    assert lengths.max() > 16
    assert told["passages"] == 3
    run("train", prepared, "--out", tmp_path / "whole", *CHANGES, *ONE, *part[:2], "--max-len", 16)
    told = json.loads((tmp_path / "whole/settings.json").read_text())["data"]
    assert told["passages"] == sum(-(-int(n) // 16) for n in lengths)


def test_one_table_is_one_path(prepared: Path, valid: Path, tmp_path: Path) -> None:
    """A comma is a letter of it."""
    odd = valid.with_name("a,b.neighbours")
    NeighbourTable.open(valid).save(odd)
    valid.with_name("valid.neighbours.queries").rename(valid.with_name("a,b.neighbours.queries"))
    try:
        told = run(
            *("train", prepared, "--out", tmp_path / "run", *CHANGES, *ONE, "--validation", odd),
            "--json",
        )
        assert told[-1]["val_loss"] > 0
    finally:
        valid.with_name("a,b.neighbours.queries").rename(
            valid.with_name("valid.neighbours.queries")
        )
    both = f"{valid},{prepared / 'neighbours'}"
    for option in ("--validation", "--table"):
        refused = said("train", prepared, "--out", tmp_path / "no", *CHANGES, *ONE, option, both)
        assert "is not a neighbour table" in refused


def test_a_table_of_another_corpus_is_not_learnt_from(
    prepared: Path, bert: str, tmp_path: Path
) -> None:
    corpus(tmp_path / "other.jsonl", 4, seed=9)
    options = ("--tokenizer", bert, "--chunk-size", 8)
    run("chunks", tmp_path / "other.jsonl", "--out", tmp_path / "other", *options)
    table = ("--table", prepared / "neighbours")
    refused = said("train", tmp_path / "other", "--out", tmp_path / "run", *CHANGES, *ONE, *table)
    assert "the table was made for other queries" in refused


def test_a_table_that_is_named_must_be_there(prepared: Path) -> None:
    assert "nowhere" in said("verify", prepared, "--table", "nowhere")


def test_the_public_figure_has_no_stride(trained: Path, prepared: Path) -> None:
    read = ("eval", trained, prepared, "--as", "norlund", "--window", 16, "--stride", 8)
    assert "stride 8 has no effect where the first 16 tokens" in said(*read)
    assert "stride 0 must be a multiple" in said("eval", trained, prepared, "--stride", 0)
    assert "window 0 must be a multiple" in said(
        "train", prepared, "--out", trained.parent / "no", *CHANGES, *ONE, "--max-len", 0
    )


def test_the_same_decoder_without_retrieval_trains(prepared: Path, tmp_path: Path) -> None:
    alone = ("--set", "cca_layers=[]", "--max-len", 16)
    run("train", prepared, "--out", tmp_path / "run", *CHANGES, *alone, *STEPS)
    on, off = run("eval", tmp_path / "run", prepared, "--window", 16, "--json")
    assert on["nll"] == off["nll"]


def test_a_model_is_trained_with_the_tokenizer_of_its_chunks(
    prepared: Path, bert: str, tmp_path: Path
) -> None:
    other = AutoTokenizer.from_pretrained(bert)
    other.add_tokens(["zzz"])
    other.save_pretrained(tmp_path / "other")
    options = ("--out", tmp_path / "run", *CHANGES, *ONE, "--tokenizer", tmp_path / "other")
    assert "was cut with another tokenizer" in said("train", prepared, *options)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the public code for chunks of 8 tokens, as `convert` writes it."""
    folder = tmp_path_factory.mktemp("converted")
    model = tiny_model("norlund", chunk_size=8, vocab_size=WORDS_AND_SPECIAL).float()
    torch.save({"state_dict": to_norlund(model)}, folder / "a.ckpt")
    sizes = {"num_embeddings": WORDS_AND_SPECIAL, "chunk_size": 8, "dec_num_heads": 2}
    (folder / "retro.json").write_text(json.dumps(sizes))
    options = ("--config", folder / "retro.json", "--out", folder / "model")
    run("convert", folder / "a.ckpt", *options)
    return folder / "model"


def test_the_public_figure_of_a_converted_checkpoint(converted: Path, prepared: Path) -> None:
    """Their rule: no BOS, the first tokens of each document, the mean over all labels."""
    model = tiny_model("norlund", chunk_size=8, vocab_size=WORDS_AND_SPECIAL)
    own = ChunkDatabase.open(prepared).chunks
    table = NeighbourTable.open(prepared / "neighbours")
    total, count = 0.0, 0
    for document in range(own.documents):
        chunks = np.array(own.of_document(document)[:2])
        tokens = own.rows(chunks).reshape(-1)
        ids = torch.from_numpy(tokens[tokens >= 0])[None]
        given = torch.from_numpy(own.rows(table.ids[chunks, :2], 1))[None]
        with torch.no_grad():
            logits = model(ids, neighbour_ids=given).logits.log_softmax(-1)
        total -= float(logits[0, :-1].gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    (told,) = run(
        *("eval", converted, prepared, "--as", "norlund", "--window", 16, "--readings", "on"),
        *("--continuations", 1, "--json"),
    )
    assert told["tokens"] == count
    assert told["nll"] == pytest.approx(total / count, abs=1e-5)


def test_a_model_without_tokenizer_counts_bytes_by_the_texts(
    converted: Path, prepared: Path
) -> None:
    result = called("eval", converted, prepared, "--window", 16, "--json")
    assert all(json.loads(line)["bpb"] > 0 for line in result.stdout.splitlines())
    assert "saved without its tokenizer" in result.stderr


def test_damaged_weights_are_named(converted: Path, prepared: Path, tmp_path: Path) -> None:
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in said("eval", tmp_path, prepared)
    (tmp_path / "config.json").write_text("[]")
    assert "holds no RETRO model" in said("eval", tmp_path, prepared)


@pytest.mark.slow
def test_sampling_by_command(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "given.txt").write_text("w1 w2 w3\n")
    asked = ("generate", trained, "--prompt", PROMPT, "--neighbours-file", tmp_path / "given.txt")

    def text(*options: Any) -> str:
        (told,) = run(*asked, "--max-new-tokens", 12, "--min-length", 12, *options, "--json")
        return str(told["text"])

    greedy = text()
    hot = ("--temperature", 5.0)
    assert text(*hot, "--seed", 1) == text(*hot, "--seed", 1) != text(*hot, "--seed", 2)
    assert text("--sample", "--top-k", 1) == greedy  # the likeliest alone
    assert text("--top-p", 1e-6) == greedy
    assert len(text("--num-beams", 3).split()) == 12
    assert text("--repetition-penalty", 1.0) == greedy != text("--repetition-penalty", 9.0)
    assert "--temperature must be above 0" in said(*asked, "--temperature", 0)


def test_neighbours_from_a_running_service(
    trained: Path,
    prepared: Path,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The text, neighbours and sources of the database itself."""
    chunks = MemoryNeighbours(prepared)
    asked = ("generate", trained, "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    model = roomy_model()
    with serving(
        model, tiny_tokenizer, [build_memory(model, tune=False)], chunks=chunks
    ) as running:
        (there,) = run(*asked, "--service", running.url)
        method = said(*asked, "--service", running.url, "--method", "bm25")
    (here,) = run(*asked, "--database", prepared)
    assert there == here
    assert here["chunks"][0]["neighbours"][0]["source"]["document"]
    assert "--method bm25 is of a --database" in method


def test_prompts_begin_as_documents_do(trained: Path, prepared: Path, bert: str) -> None:
    """Chunk borders are one token further on."""
    asked = ("generate", trained, "--database", prepared, "--prompt", PROMPT, "--json")
    (plain,) = run(*asked, "--max-new-tokens", 6)
    (begun,) = run(*asked, "--max-new-tokens", 6, "--start-token")
    assert plain["chunks"][0]["text"] == " ".join(PROMPT.split()[:8])
    assert begun["chunks"][0]["text"] == " ".join(PROMPT.split()[:7])


def test_prompts_begin_as_the_text_that_was_learnt(
    trained: Path, bert: str, tmp_path: Path
) -> None:
    """Where no database says how documents begin, the model does."""
    begun = tmp_path / "begun"
    ends = ("--tokenizer", bert, "--chunk-size", 8, "--start-token")
    corpus(tmp_path / "corpus.jsonl", 8, seed=3)
    run("chunks", tmp_path / "corpus.jsonl", "--out", begun, *ends)
    run("neighbours", begun, "--method", "bm25")
    run("train", begun, "--out", tmp_path / "run", *CHANGES, *ONE)
    for model, words in ((tmp_path / "run", 7), (trained, 8)):
        (told,) = run("generate", model, "--prompt", PROMPT, "--max-new-tokens", 6, "--json")
        assert told["chunks"][0]["text"] == " ".join(PROMPT.split()[:words])


@pytest.mark.slow
def test_training_begins_with_a_model(
    prepared: Path, base: Path, fitted: Path, trained: Path, tmp_path: Path
) -> None:
    """The first step's loss is that of the weights that are given; they are left as they were."""
    read = ("eval", "--window", 32, "--readings", "on", "--json")
    still = ("--lr", "1e-12", "--json", *ONE)
    for number, (verb, model) in enumerate([(("train",), trained), (("fit", base), fitted)]):
        out = tmp_path / f"run-{number}"
        run(*verb, prepared, "--out", out, "--from", model, *still)
        before, after = (run(*read, one, prepared)[0]["nll"] for one in (model, out))
        assert after == pytest.approx(before, abs=1e-6)
    step = trained / "checkpoint-2"
    run("train", prepared, "--out", tmp_path / "of-step-2", "--from", step, *still)
    new = ("train", prepared, "--out", tmp_path / "no", *ONE, "--from")
    assert "--set is of a new model" in said(*new, trained, "--set", "decoder_layers=1")
    assert "--preset is of a new model" in said(*new, trained, "--preset", "paper")
    assert "`nearest retro fit` goes on from it" in said(*new, fitted)
    assert "`nearest retro train` goes on from it" in said("fit", base, *new[1:], trained)
    assert "holds no RETRO model" in said(*new, tmp_path)
