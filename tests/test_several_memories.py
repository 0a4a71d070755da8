"""Several memories at once: what is predicted is the weighted mixture of what each predicts."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents, make_model
from folders import Build
from nearest import Memory, attach, evaluate, tune_weights
from nearest.errors import ModelError, SettingError
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.gates.fitting import best_shares
from nearest.verbs.generate import generate

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "knn": ("knn", {"lam": 0.6, "temperature": 40.0, "k": 20}),
    "guarded": ("knn", {"lam": 0.6, "temperature": 40.0, "k": 20, "guard": True}),
    "retomaton": ("retomaton", {"lam": 0.7, "temperature": 60.0, "k": 12, "min_knns": 3}),
    "suffix": ("suffix", {"lam": 0.5, "suffix_k": 20}),
}
WEIGHTS = [(0.5, 0.5), (0.7, 0.1), (1.0, 0.0), (0.0, 0.4)]


@pytest.fixture(scope="module")
def memories(build_memory: Build, tiny_model: PreTrainedModel) -> list[Memory]:
    return [
        build_memory(tiny_model, make_documents(9, 30, seed=1)),
        build_memory(tiny_model, make_documents(14, 25, seed=2), keys="int8"),
    ]


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return METHODS[request.param]


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return torch.tensor([[0, *tiny_tokenizer("the court shall hear the ")["input_ids"]]])


def log_probs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits.float().log_softmax(-1)


def mixture(
    model: PreTrainedModel,
    memories: list[Memory],
    weights: tuple[float, ...],
    method: tuple[str, dict[str, Any]],
    tokens: Tensor,
) -> Tensor:
    """Probabilities at every position, from each memory attached alone; a pass keeps state."""
    total = (1 - sum(weights)) * log_probs(model, tokens).double().exp()
    for memory, weight in zip(memories, weights, strict=True):
        with attach(model, memory, method[0], **method[1]):
            total += weight * log_probs(model, tokens).double().exp()
    return total


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_mixes_what_each_memory_predicts(
    tiny_model: PreTrainedModel,
    memories: list[Memory],
    prompt: Tensor,
    method: tuple[str, dict[str, Any]],
    weights: tuple[float, float],
    beams: int,
) -> None:
    how = {"max_new_tokens": 8, "pad_token_id": 1, "eos_token_id": None, "num_beams": beams}
    with attach(
        tiny_model, memories, method[0], weights=weights, replay="full", **method[1]
    ) as session:
        out = tiny_model.generate(prompt, return_dict_in_generate=True, output_logits=True, **how)
        whole = log_probs(tiny_model, out.sequences)
        sources = session.sources(0)
    tokens = out.sequences
    expected = mixture(tiny_model, memories, weights, method, tokens)
    torch.testing.assert_close(whole.double().exp(), expected, rtol=1e-3, atol=1e-5)
    new = expected[:, prompt.shape[1] - 1 : -1]
    if beams == 1:
        steps = torch.stack(out.logits, dim=1).double().softmax(-1)
        torch.testing.assert_close(steps, new, rtol=1e-3, atol=1e-5)
    for at, token in enumerate(sources):
        assert token.token == tokens[0, prompt.shape[1] + at]
        if token.sources:
            assert sum(source.weight for source in token.sources) == pytest.approx(1)
        assert {s.memory for s in token.sources} <= {m for m, w in enumerate(weights) if w}


def test_sources_share_the_token_as_the_weights_say(
    tiny_model: PreTrainedModel, memories: list[Memory], prompt: Tensor
) -> None:
    method, settings = METHODS["knn"]
    weights = (0.6, 0.3)
    how = {"max_new_tokens": 6, "pad_token_id": 1, "eos_token_id": None}

    def given(which: Any, sequence: Tensor | None, **more: Any) -> tuple[Tensor, list[dict]]:
        """What every entry adds to each token's probability, by memory and entry."""
        with attach(tiny_model, which, method, **settings, **more) as session:
            out = tiny_model.generate(prompt, **how)
            if sequence is not None:  # read the same tokens, whatever this would have written
                session._last.sequences.copy_(sequence)
                out = sequence
            probabilities = log_probs(tiny_model, out).exp()[0]
            named = session.sources(0)
        return out, [
            {
                (s.memory, s.entry): s.weight
                * token.memory_weight
                * float(probabilities[prompt.shape[1] - 1 + i, token.token])
                for s in token.sources
            }
            for i, token in enumerate(named)
        ]

    out, together = given(memories, None, weights=weights)
    alone = [given(memory, out)[1] for memory in memories]
    for i, found in enumerate(together):
        expected = {
            (m, entry): weights[m] * share
            for m, of_memory in enumerate(alone)
            for (_, entry), share in of_memory[i].items()
        }
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert [*found.values()] == sorted(found.values(), reverse=True)


def test_memories_are_turned_off_and_on_in_one_thread_only(
    tiny_model: PreTrainedModel, memories: list[Memory], prompt: Tensor
) -> None:
    method, settings = METHODS["knn"]
    base = log_probs(tiny_model, prompt)
    with attach(tiny_model, memories[1], method, **settings):
        second = log_probs(tiny_model, prompt)
    with attach(tiny_model, memories, method, **settings) as session:
        both = log_probs(tiny_model, prompt)
        with session.weighted(0, 1):
            torch.testing.assert_close(log_probs(tiny_model, prompt), second)
            elsewhere: list[Tensor] = []
            thread = threading.Thread(
                target=lambda: elsewhere.append(log_probs(tiny_model, prompt))
            )
            thread.start()
            thread.join()
            torch.testing.assert_close(elsewhere[0], both)
            with session.disabled():
                torch.testing.assert_close(log_probs(tiny_model, prompt), base)
        with session.weighted(0, 0):
            torch.testing.assert_close(log_probs(tiny_model, prompt), base)
            tiny_model.generate(prompt, max_new_tokens=2, pad_token_id=1)
        torch.testing.assert_close(log_probs(tiny_model, prompt), both)
        with pytest.raises(SettingError, match="1 weights for 2 memories"):
            session.weighted(1).__enter__()
    torch.testing.assert_close(log_probs(tiny_model, prompt), base)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2 memories: give one for each"),
        ([0.5, 0.4, 0.1], "3 weights for 2 memories"),
        ([0.7, 0.4], "sum to 1.1: they must not exceed 1"),
        ([-0.1, 0.4], "a number from 0 to 1, got -0.1"),
        ([float("nan"), 0.4], "got nan"),
        ([float("inf"), 0.4], "got inf"),
    ],
)
def test_weights_that_make_no_sense_are_refused(
    tiny_model: PreTrainedModel, memories: list[Memory], weights: list[float], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        attach(tiny_model, memories, weights=weights)
    assert "forward" not in vars(tiny_model)


def test_memories_that_do_not_go_together_are_refused(
    tiny_model: PreTrainedModel, memories: list[Memory], build_memory: Build
) -> None:
    with pytest.raises(SettingError, match="there is no memory to look up"):
        attach(tiny_model, [])
    other = build_memory(tiny_model, make_documents(3, 9), key_layer="last_hidden")
    with pytest.raises(ModelError, match=r"build one of them anew with the other's --key-layer"):
        attach(tiny_model, [memories[0], other])
    torch.manual_seed(5)
    foreign = build_memory(make_model("llama"), make_documents(3, 9))
    with pytest.raises(ModelError, match="not the one that built"):
        attach(tiny_model, [memories[0], foreign])
    bare = build_memory(tiny_model, make_documents(3, 9), keys="none")
    with attach(tiny_model, [bare, other], "suffix"):
        pass
    with pytest.raises(SettingError, match="has no keys"):
        attach(tiny_model, [memories[0], bare])


def test_equal_weights_unless_given(memories: list[Memory]) -> None:
    assert Ensemble.of(memories, "knn").weights == (0.5, 0.5)
    predicted = torch.tensor([[0.2, 0.8], [0.6, 0.4]]).log()
    base = torch.tensor([0.5, 0.5]).log()
    mixed = Ensemble.of(memories, "knn", [0.5, 0.25]).mixed(list(predicted), base)
    np.testing.assert_allclose(mixed.exp(), [0.1 + 0.15 + 0.125, 0.4 + 0.1 + 0.125], rtol=1e-6)


def test_the_verb_names_documents_of_all_memories(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    memories: list[Memory],
    tmp_path: Path,
) -> None:
    made = generate(
        tiny_model, tiny_tokenizer, memories, "the court ", method="suffix", max_new_tokens=6
    )
    assert sum(share.weight for share in made.documents) == pytest.approx(
        np.mean([token.memory_weight for token in made.tokens])
    )
    assert {source.memory for token in made.tokens for source in token.sources} == {0, 1}
    again = generate(
        tiny_model,
        tiny_tokenizer,
        memories,
        "the court ",
        method="suffix",
        weights=[0, 1],
        max_new_tokens=6,
    )
    assert {source.memory for token in again.tokens for source in token.sources} == {1}


# --- evaluation, and weights that are found -------------------------------------------------------


TEXT = make_documents(4, 30, seed=7)


@pytest.mark.slow
def test_evaluation_mixes_what_each_memory_predicts(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    memories: list[Memory],
    method: tuple[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    weights = (0.6, 0.3)
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer, **method[1]}
    seen: list[dict[str, np.ndarray]] = []
    result = evaluate(
        tiny_model, memories, TEXT, method[0], weights=weights, records=seen.append, **options
    )
    alone: list[list[dict[str, np.ndarray]]] = [[], []]
    for memory, kept in zip(memories, alone, strict=True):
        evaluate(tiny_model, memory, TEXT, method[0], records=kept.append, **options)

    def column(rows: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        return np.concatenate([row[name] for row in rows])

    expected = 0.1 * np.exp(-column(seen, "base_nll").astype(float))
    for rows, weight in zip(alone, weights, strict=True):
        expected += weight * np.exp(-column(rows, "nll").astype(float))
    np.testing.assert_allclose(np.exp(-column(seen, "nll").astype(float)), expected, rtol=1e-4)
    assert result.nll == pytest.approx(-np.log(expected).mean(), rel=1e-4)
    lams = sum(w * column(rows, "lam") for rows, w in zip(alone, weights, strict=True))
    np.testing.assert_allclose(column(seen, "lam"), lams, rtol=1e-5)
    of_memory, source = column(seen, "memory"), column(seen, "source")
    assert set(of_memory.tolist()) == {0, 1}
    for number, rows in enumerate(alone):
        here = (of_memory == number) & (source != None)  # noqa: E711
        np.testing.assert_array_equal(source[here], column(rows, "source")[here])
    assert result.lam == method[1]["lam"]


def test_one_memory_of_weight_one_is_that_memory(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, memories: list[Memory]
) -> None:
    one = evaluate(tiny_model, memories[0], TEXT, tokenizer=tiny_tokenizer)
    same = evaluate(tiny_model, memories, TEXT, weights=(1, 0), tokenizer=tiny_tokenizer)
    assert (same.nll, same.foss) == (one.nll, one.foss)
    none = evaluate(tiny_model, memories, TEXT, weights=(0, 0), tokenizer=tiny_tokenizer)
    base = evaluate(tiny_model, None, TEXT, "base", tokenizer=tiny_tokenizer)
    assert none.nll == pytest.approx(base.nll)
    with pytest.raises(SettingError, match="are left out of one memory only"):
        evaluate(tiny_model, memories, TEXT, tokenizer=tiny_tokenizer, leave_one_out=True)


def test_the_likeliest_weights_are_found(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, memories: list[Memory]
) -> None:
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer, "lam": 0.6, "temperature": 40.0}
    known = make_documents(9, 30, seed=1)[7:]  # of the first memory
    text = [*TEXT, *known]
    tuned = tune_weights(tiny_model, memories, text, **options)
    found = evaluate(tiny_model, memories, text, weights=tuned.weights, **options)
    assert found.nll == pytest.approx(tuned.nll, abs=1e-4)
    assert tuned.tokens == found.tokens
    for weights in [(0.5, 0.5), (1, 0), (0, 1), (0, 0), (0.8, 0.1), (0.4, 0.1), (0.9, 0.1)]:
        other = evaluate(tiny_model, memories, text, weights=weights, **options)
        assert other.nll >= found.nll - 1e-4
    with pytest.raises(SettingError, match="give two or more"):
        tune_weights(tiny_model, memories[:1], text, **options)


def test_weights_that_are_found_are_taken(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    memories: list[Memory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded, three that share everything do not sum to more than 1."""
    shares = np.array([0.33336, 0.33337, 0.33327, 0.0])
    monkeypatch.setattr("nearest.verbs.weights.best_shares", lambda _: shares)
    three = [*memories, memories[0]]
    tuned = tune_weights(tiny_model, three, TEXT, tokenizer=tiny_tokenizer, lam=0.6)
    np.testing.assert_allclose(tuned.weights, shares[:3], atol=1e-4)
    assert sum(Ensemble.of(three, "knn", tuned.weights).weights) <= 1


def test_expectation_maximisation_against_a_grid() -> None:
    rng = np.random.default_rng(0)
    log_probs = torch.from_numpy(np.log(rng.dirichlet((0.4, 0.6, 0.5), size=400).T))
    found = best_shares(log_probs.exp().T.numpy())
    assert float(found.sum()) == pytest.approx(1)

    def likelihood(weights: Any) -> float:
        return float((log_probs + torch.as_tensor(weights).log()[:, None]).logsumexp(0).sum())

    grid = [
        (a, b, 1 - a - b) for a in np.arange(0.02, 1, 0.02) for b in np.arange(0.02, 1 - a, 0.02)
    ]
    assert likelihood(found) >= max(map(likelihood, grid)) - 1e-6
