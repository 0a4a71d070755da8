"""The mixture gate, its network, the votes it looks at, and the guard, against plain loops."""

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from conftest import (
    edit_manifest,
    gates_trained_at_once,
    make_documents,
    make_model,
    make_tokenizer,
    random_documents,
)
from nearest import Memory, evaluate, tune
from nearest.encode.view import LmView, lm_view
from nearest.errors import FolderError, SettingError
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import (
    Component,
    are_found,
    component_probs,
    component_votes,
)
from nearest.retrieval.gates.fit_mixture import distance_unit, fit_mixture
from nearest.retrieval.gates.fitting import TEMPERATURES, best_lams, nll
from nearest.retrieval.gates.gate import Examples, View
from nearest.retrieval.gates.guard import gained, gained_before, gains_of, guarded
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate
from nearest.retrieval.gates.network import Network, train_network
from nearest.retrieval.gates.shipped import shipped_gate
from nearest.retrieval.gates.stored import restored
from nearest.retrieval.queries import Queries
from nearest.retrieval.votes import kind_figures
from plain_kernels import plain_component_weights, plain_votes

TOKENIZER = make_tokenizer()
ALL = ("dense", "pointers", "suffix")


def view_of(rows: int, rng: np.random.Generator, none: tuple[str, ...] = ()) -> View:
    """Random candidates, some missing; kinds in `none` have found nothing at all."""
    columns = (4, 3, 5)
    distances = rng.random((rows, 12)).astype(np.float32) * 20
    distances[rng.random((rows, 12)) < 0.3] = np.inf
    for kind, part in zip(ALL, (slice(0, 4), slice(4, 7), slice(7, 12)), strict=True):
        if kind in none:
            distances[:, part] = np.inf
    missing = np.isinf(distances)
    ids = np.where(missing, -1, rng.integers(0, 100, (rows, 12)))
    values = np.where(missing, -1, rng.integers(0, 5, (rows, 12)))
    lengths = np.where(missing, 0, rng.integers(0, 9, (rows, 12))).astype(np.int16)
    lm = LmView(rng.random(rows).astype(np.float32) * 5, -rng.random(rows).astype(np.float32) * 5)
    queries = Queries(
        np.zeros((rows, 2), np.float32), np.zeros(1, np.int64), np.zeros(rows, int), lm
    )
    return View(
        queries, Candidates(ids, values, distances, lengths, columns, np.ones(rows, dtype=bool))
    )


@given(st.integers(0, 2**31), st.sampled_from([(), ("dense",), ALL]))
def test_votes_equal_a_dictionary(seed: int, none: tuple[str, ...]) -> None:
    view = view_of(4, np.random.default_rng(seed), none)
    found = view.candidates
    values = np.where(found.values < 0, -1, found.values * 4096)  # one slot of a small hash table
    components = [Component(("dense",), 3.0), Component(ALL, 7.0, 2.0)]
    counted = component_votes(found._replace(values=values), components)
    for number, (kinds, temperature, power, _) in enumerate(components):
        own = found.of(*kinds)
        weights = plain_component_weights(
            found.distances[:, own], found.lengths[:, own], temperature, power
        )
        expected = plain_votes(weights.astype(np.float32), values[:, own])
        np.testing.assert_allclose(counted[:, number], expected, atol=1e-4)


@given(st.integers(0, 2**31), st.sampled_from([(), ("pointers",), ALL]))
def test_figures_of_kinds_equal_numpy(seed: int, none: tuple[str, ...]) -> None:
    found = view_of(4, np.random.default_rng(seed), none).candidates
    figures = kind_figures(found, ("dense", "suffix"))
    for number, kind in enumerate(("dense", "suffix")):
        distances, lengths = found.distances[:, found.of(kind)], found.lengths[:, found.of(kind)]
        count = np.isfinite(distances).sum(axis=1)
        nearest = np.where(count > 0, distances.min(axis=1), 0)
        expected = np.stack([count, nearest, lengths.max(axis=1)], axis=1)
        np.testing.assert_array_equal(figures[:, number], expected)


@pytest.mark.slow
def test_the_network_computes_what_was_trained() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(3, 2, (500, 4)).astype(np.float32)
    targets = torch.from_numpy(inputs[:, :1] * 2 - inputs[:, 1:2])

    def loss(rows: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets[rows]) ** 2).mean((1, 2))

    network, same = (
        train_network(inputs, loss, np.zeros(1), np.arange(500) % 5, steps=100) for _ in range(2)
    )
    state = network.state_dict()
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, state[name])
    layers: list[nn.Module] = []
    for layer in range(3):
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        linear = nn.Linear(*weight.shape)
        linear.weight.data, linear.bias.data = weight.T, bias
        layers += [linear, nn.GELU(approximate="tanh")]
    torch_network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        standard = (torch.from_numpy(inputs) - state["mean"]) / state["scale"]
        expected = torch_network(standard).numpy()
    np.testing.assert_allclose(network(inputs), expected, atol=1e-4)
    assert float(((network(inputs) - targets.numpy()) ** 2).mean()) < 0.1 * float(targets.var())


@functools.cache
def fitted() -> MixtureGate:
    """A gate of random text; searches help where the model is unsure."""

    def examples(none: tuple[str, ...]) -> Iterator[Examples]:
        for number in range(2):
            rng = np.random.default_rng(number)
            view = view_of(150, rng, none)
            targets = rng.integers(0, 5, 150)
            unsure = view.queries.lm.entropy > 2.5
            own = view.candidates.values[:, view.candidates.of("dense")]
            own[unsure] = np.where(own[unsure] < 0, -1, targets[unsure, None])
            yield Examples(
                np.arange(150) + 150 * number,
                view,
                targets,
                np.log(rng.random(150).astype(np.float32) * 0.5 + 1e-3),
                np.zeros(150, int),
            )

    config = MixtureConfig.over(ALL, distance_unit(examples(())))
    ways = zip(examples(()), examples(("dense",)), strict=True)
    with gates_trained_at_once():
        return fit_mixture(config, ways, 0.5)[0]


def test_shares_are_of_what_there_is_and_leave_some_to_the_model(rng: np.random.Generator) -> None:
    gate = fitted()
    view = view_of(60, rng, ("pointers",))
    shares = gate.shares(view)
    has = are_found(view.candidates, gate.components)
    for number, component in enumerate(gate.components):
        own = view.candidates.distances[:, view.candidates.of(*component.kinds)]
        assert has[:, number].tolist() == np.isfinite(own).any(axis=1).tolist()
    assert (shares[~has] == 0).all()
    assert (shares[has] > 0).all()
    assert (shares.sum(axis=1) < 1).all()


def stored(gate: MixtureGate) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = {name: tensor.numpy() for name, tensor in gate.state_dict().items()}
    return json.loads(msgspec.json.encode(gate.config)), arrays


def test_a_gate_is_the_same_after_storing(rng: np.random.Generator) -> None:
    gate = fitted()
    again = restored("mixture", *stored(gate))
    view = view_of(40, rng)
    np.testing.assert_array_equal(again.shares(view), gate.shares(view))
    for skip in (0.0, 0.3, 1.0):
        np.testing.assert_array_equal(
            again.worth_searching(view, skip), gate.worth_searching(view, skip)
        )


def test_a_gate_says_the_same_where_all_distances_are_a_multiple(rng: np.random.Generator) -> None:
    """So it means the same with another model, whose keys lie farther apart."""
    gate = fitted()
    farther = MixtureConfig.over(ALL, 37.0 * gate.config.unit)
    view = view_of(60, rng)
    far = view._replace(
        candidates=view.candidates._replace(distances=view.candidates.distances * 37)
    )
    other = MixtureGate(farther, gate.state_dict())
    np.testing.assert_allclose(other.shares(far), gate.shares(view), atol=1e-4)
    np.testing.assert_allclose(
        farther.features_before(far), gate.config.features_before(view), atol=1e-4
    )
    assert not np.allclose(gate.shares(far), gate.shares(view), atol=1e-2)
    assert farther.alike(gate.config)
    assert not MixtureConfig.over(("suffix",), 1.0).alike(gate.config)
    older = msgspec.structs.replace(gate.config, unit=1.0)  # looked at distances as they are
    assert not older.alike(farther)


def examples_of(seed: int, rows: int) -> Iterator[tuple[Examples, ...]]:
    """The memory's only candidate is right where its match is long, and else in one of fifty."""
    rng = np.random.default_rng(seed)
    good = rng.random(rows) < 0.5
    targets = rng.integers(0, 50, rows)
    values = np.where(good, targets, rng.integers(0, 50, rows))[:, None]
    lengths = np.where(good, 9, 1)[:, None].astype(np.int16)
    lm = LmView(np.full(rows, 3.9, np.float32), np.full(rows, -3.9, np.float32))
    queries = Queries(
        np.zeros((rows, 2), np.float32), np.zeros(1, np.int64), np.zeros(rows, int), lm
    )
    candidates = Candidates(
        np.ones((rows, 1), int), values, np.ones((rows, 1), np.float32), lengths, (0, 0, 1),
        np.zeros(rows, dtype=bool),
    )  # fmt: skip
    yield (
        Examples(
            np.arange(rows), View(queries, candidates), targets,
            np.full(rows, -3.9, np.float32), np.arange(rows) // 50,
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_a_gate_that_starts_from_another_needs_less_text() -> None:
    config = MixtureConfig.over(("suffix",), 1.0)
    with gates_trained_at_once(150):
        other, _ = fit_mixture(config, examples_of(0, 2000))
    few = MixtureConfig.over(("suffix",), 2.0)
    nlls = {}
    for begin in (None, other):
        with gates_trained_at_once(20):
            gate, _ = fit_mixture(few, examples_of(1, 250), begin=begin)
        ((held_out,),) = examples_of(2, 1000)
        probs = component_probs(held_out.view.candidates, gate.components, held_out.targets)
        shares = gate.shares(held_out.view)
        lm = np.exp(held_out.lm_log_probs)
        nlls[begin] = -np.log((shares * probs).sum(1) + (1 - shares.sum(1)) * lm).mean()
    assert nlls[other] < nlls[None] - 0.2
    assert gate.config.unit == 2.0
    with gates_trained_at_once(0):  # without training it is the other one
        same, _ = fit_mixture(few, examples_of(1, 250), begin=other)
    layers = [name for name in other.state_dict() if name.endswith(("weight", "bias"))]
    assert all(torch.equal(same.state_dict()[name], other.state_dict()[name]) for name in layers)


def test_a_gate_of_another_method_is_nothing_to_start_from() -> None:
    with pytest.raises(SettingError, match="looks at other things"):
        fit_mixture(MixtureConfig.over(("suffix",), 1.0), examples_of(1, 250), begin=fitted())


def test_a_damaged_or_hostile_gate_is_refused() -> None:
    config, arrays = stored(fitted())
    refused = (KeyError, TypeError, ValueError)
    components = config["components"]
    for changes in (
        {"components": components[1:]},
        {"components": []},
        {"components": [[["dense"], -3.0, 0.0], *components[1:]]},
        {"components": [[["dense"], 0.0, 0.0], *components[1:]]},
        {"components": [[["dense"], 1e300, 0.0], *components[1:]]},
        {"components": [[["dense"], 1.0, -1.0], *components[1:]]},
        {"components": [[["dense", "suffix"], 1.0, 0.0], *components[1:]]},
        {"components": [[["elsewhere"], 1.0, 0.0], *components[1:]]},
        {"sources": ["dense"]},
        {"sources": ["suffix", "pointers", "dense"]},
        {"sources": ["elsewhere"]},
        {"sources": None},
        {"voted": [99]},
        {"voted": [-1]},
        {"voted": []},
    ):
        with pytest.raises(refused):
            restored("mixture", {**config, **changes}, arrays)
    for name, array in arrays.items():
        for changed in (array[:-1], array[None], np.full_like(array, np.nan), array.astype(int)):
            with pytest.raises(refused):
                restored("mixture", config, {**arrays, name: changed})
        if name != "quantiles":  # without them it is a gate that does not ask, with arrays over
            with pytest.raises(refused):
                restored("mixture", config, {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(refused):
        restored("mixture", config, {n: a for n, a in arrays.items() if n != "quantiles"})
    with pytest.raises(refused, match="no array 'more'"):
        restored("mixture", config, {**arrays, "more": np.zeros(1, np.float32)})
    falling = arrays["quantiles"][::-1].copy()
    with pytest.raises(refused, match="quantiles"):
        restored("mixture", config, {**arrays, "quantiles": falling})


def test_skip_is_the_fraction_of_the_tuning_text() -> None:
    gate = fitted()
    views = [view_of(150, np.random.default_rng(number)) for number in range(2)]
    for skip in (0.0, 0.25, 0.5, 0.75, 1.0):
        searched = np.mean([gate.worth_searching(view, skip).mean() for view in views])
        assert searched == pytest.approx(1 - skip, abs=0.02)


def test_the_gate_learns_when_to_trust_the_memory() -> None:
    """The memory is right when its match is long, else a lottery; the model knows little."""

    def examples(seed: int) -> Iterator[Examples]:
        rng = np.random.default_rng(seed)
        rows = 3000
        good = rng.random(rows) < 0.5
        targets = rng.integers(0, 50, rows)
        values = np.where(good, targets, rng.integers(0, 50, rows))[:, None].repeat(5, 1)
        lengths = np.where(good, 9, 1)[:, None].repeat(5, 1).astype(np.int16)
        lm = LmView(np.full(rows, np.log(50), np.float32), np.full(rows, -np.log(50), np.float32))
        queries = Queries(
            np.zeros((rows, 2), np.float32), np.zeros(1, np.int64), np.zeros(rows, int), lm
        )
        candidates = Candidates(
            np.ones((rows, 5), int), values, np.ones((rows, 5), np.float32), lengths, (0, 0, 5),
            np.zeros(rows, dtype=bool),
        )  # fmt: skip
        lm_log_probs = np.full(rows, -np.log(50), np.float32)
        documents = np.zeros(rows, int)
        yield Examples(np.arange(rows), View(queries, candidates), targets, lm_log_probs, documents)

    with gates_trained_at_once():
        config = MixtureConfig.over(("suffix",), 1.0)
        gate, _ = fit_mixture(config, ((one,) for one in examples(0)))
    (held_out,) = examples(1)
    shares = gate.shares(held_out.view)
    probs = component_probs(held_out.view.candidates, gate.components, held_out.targets)
    lm = np.exp(held_out.lm_log_probs)
    nll = -np.log((shares * probs).sum(1) + (1 - shares.sum(1)) * lm).mean()
    fixed = min(
        -np.log(lam * probs[:, 0] + (1 - lam) * lm).mean() for lam in np.linspace(0.01, 0.99, 99)
    )
    # Knowing when: half the tokens for certain, of the others 1 in 50 by chance, else the model.
    best = 0.5 * 0.0 + 0.5 * np.log(50)
    assert nll < best + 0.05 < fixed - 0.3


def test_a_gate_is_no_worse_than_the_best_temperature_and_lam() -> None:
    """Only the nearest knows; of the many others, each a unit farther, all are a lottery.

    At a temperature of .3 units they outweigh the nearest, at .15 they do not.
    """
    rng = np.random.default_rng(0)
    rows, columns = 1000, 200
    targets = rng.integers(0, 50, rows)
    values = rng.integers(0, 50, (rows, columns))
    values[:, 0] = np.where(rng.random(rows) < 0.6, targets, values[:, 0])
    distances = np.ones((rows, columns), np.float32)
    distances[:, 0] = 0
    lm = LmView(np.full(rows, np.log(50), np.float32), np.full(rows, -np.log(50), np.float32))
    queries = Queries(
        np.zeros((rows, 2), np.float32), np.zeros(1, np.int64), np.zeros(rows, int), lm
    )
    candidates = Candidates(
        np.ones((rows, columns), int), values, distances, np.zeros((rows, columns), np.int16),
        (columns, 0, 0), np.ones(rows, dtype=bool),
    )  # fmt: skip
    lm_log_probs = np.full(rows, -np.log(50), np.float32)
    one = Examples(
        np.arange(rows), View(queries, candidates), targets, lm_log_probs, np.zeros(rows, int)
    )
    with gates_trained_at_once():
        config = MixtureConfig.over(("dense",), distance_unit([one]))
        _, mixed = fit_mixture(config, [(one,)])
    components = [Component(("dense",), temperature) for temperature in TEMPERATURES]
    probs = component_probs(candidates, components, targets)
    lm_probs = np.full(rows, 1 / 50)
    best = nll(lm_probs, probs, best_lams(lm_probs, probs)).min() / rows
    assert -float(mixed.mean()) < best + 0.01 < np.log(50) - 1.0


def test_the_unit_is_the_gap_to_the_middle_candidate() -> None:
    view = view_of(1, np.random.default_rng(0))
    distances = np.full((1, 12), np.inf, np.float32)
    distances[0, [0, 5, 9]] = 2.0, 7.0, 30.0
    candidates = view.candidates._replace(distances=distances)
    one = Examples(
        np.zeros(1, int), View(view.queries, candidates), np.zeros(1, int),
        np.zeros(1, np.float32), np.zeros(1, int),
    )  # fmt: skip
    assert distance_unit([one]) == 5.0
    assert distance_unit([]) == 1.0


def test_components_are_of_the_methods_kinds_alone() -> None:
    for kinds in (("dense",), ("dense", "pointers"), ("suffix",), ALL):
        components = MixtureConfig.over(kinds, 2.0).weighed
        assert {kind for one in components for kind in one.kinds} == set(kinds)
    assert Component(("dense",), 0.6, 0.0) in MixtureConfig.over(("dense",), 2.0).weighed


def test_the_view_of_a_model_closed_form() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]).log()
    view = lm_view(log_probs)
    np.testing.assert_allclose(view.entropy, np.log([2, 3]), rtol=1e-5)
    np.testing.assert_allclose(view.max_log_prob, -np.log([2, 3]), rtol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_a_network_gives_each_row_what_torch_does_whatever_the_others(seed: int, rows: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    sizes = 7, 16, 16, 5
    state = {"mean": torch.randn(7, generator=rng), "scale": torch.rand(7, generator=rng) + 0.5}
    for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
        state[f"{layer}.weight"] = torch.randn(before, after, generator=rng)
        state[f"{layer}.bias"] = torch.randn(after, generator=rng)
    network = Network(state)
    inputs = 3 * torch.randn(rows, 7, generator=rng)
    hidden = (inputs.double() - state["mean"]) / state["scale"]
    for layer in range(3):
        hidden = hidden @ state[f"{layer}.weight"].double() + state[f"{layer}.bias"]
        if layer < 2:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    found = network(inputs.numpy())
    np.testing.assert_allclose(found, hidden.numpy(), rtol=1e-4, atol=1e-3)
    for row in range(rows):
        np.testing.assert_array_equal(network(inputs[row : row + 1].numpy())[0], found[row])


# The guard.


@given(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1, max_size=8))
def test_gains_of_memory_and_model_together_closed_form(
    probs: list[tuple[float, float, float]],
) -> None:
    base, memory, share = np.array(probs).T
    with np.errstate(divide="ignore"):
        logs = torch.from_numpy(np.log(base)), torch.from_numpy(np.log(share * base + memory))
        found = gains_of(torch.from_numpy(np.log(base).astype(np.float32)), memory, share)
    np.testing.assert_allclose(found, gained(*logs).numpy(), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_the_guard_equals_a_loop_and_costs_at_most_ln_2_a_document(
    seed: int, documents: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(documents), rng.integers(1, 9, documents))
    base = torch.from_numpy(np.log(rng.random(len(numbers)))).double()
    mixed = torch.from_numpy(np.log(rng.random(len(numbers)))).double()
    before = gained_before(gained(base, mixed), numbers)
    final = guarded(base, mixed, before).numpy()
    sums = dict.fromkeys(range(documents), 0.0)
    for i, number in enumerate(numbers):
        weight = 1 / (1 + np.exp(-sums[number]))
        both = np.exp([float(mixed[i]), float(base[i])])
        expected = np.log(weight * both[0] + (1 - weight) * both[1])
        assert final[i] == pytest.approx(expected, abs=1e-9)
        sums[number] += float(mixed[i] - base[i])
    for number in range(documents):
        own = numbers == number
        best = max(float(base[own].sum()), float(mixed[own].sum()))
        assert final[own].sum() >= best - np.log(2) - 1e-9


def test_an_impossible_token_does_not_break_the_guard() -> None:
    base = torch.tensor([-1.0, -1.0, -torch.inf, -1.0])
    mixed = torch.tensor([-torch.inf, -0.5, -torch.inf, -0.5])
    before = gained_before(gained(base, mixed), np.zeros(4, int))
    final = guarded(base, mixed, before)
    assert not final.isnan().any()
    assert final[0] == pytest.approx(-1 - np.log(2), abs=1e-6)
    assert final[1] == pytest.approx(-1.0, abs=1e-6)


# Through the verbs.


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="module")
def tuned_memory(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    memory = build_memory(model, make_documents(30, 40))
    text = make_documents(12, 40, seed=1)
    for method in ("hybrid", "knn+mixture", "retomaton+mixture", "suffix+mixture"):
        options = {} if method == "suffix+mixture" else {"k": 16}
        opened = Memory.open(memory.path)
        with gates_trained_at_once():
            tune(model, opened, text, method=method, tokenizer=TOKENIZER, **options)
    return Memory.open(memory.path)


TEXT = make_documents(6, 40, seed=2)


@pytest.mark.slow
def test_gates_help_and_are_used_by_their_method_alone(
    model: PreTrainedModel, tuned_memory: Memory
) -> None:
    methods = ["base", "knn", "knn+mixture", "retomaton+mixture", "suffix+mixture", "hybrid"]
    results = {
        result.method: result
        for result in evaluate(model, tuned_memory, TEXT, methods, tokenizer=TOKENIZER)
    }
    for method in methods[2:]:
        assert results[method].nll < results["base"].nll
        assert results[method].lam is None
    assert results["knn"].lam == 0.25
    assert results["knn"].foss == results["knn+mixture"].foss == 0
    assert results["suffix+mixture"].foss == 1
    assert 0.2 < results["hybrid"].foss < 0.8


def test_tuning_starts_from_the_gate_of_another_memory(
    model: PreTrainedModel, tuned_memory: Memory, build_memory: Callable[..., Memory]
) -> None:
    memory = build_memory(model, make_documents(10, 40, seed=5))
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "k": 16, "start": tuned_memory}
    with gates_trained_at_once(0):
        tune(model, memory, TEXT, method="hybrid", **options)
    begun, own = (stored_gate(m, "hybrid").arrays() for m in (tuned_memory, memory))
    quantiles = begun.pop("quantiles"), own.pop("quantiles")
    assert begun.keys() == own.keys()
    for name, array in begun.items():
        if name.endswith(("weight", "bias")):
            np.testing.assert_array_equal(own[name], array)
    assert not np.array_equal(*quantiles)  # of its own text
    for method, match in (("knn", "no gate that another"), ("hybrid", "has no gate for hybrid")):
        where = build_memory(model, make_documents(5, 20)) if method == "hybrid" else tuned_memory
        with pytest.raises(SettingError, match=match):
            tune(model, memory, TEXT, method=method, **{**options, "start": where})


def stored_gate(memory: Memory, method: str) -> Any:
    return Memory.open(memory.path).gate(method)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_skip_at_its_ends(model: PreTrainedModel, tuned_memory: Memory, skip: float) -> None:
    result = evaluate(model, tuned_memory, TEXT, "hybrid", tokenizer=TOKENIZER, skip=skip)
    assert result.foss == skip


def test_the_guard_in_evaluate_equals_a_loop_over_documents(
    model: PreTrainedModel, tuned_memory: Memory
) -> None:
    base, plain, safe = (
        evaluate(model, tuned_memory, TEXT, method, tokenizer=TOKENIZER, **options)
        for method, options in (
            ("base", {}),
            ("knn", {"lam": 0.9, "temperature": 30.0}),
            ("knn", {"lam": 0.9, "temperature": 30.0, "guard": True}),
        )
    )
    best = np.minimum(base.document_nll, plain.document_nll)
    assert (safe.document_nll <= best + np.log(2) + 1e-4).all()
    assert not np.allclose(safe.document_nll, plain.document_nll)


def test_a_method_without_its_gate_says_how_to_train_it(
    model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    memory = build_memory(model, random_documents())
    with pytest.raises(SettingError, match="--method knn --gate mixture"):
        evaluate(model, memory, TEXT, "knn+mixture", tokenizer=TOKENIZER)
    with pytest.raises(SettingError, match="--method hybrid"):
        evaluate(model, memory, TEXT, "hybrid", tokenizer=TOKENIZER)


def test_tuning_text_of_three_tokens_is_refused_and_nothing_changes(
    model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    memory = build_memory(model, random_documents())
    with pytest.raises(SettingError, match="3 tokens, too few"):
        tune(model, memory, ["abc"], method="hybrid", tokenizer=TOKENIZER)
    assert Memory.open(memory.path).manifest == memory.manifest


def test_a_damaged_gate_is_refused_when_it_is_used(
    model: PreTrainedModel, tuned_memory: Memory, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.memory"
    shutil.copytree(tuned_memory.path, copy)
    (file,) = copy.glob("g*.hybrid.gate.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    memory = Memory.open(copy)
    evaluate(model, memory, TEXT, "knn", tokenizer=TOKENIZER)
    with pytest.raises(FolderError, match="damaged"):
        evaluate(model, memory, TEXT, "hybrid", tokenizer=TOKENIZER)


def test_a_gate_of_another_kind_or_shape_is_refused(
    model: PreTrainedModel, tuned_memory: Memory, tmp_path: Path
) -> None:
    def other_kind(manifest: dict[str, Any]) -> None:
        manifest["gates"]["hybrid"]["kind"] = "meta-k"

    def other_method(manifest: dict[str, Any]) -> None:
        manifest["gates"]["hybrid"] = manifest["gates"]["suffix+mixture"]

    for change, message in ((other_kind, "another kind"), (other_method, "trained for suffix")):
        copy = tmp_path / change.__name__
        shutil.copytree(tuned_memory.path, copy)
        edit_manifest(copy, change)
        with pytest.raises(SettingError, match=message):
            evaluate(model, Memory.open(copy), TEXT, "hybrid", tokenizer=TOKENIZER)


def test_hybrid_starts_from_the_gate_that_ships(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    """Of a long text it learns as much without; and other methods have no such gate."""
    memory = build_memory(model, make_documents(10, 40, seed=5))
    short = [document.text for document in make_documents(1, 30, seed=6)]
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "k": 16}
    ships = shipped_gate().mix.state_dict()["0.weight"]
    with gates_trained_at_once(0):
        tune(model, memory, short, method="hybrid", **options)
        assert np.array_equal(stored_gate(memory, "hybrid").arrays()["mix.0.weight"], ships)
        with pytest.raises(SettingError, match="too few to train a gate"):
            tune(model, memory, short, method="knn+mixture", **options)
        with pytest.raises(SettingError, match="too few to train a gate"):
            tune(model, memory, ["ab"], method="hybrid", **options)
        monkeypatch.setattr("nearest.verbs.tune._MUCH", 200)
        tune(model, memory, TEXT, method="hybrid", **options)
        assert not np.array_equal(stored_gate(memory, "hybrid").arrays()["mix.0.weight"], ships)
