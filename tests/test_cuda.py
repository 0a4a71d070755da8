"""Models and searches on a real GPU give what they give on the CPU; skipped where there is none."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from conftest import (
    documents_apart,
    gates_trained_at_once,
    make_documents,
    make_model,
    make_tokenizer,
)
from nearest import Memory, attach, evaluate, tune
from nearest.cli import app
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import SettingError
from pairs import make_pair_model, make_pair_tokenizer, pair_documents
from retro_models import CHUNK, found, tokens, variant

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
on_faiss = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus(),
    reason="FAISS finds no GPU here, or was built without",
)

Build = Callable[..., Memory]
WEIGHING = {"lam": 0.6, "temperature": 40.0}
METHODS: dict[str, dict[str, Any]] = {
    "knn": {**WEIGHING, "k": 8},
    "retomaton": {**WEIGHING, "k": 12, "min_knns": 2, "max_knns": 40},
    "suffix": {**WEIGHING, "suffix_k": 20, "length_power": 3.0},
    "hybrid": {"k": 12, "max_knns": 40, "suffix_k": 20, "skip": 0.4, "guard": True},
}
DOCUMENTS = documents_apart(9, 20, seed=3)


def on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model."""
    return copy.deepcopy(model).to("cuda")


def written(model: PreTrainedModel, **inputs: Any) -> Any:
    """Twelve tokens, greedily, with the distributions that they come from."""
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    given |= {"return_dict_in_generate": True, "output_scores": True}
    return model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()} | given
    )


def prompts() -> dict[str, Tensor]:
    """Two rows, one of them padded on the left."""
    ids = torch.randint(2, 258, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def check_written(on_cpu: Any, there: Any) -> None:
    assert torch.equal(there.sequences.cpu(), on_cpu.sequences)
    for expected, scores in zip(on_cpu.scores, there.scores, strict=True):
        assert scores.is_cuda
        torch.testing.assert_close(scores.exp().cpu(), expected.exp(), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def memory(build_memory: Build) -> Memory:
    """Of documents, with the gate that `hybrid` needs."""
    model = make_model()
    built = build_memory(model, DOCUMENTS)
    with gates_trained_at_once():
        tune(
            model,
            built,
            make_documents(8, 20, seed=4),
            method="hybrid",
            tokenizer=make_tokenizer(),
            **METHODS["hybrid"],
        )
    return Memory.open(built.path)


@pytest.mark.parametrize("method", METHODS)
def test_an_attached_model_writes_what_it_writes_on_the_cpu(memory: Memory, method: str) -> None:
    model = make_model()
    there = on_gpu(model)
    with attach(model, memory, method, replay="full", **METHODS[method]):
        expected = written(model, **prompts())
    with attach(there, memory, method, replay="full", **METHODS[method]) as session:
        output = written(there, **prompts())
        spoken = session.sources(0)
    check_written(expected, output)
    assert [one.token for one in spoken] == output.sequences[0, 7:].tolist()


def test_some_positions_alone_are_looked_up(memory: Memory) -> None:
    there, ids = on_gpu(make_model()), prompts()["input_ids"][:1].cuda()
    for method in ("knn", "suffix"):
        with attach(there, memory, method, **METHODS[method]), torch.no_grad():
            whole = there(input_ids=ids).logits[0]
            some = there(input_ids=ids, logits_to_keep=torch.tensor([2, 5]).cuda()).logits[0]
        torch.testing.assert_close(some, whole[[2, 5]], rtol=0, atol=1e-5)


def test_an_encoder_decoder_writes_what_it_writes_on_the_cpu(tmp_path: Path) -> None:
    model = make_pair_model()
    memory = Memory.build(model, make_pair_tokenizer(), pair_documents(), tmp_path / "m")
    source = {
        "input_ids": torch.randint(2, 258, (2, 7), generator=torch.Generator().manual_seed(1))
    }
    there = on_gpu(model)
    for method in ("knn", "retomaton"):
        with attach(model, memory, method, **METHODS[method]):
            expected = written(model, **source)
        with attach(there, memory, method, **METHODS[method]):
            check_written(expected, written(there, **source))


def test_training_through_an_attached_model(memory: Memory) -> None:
    ids = prompts()["input_ids"][:1]
    losses, gradients = [], []
    for model in (make_model(), on_gpu(make_model())):
        with attach(model, memory, "knn", **METHODS["knn"]):
            loss = model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss
            loss.backward()
        losses.append(loss.item())
        gradients.append(model.lm_head.weight.grad.cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_texts_score_as_on_the_cpu(memory: Memory, dtype: torch.dtype) -> None:
    """Half precision keeps 8 bits of 24 (bfloat16) or 11: nll is off by as small a share."""
    texts = [np.array([0, *make_tokenizer()(d.text)["input_ids"]]) for d in DOCUMENTS[:4]]
    share = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}[dtype]
    there = on_gpu(make_model()).to(dtype)
    for method, settings in METHODS.items():
        expected = evaluate(make_model(), memory, texts, method, **settings)
        scored = evaluate(there, memory, texts, method, force=True, **settings)
        assert scored.nll == pytest.approx(expected.nll, rel=share)
        assert scored.tokens == expected.tokens


def test_a_memory_built_there_is_the_same(build_memory: Build, memory: Memory) -> None:
    built = build_memory(on_gpu(make_model()), DOCUMENTS)
    assert built.manifest.model.fingerprint == memory.manifest.model.fingerprint
    ids = memory.valued_entries()
    np.testing.assert_array_equal(built.valued_entries(), ids)
    np.testing.assert_allclose(built.keys.rows(ids), memory.keys.rows(ids), rtol=2e-3, atol=2e-3)


def test_the_commands_take_the_gpu_of_themselves(model_folder: str, tmp_path: Path) -> None:
    corpus, path = tmp_path / "corpus.jsonl", tmp_path / "m"
    corpus.write_text("\n".join(json.dumps({"text": d.text}) for d in make_documents(12, 20)))
    assert load_model_and_tokenizer(model_folder)[0].device.type == "cuda"
    assert load_model_and_tokenizer(model_folder, device="cuda:0")[0].device.type == "cuda"
    with pytest.raises(SettingError, match="'cuda:99' cannot be used here"):
        load_model_and_tokenizer(model_folder, device="cuda:99")

    def run(*arguments: Any) -> list[dict[str, Any]]:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    run("build", model_folder, corpus, "--out", path)
    run("tune", path, "--text", corpus)
    rows = {
        device: run("eval", path, "--text", corpus, "--method", "base,knn", "--device", device)
        for device in ("auto", "cpu")
    }
    for there, here in zip(*rows.values(), strict=True):
        assert there["nll"] == pytest.approx(here["nll"], rel=1e-4)
    run("generate", path, "--prompt", "the court", "--max-new-tokens", 5, "--sources")
    more = tmp_path / "more.txt"
    more.write_text("one more")
    run("add", path, more, "--device", "cuda")
    assert run("verify", path, "--keys")[0]["sound"]


@pytest.mark.parametrize("name", ["norlund", "paper", "retro-pytorch"])
def test_retro_reads_and_writes_there(name: str) -> None:
    model, prompt = variant(name).double(), tokens(2, 2 * CHUNK + 1)
    expected = model.generate(prompt, max_new_tokens=CHUNK, do_sample=False, neighbours=found)
    there = copy.deepcopy(model).cuda()
    output = there.generate(
        prompt.cuda(),
        max_new_tokens=CHUNK,
        do_sample=False,
        neighbours=lambda chunks: found(chunks.cpu()),
    )
    assert torch.equal(output.cpu(), expected)


@pytest.mark.parametrize(
    "index",
    ["exact", "IVF4,SQ8", "IVF4,PQ8x4fs", "HNSW8", pytest.param("IVF4,Flat", marks=on_faiss)],
)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_same_is_found_there(build_memory: Build, index: str, metric: str) -> None:
    documents = documents_apart(20, 60)
    options = {"metric": metric, **({"nprobe": 4} if "IVF" in index else {})}
    path = build_memory(make_model(), documents, index=index, **options).path
    there, reference = Memory.open(path, search_on="gpu"), Memory.open(path)
    in_lists = index == "IVF4,Flat"
    if not in_lists:
        reference = build_memory(make_model(), documents, metric=metric)
    queries = np.random.default_rng(0).normal(scale=3, size=(5, 32)).astype(np.float32)
    for gone in ([], ["doc-1"]):
        if gone:
            there = there.remove(gone)
            reference = reference.refresh() if in_lists else reference.remove(gone)
        found, expected = there.search(queries, 9), reference.search(queries, 9)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-5)
