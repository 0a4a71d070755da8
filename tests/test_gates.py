"""Buckets, meta-k and AdaptRet: plain loops, closed forms, and texts whose right gate is known."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import gates_trained_at_once, make_documents, make_model, make_tokenizer
from nearest import Memory, evaluate, read_documents, tune
from nearest.encode.view import LmView
from nearest.errors import SettingError
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import component_probs
from nearest.retrieval.gates import network
from nearest.retrieval.gates.adaptret import (
    AdaptRetGate,
    adaptret_inputs,
    adaptret_loss,
    fit_adaptret,
)
from nearest.retrieval.gates.buckets import BucketsGate, bucket_of, fit_buckets
from nearest.retrieval.gates.fitting import LARGEST_LAM, best_lams, best_shares, mixed_nll, nll
from nearest.retrieval.gates.gate import (
    Examples,
    Gate,
    StoredGate,
    View,
    quantiles_of,
    worth_searching,
)
from nearest.retrieval.gates.meta_k import MetaKGate, fit_meta_k, meta_k_inputs
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate
from nearest.retrieval.gates.network import FOLDS, STEPS, folds_of, train_network
from nearest.retrieval.gates.stored import GATES, restored
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.settings import Settings
from nearest.verbs.mixture_examples import _ways

TOKENIZER = make_tokenizer()
COLUMNS = 8
RIGHT, WRONG = 5, 6
LM_PROB = 0.1
KINDS = (BucketsGate, MetaKGate, AdaptRetGate)


class Text:
    """Predictions whose memory is right exactly where the nearest distance is below 10.

    There the key's first dimension is positive, and only the first neighbour has the token that
    came; elsewhere no neighbour has it. The model always gives that token LM_PROB.
    """

    def __init__(self, memory: Memory, rows: int = 3000, documents: int = 20, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.memory, self.rows = memory, rows
        nearest = rng.uniform(0, 20, rows)
        self.good = nearest < 10
        steps = rng.uniform(0, 1, (rows, COLUMNS - 1)).cumsum(axis=1)
        self.distances = np.c_[nearest, nearest[:, None] + steps].astype(np.float32)
        self.values = np.full((rows, COLUMNS), WRONG)
        self.values[self.good, 0] = RIGHT
        self.ids = np.arange(rows * COLUMNS).reshape(rows, COLUMNS)
        self.keys = rng.normal(size=(rows, 4)).astype(np.float32)
        self.keys[:, 0] = np.where(self.good, 1, -1) * rng.uniform(0.2, 2, rows)
        self.documents = np.sort(rng.integers(0, documents, rows))
        self.entropy = rng.uniform(0, 5, rows).astype(np.float32)
        self.context = rng.integers(0, 258, rows)

    def view(self, rows: np.ndarray) -> View:
        lm = LmView(self.entropy[rows], -self.entropy[rows])
        candidates = Candidates(
            self.ids[rows],
            self.values[rows],
            self.distances[rows],
            np.zeros((len(rows), COLUMNS), np.int16),
            (COLUMNS, 0, 0),
            np.ones(len(rows), dtype=bool),
        )
        return View(Queries(self.keys[rows], self.context, rows, lm), candidates, self.memory)

    def seen(self, rows: np.ndarray | None = None, batch: int = 256) -> Iterator[Examples]:
        chosen = np.arange(self.rows) if rows is None else rows
        for start in range(0, len(chosen), batch):
            some = chosen[start : start + batch]
            yield Examples(
                some,
                self.view(some),
                np.full(len(some), RIGHT),
                np.full(len(some), np.log(LM_PROB)),
                self.documents[some],
            )

    def nll(self, gate: Gate, searched: np.ndarray | None = None) -> float:
        view = self.view(np.arange(self.rows))
        shares = gate.shares(view)
        if searched is not None:
            shares = shares * searched[:, None]
        probs = component_probs(view.candidates, gate.components, np.full(self.rows, RIGHT))
        mixed = (shares * probs).sum(axis=1) + (1 - shares.sum(axis=1)) * LM_PROB
        return float(-np.log(mixed).mean())


@pytest.fixture(scope="module")
def text(tiny_memory: Memory) -> Text:
    return Text(tiny_memory)


@pytest.fixture(scope="module")
def other(tiny_memory: Memory) -> Text:
    return Text(tiny_memory, seed=1)


def fit(kind: type, text: Text, rows: np.ndarray | None = None, batch: int = 256) -> StoredGate:
    seen = text.seen(rows, batch)
    if kind is BucketsGate:
        return fit_buckets(seen, 20, ks=(1, 4))
    with gates_trained_at_once(200):
        return fit_meta_k(seen, COLUMNS) if kind is MetaKGate else fit_adaptret(seen)


@pytest.fixture(scope="module")
def gates(text: Text) -> dict[type, StoredGate]:
    return {kind: fit(kind, text) for kind in KINDS}


def stored(gate: StoredGate) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = {name: tensor.numpy() for name, tensor in gate.state_dict().items()}
    return json.loads(msgspec.json.encode(gate.config)), arrays


def brought_back(kind: type, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> StoredGate:
    return restored(next(name for name in GATES if GATES[name] is kind), config, arrays)


# The best constant shares.


probabilities = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0])


@pytest.mark.slow
@given(st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=30))
def test_the_best_lam_is_that_of_a_fine_grid(pairs: list[tuple[float, float]]) -> None:
    lm, memory = np.array(pairs).T
    possible = (lm > 0) | (memory > 0)
    (lam,) = best_lams(lm, memory[:, None])
    assert 0 <= lam <= LARGEST_LAM
    grid = np.linspace(0, LARGEST_LAM, 2001)
    with np.errstate(divide="ignore"):
        losses = [
            -np.log(lm[possible] * (1 - at) + at * memory[possible]).sum() for at in (*grid, lam)
        ]
    assert losses[-1] <= min(losses) + 1e-6 or np.isinf(min(losses))


def test_lams_in_closed_form() -> None:
    # λ·1 + (1 − λ)·½ in three of four tokens, (1 − λ)·½ in the other: 3 / (1 + λ) = 1 / (1 − λ).
    lm, right = np.full(4, 0.5), np.array([1.0, 1.0, 1.0, 0.0])
    lams = best_lams(lm, np.stack([right, np.ones(4), np.zeros(4), lm], axis=1))
    np.testing.assert_allclose(lams[:3], [0.5, LARGEST_LAM, 0.0], atol=1e-9)
    losses = nll(lm, right[:, None], lams[:1])
    np.testing.assert_allclose(losses, -3 * np.log(0.75) - np.log(0.25))
    # Three sources that are right at disjoint tokens get shares by how often they are.
    disjoint = np.eye(3)[[0, 0, 0, 1, 1, 2]]
    shares = best_shares(disjoint)
    np.testing.assert_allclose(shares, [3 / 6, 2 / 6, 1 / 6])
    assert mixed_nll(disjoint, shares) == pytest.approx(
        -3 * np.log(1 / 2) - 2 * np.log(1 / 3) - np.log(1 / 6)
    )


# Buckets.


def test_buckets_hold_equally_many_and_each_has_its_own_best_lam(text: Text) -> None:
    gate = fit_buckets(text.seen(), 20, ks=(1, 4))
    bucket = bucket_of(text.distances[:, 0], gate.edges.numpy())
    assert np.bincount(bucket).tolist() == [text.rows // 20] * 20
    view = text.view(np.arange(text.rows))
    probs = component_probs(view.candidates, gate.components, np.full(text.rows, RIGHT))[:, 0]
    grid = np.linspace(0, LARGEST_LAM, 1001)
    for number, lam in enumerate(gate.lams.tolist()):
        own = probs[bucket == number]
        losses = [-np.log(LM_PROB + at * (own - LM_PROB)).mean() for at in grid]
        assert lam == pytest.approx(grid[np.argmin(losses)], abs=2e-3)
    np.testing.assert_array_equal(gate.shares(view)[:, 0], gate.lams.numpy()[bucket])
    assert gate.config.first == 1  # only the first neighbour is ever right


def test_equal_distances_stay_together_and_small_texts_have_fewer_buckets(
    tiny_memory: Memory,
) -> None:
    text = Text(tiny_memory, rows=100)
    assert len(fit_buckets(text.seen()).lams) == 3  # of at least 32 tokens
    for equal, edges in ((40, [2.0]), (90, []), (100, [])):
        text.distances[:equal], text.distances[equal:] = 1.0, 2.0
        assert fit_buckets(text.seen()).edges.tolist() == edges


def test_buckets_of_three_tokens_are_one(tiny_memory: Memory) -> None:
    text = Text(tiny_memory, rows=3)
    gate = fit_buckets(text.seen())
    assert gate.edges.shape == (0,)
    assert gate.lams.shape == (1,)
    assert text.nll(gate) <= -np.log(LM_PROB)


# Meta-k.


@given(st.integers(0, 2**31), st.integers(1, 7), st.sampled_from([1, 2, 4, 8]))
def test_meta_k_looks_at_distances_and_distinct_values(seed: int, columns: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.normal(size=(4, columns)).astype(np.float32), axis=1)
    values = rng.integers(0, 3, (4, columns))
    found = rng.integers(0, columns + 1, 4)
    for row, count in enumerate(found):
        distances[row, count:], values[row, count:] = np.inf, -1
    pointed = np.full((4, 2), 9)  # of another source: not looked at
    candidates = Candidates(
        np.c_[values, pointed],
        np.c_[values, pointed],
        np.c_[distances, np.zeros((4, 2), np.float32)],
        np.zeros((4, columns + 2), np.int16),
        (columns, 2, 0),
        np.ones(4, dtype=bool),
    )
    inputs = meta_k_inputs(candidates, most)
    assert inputs.dtype == np.float32
    for row, count in enumerate(found):
        for k in range(most):
            last = min(k, count - 1)
            assert inputs[row, k] == (distances[row, last] if count else 0)
            assert inputs[row, most + k] == len(set(values[row, : min(k + 1, count)]))


# AdaptRet.


def test_adaptret_looks_at_key_model_and_corpus(text: Text) -> None:
    rows = np.arange(50, 60)
    inputs = adaptret_inputs(text.view(rows))
    ngrams = text.memory.ngrams(text.context, rows, 4)
    assert ngrams.counts.any()
    for i, row in enumerate(rows):
        expected = [*text.keys[row], np.exp(-text.entropy[row]), text.entropy[row]]
        expected += [np.log(1 + count) for count in ngrams.counts[i]]
        expected += [np.log(1 + count) for count in ngrams.fertility[i]]
        np.testing.assert_allclose(inputs[i], expected, rtol=1e-6)


def test_adaptret_needs_the_model_and_the_memory(text: Text) -> None:
    view = text.view(np.arange(3))
    for lacking in (
        view._replace(memory=None),
        view._replace(queries=view.queries._replace(lm=None)),
    ):
        with pytest.raises(ValueError, match="needs the language model's view"):
            adaptret_inputs(lacking)


def test_adaptret_refuses_to_count_a_text_in_itself(text: Text) -> None:
    view = text.view(np.arange(3))
    for own in (np.full(3, -1), np.array([-1, 7, -1])):  # of texts that the memory does not hold
        known = view._replace(queries=view.queries._replace(own=own))
        if (own < 0).all():
            assert np.array_equal(adaptret_inputs(known), adaptret_inputs(view))
        else:
            with pytest.raises(SettingError, match="leave leave_one_out out"):
                adaptret_inputs(known)


def test_adaptret_is_trained_by_the_published_loss(rng: np.random.Generator) -> None:
    logits, lm, memory = rng.normal(size=(7, 2)), rng.random(7), rng.random(7)
    total = 0.0
    for (a, b), p_lm, p_memory in zip(logits, lm, memory, strict=True):
        lam = np.exp(b) / (np.exp(a) + np.exp(b))
        total += -np.log((1 - lam) * p_lm + lam * p_memory) + 0.05 * lam
    loss = adaptret_loss(*map(torch.from_numpy, (logits, lm, memory)))
    assert float(loss) == pytest.approx(total / 7)


@pytest.mark.parametrize("skip", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_as_many_searches_are_skipped_as_asked_for_and_the_worst_ones(
    gates: dict[type, Any], other: Text, skip: float
) -> None:
    gate = gates[AdaptRetGate]
    view = other.view(np.arange(other.rows))
    nothing = view.candidates._replace(
        **{
            name: getattr(view.candidates, name)[:, :0]
            for name in ("ids", "values", "distances", "lengths")
        },
        columns=(0, 0, 0),
        searched=np.zeros(other.rows, dtype=bool),
    )
    before = view._replace(candidates=nothing)
    searched = gate.worth_searching(before, skip)
    assert 1 - searched.mean() == pytest.approx(skip, abs=0.05)
    lams = gate.shares(view)[:, 0]
    if 0 < skip < 1:
        assert lams[searched].min() >= lams[~searched].max()
    np.testing.assert_array_equal(gate.shares(before), np.zeros((other.rows, 1)))  # the pure model
    if skip == 0.5:  # about those where the memory is wrong: nothing is lost
        assert other.nll(gate, searched) == pytest.approx(other.nll(gate), abs=0.05)
    if skip == 1:
        assert other.nll(gate, searched) == pytest.approx(-np.log(LM_PROB))


@pytest.mark.parametrize("skip", [0.0, 0.3, 0.99, 1.0])
def test_quantiles_part_what_can_be_told_apart(
    text: Text, rng: np.random.Generator, skip: float
) -> None:
    view = text.view(np.arange(200))
    figures = rng.permutation(200).astype(np.float32)
    worth = worth_searching(view, lambda _: figures, quantiles_of(figures), skip)
    assert set(figures[~worth]) == set(range(round(200 * skip)))
    equal = np.ones(200, np.float32)
    same = worth_searching(view, lambda _: equal, quantiles_of(equal), skip)
    assert same.tolist() == [skip < 1] * 200


# All of them.


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_finds_where_the_memory_is_right(
    kind: type, gates: dict[type, Gate], other: Text
) -> None:
    gate = gates[kind]
    lam = LARGEST_LAM if kind is BucketsGate else 1.0
    right = -np.log(lam + (1 - lam) * LM_PROB)
    optimum = other.good.mean() * right - (1 - other.good.mean()) * np.log(LM_PROB)
    # With a fixed λ at half: (½ + ½·LM_PROB) and ½·LM_PROB; at 0: LM_PROB. The best is between.
    certain = other.good.astype(float)
    (fixed,) = best_lams(np.full(other.rows, LM_PROB), certain[:, None])
    best_fixed = -np.log(LM_PROB + fixed * (certain - LM_PROB)).mean()
    if kind is AdaptRetGate:  # its one component weighs all neighbours, of which one is right
        view = other.view(np.flatnonzero(other.good))
        probs = component_probs(view.candidates, gate.components, np.full(len(view[0].keys), RIGHT))
        assert probs.mean() > 0.5
        optimum = -other.good.mean() * np.log(probs).mean()
        optimum -= (1 - other.good.mean()) * np.log(LM_PROB)
    assert other.nll(gate) < optimum + 0.1
    assert other.nll(gate) < best_fixed - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_predictions_in_other_batches_give_the_same_gate(
    kind: type, gates: dict[type, StoredGate], text: Text
) -> None:
    order = np.random.default_rng(0).permutation(text.rows)
    config, arrays = stored(fit(kind, text, order, batch=100))
    expected_config, expected = stored(gates[kind])
    assert config == expected_config
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_without_a_neighbour_are_the_models_and_teach_nothing(
    kind: type, gates: dict[type, StoredGate], text: Text, tiny_memory: Memory
) -> None:
    more = Text(tiny_memory)
    more.ids[::7], more.values[::7], more.distances[::7] = -1, -1, np.inf
    some = np.setdiff1d(np.arange(more.rows), np.arange(0, more.rows, 7))
    whole, part = fit(kind, more), fit(kind, text, some)
    for one, another in zip(stored(whole)[1].values(), stored(part)[1].values(), strict=True):
        np.testing.assert_array_equal(one, another)
    shares = whole.shares(more.view(np.arange(more.rows)))
    assert (shares[::7] == 0).all()
    np.testing.assert_allclose(shares[some], part.shares(text.view(some)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_gate_comes_back(kind: type, gates: dict[type, StoredGate], other: Text) -> None:
    config, arrays = stored(gates[kind])
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert sum(array.size for array in arrays.values()) < 10_000
    restored = brought_back(kind, config, arrays)
    view = other.view(np.arange(other.rows))
    np.testing.assert_array_equal(restored.shares(view), gates[kind].shares(view))
    assert restored.components == gates[kind].components


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_foreign_gate_is_refused(kind: type, gates: dict[type, StoredGate]) -> None:
    config, arrays = stored(gates[kind])
    refused = (KeyError, TypeError, ValueError)
    for name in arrays:
        for changed in (
            arrays[name][:-1],
            arrays[name][None],
            np.full_like(arrays[name], np.nan),
            arrays[name].astype(int),
        ):
            with pytest.raises(refused):
                brought_back(kind, config, {**arrays, name: changed})
        with pytest.raises(refused):
            brought_back(kind, config, {other: arrays[other] for other in arrays if other != name})
    for changes in (
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"temperature": None},
        {"temperature": -3.0},
    ):
        with pytest.raises(refused):
            brought_back(kind, {**config, **changes}, arrays)
    for foreign in set(KINDS) - {kind}:
        with pytest.raises(refused):
            brought_back(kind, *stored(gates[foreign]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_one_document_is_enough(kind: type, tiny_memory: Memory) -> None:
    text = Text(tiny_memory, rows=400, documents=1)
    assert text.nll(fit(kind, text)) < -np.log(LM_PROB)


@pytest.mark.parametrize("kind", [MetaKGate, AdaptRetGate])
def test_three_tokens_are_too_few_for_a_network(kind: type, tiny_memory: Memory) -> None:
    with pytest.raises(SettingError, match="3 tokens, too few"):
        fit(kind, Text(tiny_memory, rows=3))


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_neighbour_nothing_can_be_fitted(kind: type, tiny_memory: Memory) -> None:
    nothing = Text(tiny_memory, rows=300)
    nothing.ids[:], nothing.values[:], nothing.distances[:] = -1, -1, np.inf
    with pytest.raises(SettingError, match="found nothing for any prediction"):
        fit(kind, nothing)
    with pytest.raises(SettingError, match="found nothing for any prediction"):
        fit(kind, nothing, np.arange(0))


def test_options_that_make_no_sense(text: Text) -> None:
    with pytest.raises(SettingError, match="buckets must be at least 1, got 0"):
        fit_buckets(text.seen(), 0)
    for most in (0, 12):
        with pytest.raises(SettingError, match=f"power of two, got {most}"):
            fit_meta_k(text.seen(), most)


# Training.


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_folds_are_of_whole_documents_or_of_runs(sizes: list[int], seed: int) -> None:
    documents = np.repeat(np.random.default_rng(seed).permutation(len(sizes)), sizes)
    folds = folds_of(documents)
    held = np.bincount(folds, minlength=5)
    assert len(folds) == sum(sizes)
    if len(sizes) < 5:
        assert (np.diff(folds) >= 0).all()
        assert held.max() - held.min() <= 1
    else:
        assert all(len(set(folds[documents == document])) == 1 for document in range(len(sizes)))
        assert held.max() - held.min() <= max(sizes)


def test_what_the_inputs_do_not_say_is_not_learnt_by_heart() -> None:
    """Where left-out predictions only get worse, the untrained network is kept."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 10)).astype(np.float32)
    noise = torch.from_numpy(rng.normal(size=600).astype(np.float32))
    steps: list[int] = []

    def loss(rows: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return ((outputs[..., 0] - noise[rows]) ** 2).mean(-1)

    network = train_network(
        inputs,
        loss,
        noise.mean()[None].numpy(),
        folds_of(np.repeat(np.arange(30), 20)),
        progress=lambda _stage, done, _total: steps.append(done),
    )
    assert network(inputs).std() < 0.3
    assert max(steps[:-1]) < STEPS  # it has stopped early, and told so
    assert steps[-1] == STEPS


def test_each_fold_is_left_out_by_its_copy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy f learns nothing of fold f, is judged by nothing else, and the last copy sees all."""
    monkeypatch.setattr(network, "_CHECKED", 10**6)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 3)).astype(np.float32)
    folds = folds_of(np.repeat(np.arange(20), rng.integers(1, 50, 20)))[:500]
    inputs = inputs[: len(folds)]
    targets = torch.from_numpy(inputs[:, 0])
    trained: list[set[int]] = [set() for _ in range(FOLDS + 1)]
    judged: list[set[int]] = []

    def loss(rows: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            judged.append(set(rows.flatten().tolist()))
        else:
            for copy, own in zip(trained, rows.tolist(), strict=True):
                copy.update(own)
        return ((outputs[..., 0] - targets[rows]) ** 2).mean(-1)

    train_network(inputs, loss, np.zeros(1), folds, hidden=(8,), steps=100)
    for fold in range(FOLDS):
        own = set(np.flatnonzero(folds == fold).tolist())
        assert trained[fold] == set(range(len(folds))) - own
        assert all(judged[check + fold] == own for check in range(0, len(judged), FOLDS))
    assert trained[-1] == set(range(len(folds)))


def test_a_trained_gate_leaves_every_token_possible(text: Text) -> None:
    """However sure the network is: a token that the memory lacks keeps the model's probability."""

    def sure(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
        bias = torch.where(torch.arange(outputs) == 1, 200.0, 0.0)
        state = {"mean": torch.zeros(inputs), "scale": torch.ones(inputs)}
        state |= {"0.weight": torch.zeros(inputs, outputs), "0.bias": bias}
        return {f"mix.{name}": tensor for name, tensor in state.items()}

    view = text.view(np.arange(50))
    config = MixtureConfig.over(("dense",), 1.0)
    quantiles = {"quantiles": torch.linspace(-1, 1, 101)}
    gates = (
        MetaKGate(MetaKGate.Config(1.0, 4), sure(8, 4)),
        AdaptRetGate(AdaptRetGate.Config(1.0), sure(adaptret_inputs(view).shape[1], 2) | quantiles),
        MixtureGate(config, sure(config.features(view).shape[1], 1 + len(config.components))),
    )
    for gate in gates:
        np.testing.assert_allclose(gate.shares(view).sum(axis=1), 0.999, atol=1e-6)


def test_emphasis_is_the_spread_of_an_input() -> None:
    inputs = np.random.default_rng(0).normal(3, 7, (300, 2)).astype(np.float32)
    network = train_network(
        inputs,
        lambda _rows, outputs: (outputs**2).mean((-1, -2)),
        np.zeros(1),
        np.arange(300) % 5,
        steps=1,
        emphasis=np.array([0.1, 1]),
    )
    state = network.state_dict()
    spread = ((torch.from_numpy(inputs) - state["mean"]) / state["scale"]).std(0)
    np.testing.assert_allclose(spread, [0.1, 1], rtol=5e-3)


# Through the verbs.


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


METHODS = ("knn+buckets", "knn+meta-k", "knn+adaptret")


@pytest.fixture(scope="module")
def tuned_memory(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    memory = build_memory(model, make_documents(30, 40))
    for method in METHODS:
        text = make_documents(12, 40, seed=1)
        with gates_trained_at_once():
            tuned = tune(model, Memory.open(memory.path), text, method=method, tokenizer=TOKENIZER)
        assert tuned.nll < tuned.base_nll
    return Memory.open(memory.path)


@pytest.mark.slow
def test_gates_help_on_another_text(model: PreTrainedModel, tuned_memory: Memory) -> None:
    text = make_documents(6, 40, seed=2)
    base, buckets, meta_k = evaluate(
        model, tuned_memory, text, ["base", *METHODS[:2]], tokenizer=TOKENIZER
    )
    all_searches, half, none = (
        evaluate(model, tuned_memory, text, "knn+adaptret", tokenizer=TOKENIZER, skip=skip)
        for skip in (0.0, 0.5, 1.0)
    )
    for result in (buckets, meta_k, all_searches):
        assert result.foss == 0
        assert result.nll < base.nll
    assert 0.2 < half.foss < 0.8
    assert all_searches.nll < half.nll < base.nll
    assert none.foss == 1
    np.testing.assert_allclose(none.document_nll, base.document_nll, rtol=1e-5)


def test_adaptret_is_given_the_context(tuned_memory: Memory) -> None:
    needs = {
        method: Lookup.of(tuned_memory, method, Settings()).needs_context for method in METHODS
    }
    assert needs == {"knn+buckets": False, "knn+meta-k": False, "knn+adaptret": True}


SHARED = Path(__file__).parents[2] / "shared"


@pytest.mark.long
@pytest.mark.skipif(not (SHARED / "corpora").is_dir(), reason="needs ../shared/corpora")
def test_gates_beat_the_tuned_lam_on_real_text(tmp_path: Path) -> None:
    """Statutes as memory of a general model; fitted on valid's even documents, scored on odd."""
    folder = SHARED / "lm" / "general-gpt2-7m"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = SHARED / "corpora" / "dclaw"
    train, valid = (
        list(itertools.islice(read_documents([corpus / name]), count))
        for name, count in (("train-2m.jsonl", 400), ("valid.jsonl", 80))
    )
    path = tmp_path / "law.memory"
    Memory.build(model, tokenizer, train, path)
    for method in ("knn", *METHODS):
        tune(model, Memory.open(path), valid[::2], method=method, tokenizer=tokenizer)
    memory = Memory.open(path)
    fixed, *gated = (
        evaluate(model, memory, valid[1::2], method, tokenizer=tokenizer, **options)
        for method, options in zip(("knn", *METHODS), ({}, {}, {}, {"skip": 0.0}), strict=True)
    )
    for result in gated:
        assert result.nll < fixed.nll


def test_a_gate_is_trained_on_candidates_without_repetitions() -> None:
    """As they are when it weighs them, whether a search is made or not."""
    ids = np.array([[7, 1, 5, 5, 7]])
    found = Candidates(
        ids, ids + 1, np.ones(ids.shape, np.float32), np.zeros(ids.shape, np.int16),
        (2, 3, 0), np.array([True]),
    )  # fmt: skip
    queries = Queries(np.zeros((1, 2), np.float32), np.array([3]), np.array([0]))
    row = np.zeros(1, dtype=np.int64)
    one = Examples(row, View(queries, found), row, np.zeros(1, np.float32), row)
    with_search, without = (
        way.view.candidates.ids.tolist() for way in _ways(one, Settings(dedup=True))
    )
    assert with_search == [[7, 1, 5, -1, -1]]
    assert without == [[5, -1, 7]]
