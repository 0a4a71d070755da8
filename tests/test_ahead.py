"""Dense searches that are made for many positions together, against one position after another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import gates_trained_at_once, make_documents, make_model, make_tokenizer
from nearest import Memory, tune
from nearest.encode import encoder
from nearest.index.neighbours import Neighbours
from nearest.models.scoring import ScoredBlock, Scorer
from nearest.progress import no_progress
from nearest.retrieval import step
from nearest.retrieval.gates.stored import load_gate
from nearest.retrieval.lookup import Ahead, Lookup
from nearest.retrieval.settings import resolve_settings
from nearest.retrieval.step import State, Step, advance, steps

TOKENIZER = make_tokenizer()
TEXT = make_documents(5, 16, seed=2)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="module")
def memory(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    memory = build_memory(model, make_documents(20, 16)).cluster(8)
    with gates_trained_at_once():
        tune(
            model, memory, make_documents(6, 16, seed=1),
            method="hybrid", tokenizer=TOKENIZER, k=16,
        )  # fmt: skip
    return memory


class CountingSearch:
    """`Memory.search` that remembers how many queries each call had."""

    def __init__(self, memory: Memory) -> None:
        self.calls: list[int] = []
        self._memory = memory

    def __call__(
        self, queries: Any, k: int, distances: str, rerank: int, *, ordered: bool
    ) -> Neighbours:
        self.calls.append(len(queries))
        return self._memory.search(queries, k, distances, rerank, ordered=ordered)


def lookup_of(memory: Memory, search: CountingSearch, method: str, **given: Any) -> Lookup:
    settings = resolve_settings(method, memory, **given)
    return Lookup(memory, method, settings, load_gate(memory, method), search)


def blocks_of(model: PreTrainedModel, memory: Memory, **options: Any) -> list[ScoredBlock]:
    scorer = Scorer.prepare(model, memory, TEXT, tokenizer=TOKENIZER, **options)
    return list(scorer.blocks(no_progress, "", with_view=True))


def stepped(lookup: Lookup, blocks: list[ScoredBlock]) -> list[Step]:
    states: dict[int, State] = {}
    return [
        one
        for block in blocks
        for one in steps(
            lookup, block.queries, block.sequences, block.targets, block.lm_log_probs, states
        )
    ]


CASES: list[dict[str, Any]] = [
    {"skip": 0.5},
    {"skip": 0.2, "dedup": True, "window": 24, "stride": 8, "batch_size": 2},
    {"skip": 0.7, "batch_size": 1, "in_pieces": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_searches_made_together_change_nothing(
    model: PreTrainedModel,
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    options = dict(options)
    given = {name: options.pop(name) for name in ("skip", "dedup") if name in options}
    if options.pop("in_pieces", False):  # several calls for a document, and few positions of each
        monkeypatch.setattr(encoder, "_GROUP_BYTES", 1)
        monkeypatch.setattr(step, "_AT_ONCE", 7)
    blocks = blocks_of(model, memory, **options)
    together, apart = CountingSearch(memory), CountingSearch(memory)
    made = stepped(lookup_of(memory, together, "hybrid", **given), blocks)
    with monkeypatch.context() as patched:
        patched.setattr(Lookup, "ahead", lambda *_: Ahead())
        expected = stepped(lookup_of(memory, apart, "hybrid", **given), blocks)
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        found, known = one.prediction.candidates, other.prediction.candidates
        assert found.columns == known.columns
        for name in ("ids", "values", "distances", "lengths", "searched"):
            np.testing.assert_array_equal(getattr(found, name), getattr(known, name))
        assert torch.equal(one.log_probs, other.log_probs)
    searched = np.concatenate([one.prediction.candidates.searched for one in made])
    assert 0.1 < searched.mean() < 0.9
    assert any(one.prediction.candidates.columns[1] for one in made)  # pointers were followed
    assert sum(together.calls) == sum(apart.calls) == searched.sum()
    assert len(together.calls) < len(apart.calls)


def test_one_token_after_another_gives_the_same(model: PreTrainedModel, memory: Memory) -> None:
    blocks = blocks_of(model, memory)
    lookup = lookup_of(memory, CountingSearch(memory), "hybrid", skip=0.5)
    for one in blocks:
        expected, searched = np.empty(len(one.targets)), np.empty(len(one.targets), dtype=bool)
        for number in np.unique(one.sequences):
            state = State.start(1)
            for row in np.flatnonzero(one.sequences == number):
                at = slice(row, row + 1)
                prediction = step.step(lookup, one.queries.rows(at), state)
                known = Step(np.arange(1), prediction, one.targets[at], one.lm_log_probs[at])
                expected[at], searched[at] = known.log_probs, prediction.candidates.searched
                state = advance(prediction, one.targets[at], one.lm_log_probs[at])
        for found in stepped(lookup, [one]):
            np.testing.assert_array_equal(
                found.prediction.candidates.searched, searched[found.rows]
            )
            np.testing.assert_allclose(found.log_probs, expected[found.rows], rtol=1e-4, atol=1e-5)


def test_pointers_that_decide_are_waited_for(model: PreTrainedModel, memory: Memory) -> None:
    one = blocks_of(model, memory)[0]
    for min_knns, together in ((3, False), (float("inf"), True)):
        lookup = lookup_of(memory, CountingSearch(memory), "retomaton", k=16, min_knns=min_knns)
        ahead = lookup.ahead(one.queries)
        assert (ahead.searched is not None) == (ahead.dense is not None) == together
        whole = lookup.candidates(one.queries)
        if ahead.dense is not None:
            np.testing.assert_array_equal(whole.ids[:, whole.of("dense")], ahead.dense.ids)
