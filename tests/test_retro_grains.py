"""Token memories on models with neighbours, and whatever else reads a Hugging Face model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import BYTES_AND_SPECIALS
from nearest import Memory, attach, evaluate
from nearest.corpus.documents import Document
from nearest.errors import ModelError, NearestError
from nearest.retro import RetrofitForCausalLM, RetroForCausalLM, retrofit
from nearest.retro.lookup import looking_up
from nearest.verbs.records import RecordTable
from retro_models import CHUNK, stir, tiny_config, variant
from retro_models import neighbours as given_neighbours
from retro_models import tokens as random_tokens

SETTINGS = {"k": 8, "lam": 0.4, "temperature": 1.0}


def found(chunks: Tensor) -> Tensor:
    """Two neighbours of six tokens, made of the chunk."""
    ids = chunks[:, None, [0, 1, 2, 3, 0, 2]].repeat(1, 2, 1)
    ids[:, 1] = (ids[:, 1] * 7 + 3) % 250 + 4
    return ids


@pytest.fixture(scope="module")
def fitted(tiny_model: PreTrainedModel) -> RetrofitForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = retrofit(tiny_model, [0, 1], chunk_size=CHUNK)
    stir(model.adapter)
    return model


@pytest.fixture(scope="module")
def memory(fitted: RetrofitForCausalLM, build_memory: Callable[..., Memory]) -> Memory:
    """Its keys are states that have seen neighbours."""
    with looking_up(fitted, found):
        return build_memory(fitted)


def test_both_grains_generate_what_they_evaluate(
    fitted: RetrofitForCausalLM, memory: Memory
) -> None:
    """Each new token's probability is that of the whole sequence, read anew in one window."""
    ids = torch.from_numpy(memory.document_tokens(0)[:11].astype(np.int64))[None]
    with (
        looking_up(fitted, found),
        attach(fitted, memory, method="knn", **SETTINGS) as session,
    ):
        output = fitted.generate(
            ids,
            max_new_tokens=14,
            eos_token_id=None,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        sources = session.sources(0)
    sequence = output.sequences[0]
    records = RecordTable()
    with looking_up(fitted, found):
        result = evaluate(
            fitted,
            memory,
            [sequence.numpy()],
            "knn",
            window=32,
            stride=16,
            records=records,
            **SETTINGS,
        )
    nll = np.concatenate([part["nll"] for part in records._parts])
    new = [
        logits[0].log_softmax(-1)[t] for logits, t in zip(output.logits, sequence[11:], strict=True)
    ]
    np.testing.assert_allclose(nll[10:], -torch.stack(new).numpy(), atol=2e-4)
    assert result.tokens == 24
    assert len(sources) == 14
    with pytest.raises(ModelError, match="is not the one that built"):  # its states are others
        evaluate(fitted, memory, [sequence.numpy()], "knn", **SETTINGS)


def test_without_neighbours_a_memory_is_that_of_the_base(
    fitted: RetrofitForCausalLM,
    tiny_model: PreTrainedModel,
    tiny_memory: Memory,
    documents: list[Document],
    tiny_tokenizer: Any,
) -> None:
    options = {"tokenizer": tiny_tokenizer, **SETTINGS}
    ours = evaluate(fitted, tiny_memory, documents, "knn", **options)
    theirs = evaluate(tiny_model, tiny_memory, documents, "knn", **options)
    assert ours.nll == theirs.nll


@pytest.fixture
def documents(tiny_memory: Memory) -> list[Document]:
    texts = [tiny_memory.document(i) for i in range(2)]
    return [dataclasses.replace(d, id=f"copy-{i}") for i, d in enumerate(texts)]


@pytest.mark.parametrize("mask", [False, True])
def test_a_model_that_looks_up_reads_as_one_that_is_given(mask: bool) -> None:
    model = variant("norlund")
    ids = random_tokens(2, 14)
    chunks = ids[:, :12].reshape(-1, CHUNK)
    given = given_neighbours(model, 2, 14)
    answers = {tuple(c.tolist()): given[i // 3, i % 3] for i, c in enumerate(chunks)}

    def retrieve(asked: Tensor) -> Tensor:
        return torch.stack([answers[tuple(chunk)] for chunk in asked.tolist()])

    before = vars(model).get("forward")
    named = {"attention_mask": torch.ones_like(ids)} if mask else {}
    with torch.no_grad():
        expected = model(ids, neighbour_ids=given, **named).logits
        off = model(ids, **named).logits
        with looking_up(model, retrieve):
            torch.testing.assert_close(model(ids, **named).logits, expected)
        assert torch.equal(model(ids, **named).logits, off)
    assert vars(model).get("forward") is before


def test_a_model_is_given_back_after_an_error() -> None:
    model = variant("norlund")

    def gone(_: Tensor) -> Tensor:
        raise NearestError("the service is gone")

    def read() -> None:
        with looking_up(model, gone):
            model(random_tokens(1, 9))

    with pytest.raises(NearestError, match="the service is gone"):
        read()
    assert not {"forward", "generate"} & set(vars(model))


def from_scratch() -> RetroForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = RetroForCausalLM(tiny_config("paper", vocab_size=BYTES_AND_SPECIALS)).eval()
    stir(model)
    return model


@pytest.mark.parametrize("kind", ["fitted", "from scratch"])
def test_lm_evaluation_harness_reads_with_live_neighbours(
    fitted: Any, tiny_tokenizer: Any, kind: str
) -> None:
    if kind == "from scratch":
        fitted = from_scratch()
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("the first one", " and so on"), ("a", " longer end of it")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with looking_up(fitted, found):
        harness = HFLM(pretrained=fitted, tokenizer=tiny_tokenizer, max_length=64, batch_size=2)
        scored = harness.loglikelihood(requests, disable_tqdm=True)
        expected = []
        for context, end in pairs:
            first = tiny_tokenizer(context, add_special_tokens=False)["input_ids"]
            whole = tiny_tokenizer(context + end, add_special_tokens=False)["input_ids"]
            chunks = torch.tensor(whole[: len(whole) // CHUNK * CHUNK]).reshape(-1, CHUNK)
            with torch.no_grad():
                logits = fitted(torch.tensor([whole]), neighbour_ids=found(chunks)[None]).logits[0]
            log_probs = logits.log_softmax(-1)
            places = range(len(first), len(whole))
            expected.append(sum(log_probs[p - 1, whole[p]].item() for p in places))
        asked = [Instance("generate_until", {}, (pairs[0][0], {"until": ["\0"]}), 0)]
        asked[0].args[1]["max_gen_toks"] = 2 * CHUNK
        (written,) = harness.generate_until(asked, disable_tqdm=True)
    assert [log_prob for log_prob, _ in scored] == pytest.approx(expected, abs=1e-4)
    first = tiny_tokenizer(pairs[0][0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = fitted.generate(first, neighbours=found, max_new_tokens=2 * CHUNK, do_sample=False)
    assert written == tiny_tokenizer.decode(output[0, first.shape[1] :], skip_special_tokens=True)
    off = HFLM(pretrained=fitted, tokenizer=tiny_tokenizer, max_length=64).loglikelihood(
        requests, disable_tqdm=True
    )
    assert [p for p, _ in off] != pytest.approx(expected, abs=1e-3)
