"""Earlier places of the present text as candidates, against loops over all places."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import gates_trained_at_once, make_documents, make_model, make_tokenizer
from nearest import Memory, attach, evaluate, tune
from nearest.retrieval import present, settings
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.gates.stored import load_gate
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.present import matching_places
from nearest.retrieval.settings import resolve_settings

TOKENIZER = make_tokenizer()
START = 0


def by_hand(
    context: list[int], end: int, reach: int, longest: int, most: int
) -> list[tuple[int, int]]:
    """(value, length) of the places that match, as the module says."""
    if context[end] == START or context[end] < 0:
        return []
    first = end
    while first > 0 and context[first - 1] > 0 and end - first < reach:
        first -= 1
    text = context[first : end + 1]
    found = []
    for place in range(len(text) - 1):
        shared = 0
        while shared <= place and text[place - shared] == text[-1 - shared] and shared < longest:
            shared += 1
        if shared:
            found.append((-shared, -place, text[place + 1]))
    return [(value, -length) for length, _, value in sorted(found)[:most]]


@pytest.mark.parametrize("seed", range(6))
def test_places_equal_a_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    reach, longest, most = 60, 4, 9
    monkeypatch.setattr(present, "_PLACES", most)
    monkeypatch.setattr(present, "REACH", reach)
    monkeypatch.setattr(present, "_LONGEST", longest)
    words = int(rng.integers(2, 7))
    context = rng.integers(1, words, 400)
    context[rng.random(400) < 0.01] = START
    context[rng.random(400) < 0.01] = -1  # where the next row of a batch begins
    ends = np.append(rng.permutation(400)[:150], 0)
    # The kernel holds its constants as they were when it was compiled.
    monkeypatch.setattr(present, "_match", present._match.py_func)
    monkeypatch.setattr(present, "_shared", present._shared.py_func)
    found = matching_places(context, ends, START)
    for i, end in enumerate(ends.tolist()):
        expected = by_hand(context.tolist(), end, reach, longest, most)
        rest = most - len(expected)
        assert found.values[i].tolist() == [v for v, _ in expected] + [-1] * rest
        assert found.lengths[i].tolist() == [n for _, n in expected] + [0] * rest


def test_the_compiled_kernel_equals_a_loop(rng: np.random.Generator) -> None:
    context = np.concatenate([[START], np.tile(rng.integers(1, 3, 200), 2)])
    ends = np.array([0, 1, 2, 30, 210, 300, len(context) - 1])
    found = matching_places(context, ends, START)
    for i, end in enumerate(ends.tolist()):
        expected = by_hand(context.tolist(), end, present.REACH, 64, 128)
        assert (
            list(zip(found.values[i], found.lengths[i], strict=True))[: len(expected)] == expected
        )
        assert (found.values[i, len(expected) :] == -1).all()
    assert found.lengths.max() == 64
    assert (found.values[-1] >= 0).all()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


def tuned(model: PreTrainedModel, memory: Memory) -> Memory:
    text = [f"{one.text} {one.text}" for one in make_documents(6, 16, seed=1)]
    with gates_trained_at_once():
        tune(model, memory, text, method="hybrid", tokenizer=TOKENIZER, k=16)
    return Memory.open(memory.path)


@pytest.fixture(scope="module")
def memory(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    return tuned(model, build_memory(model, make_documents(20, 16)))


@pytest.fixture(scope="module")
def older(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    """Of before gates weighed the text's own places."""
    with pytest.MonkeyPatch.context() as patched:
        known = settings._METHODS["hybrid"]
        patched.setitem(settings._METHODS, "hybrid", settings.replace(known, text=False))
        return tuned(model, build_memory(model, make_documents(20, 16)))


RANDOM = [  # nothing that the memory holds
    " ".join(np.random.default_rng(seed).permutation(list("abcdefghijklmnopqrstuvwxyz")))
    for seed in range(3)
]


def test_a_text_that_repeats_itself_is_predicted_better(
    model: PreTrainedModel, memory: Memory, older: Memory
) -> None:
    text = [f"{one} {one} {one}" for one in RANDOM]
    with_text, without = (
        evaluate(model, one, text, "hybrid", tokenizer=TOKENIZER) for one in (memory, older)
    )
    assert with_text.nll < without.nll - 0.1


def test_a_gate_of_before_goes_on_as_it_was(older: Memory, memory: Memory) -> None:
    gate = load_gate(older, "hybrid")
    assert gate is not None
    assert not any("text" in component.kinds for component in gate.components)
    for one, reads_text in ((older, False), (memory, True)):
        lookup = Lookup.of(one, "hybrid", resolve_settings("hybrid", one))
        assert lookup.reads_text == reads_text


def test_places_stand_beside_the_entries(rng: np.random.Generator) -> None:
    found = Candidates(
        rng.integers(0, 9, (2, 3)), rng.integers(0, 9, (2, 3)),
        rng.random((2, 3)).astype(np.float32), np.zeros((2, 3), np.int16), (1, 0, 2),
        np.ones(2, dtype=bool), np.ones((2, 3), np.float32),
    )  # fmt: skip
    beside = found.beside(np.array([[5, -1], [7, 8]]), np.array([[3, 0], [2, 1]], np.int16))
    assert beside.columns == (1, 0, 2, 2)
    np.testing.assert_array_equal(beside.ids[:, 3:], -1)
    np.testing.assert_array_equal(beside.distances[:, beside.of("text")], [[0, np.inf], [0, 0]])
    np.testing.assert_array_equal(beside.log_counts[:, 3:], 0)
    np.testing.assert_array_equal(beside.ids[:, :3], found.ids)


def test_sources_tell_the_texts_own_part(model: PreTrainedModel, memory: Memory) -> None:
    ids = torch.tensor([TOKENIZER(" ".join([RANDOM[0][:20]] * 3))["input_ids"][:50]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    with attach(model, memory, method="hybrid") as session:
        model.generate(ids, **options)
        told = session.sources()
    assert any(one.text_weight > 0 for one in told)
    for one in told:
        assert 0 <= one.text_weight <= 1 - one.memory_weight + 1e-6
        assert ("this text" in repr(one)) == (one.text_weight > 0)
        assert sum(source.weight for source in one.sources) == pytest.approx(
            1.0 if one.sources else 0.0
        )
