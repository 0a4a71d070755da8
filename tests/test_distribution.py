"""The mathematics of weighing and mixing against closed forms and plain loops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearest.errors import ModelError
from nearest.index.suffix import MAX_MATCH
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import (
    Component,
    Weights,
    candidate_weights,
    component_probs,
    mixed_log_probs,
    vocabulary_log_probs,
    vocabulary_log_probs_in_torch,
)
from plain_kernels import plain_component_weights

INF = float("inf")


def candidates(
    distances: np.ndarray,
    values: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    columns: tuple[int, int, int] | None = None,
) -> Candidates:
    found = np.asarray(distances, dtype=np.float32)
    shape = found.shape
    ids = np.where(np.isinf(found), -1, np.arange(shape[1]))
    values = np.zeros(shape, np.int64) if values is None else np.asarray(values)
    lengths = np.zeros(shape, np.int16) if lengths is None else np.asarray(lengths, np.int16)
    columns = columns or (shape[1], 0, 0)
    return Candidates(ids, values, found, lengths, columns, np.ones(shape[0], dtype=bool))


def weights_of(found: Candidates, temperature: float, power: float = 0.0) -> np.ndarray:
    component = Component(("dense",), temperature, power)
    return candidate_weights(found, [component], np.ones((len(found.ids), 1))).candidates


def test_weights_closed_form() -> None:
    found = candidates(np.array([[0.0, 2.0 * np.log(3.0), INF]]))
    np.testing.assert_allclose(weights_of(found, 2.0), [[0.75, 0.25, 0.0]], rtol=1e-6)


def test_match_lengths_weigh_as_their_power() -> None:
    found = candidates(np.array([[5.0, 5.0, INF]]), lengths=np.array([[1, 3, 0]]))
    np.testing.assert_allclose(weights_of(found, 2.0, 2.0), [[4 / 20, 16 / 20, 0]], rtol=1e-6)


def test_an_entry_that_stands_for_three_weighs_as_three() -> None:
    found = candidates(np.array([[5.0, 5.0, INF]]))
    merged = found._replace(log_counts=np.log([[3.0, 1.0, 1.0]]).astype(np.float32))
    np.testing.assert_allclose(weights_of(merged, 2.0), [[0.75, 0.25, 0.0]], rtol=1e-6)
    probs = component_probs(merged, [Component(("dense",), 2.0)], np.zeros(1, np.int64))
    np.testing.assert_allclose(probs, [[1.0]])


def test_without_neighbours_nothing_has_weight() -> None:
    component = Component(("dense",), 1.0)
    weights, lm = candidate_weights(candidates(np.full((1, 3), INF)), [component], np.ones((1, 1)))
    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    assert lm.tolist() == [1.0]


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e4])
def test_weights_do_not_overflow(offset: float) -> None:
    """Large distances, and inner products (negative distances), keep their differences."""
    weights = weights_of(candidates(np.array([[offset, offset + 1]])), 1.0)
    np.testing.assert_allclose(weights[0, 0] / weights[0, 1], np.e, rtol=1e-5)


def random_candidates(seed: int) -> Candidates:
    rng = np.random.default_rng(seed)
    distances = rng.random((6, 12)) * 20 + 400
    distances[3, 4:9] = INF
    distances[4, :9] = INF
    distances[5] = INF
    values = rng.integers(0, 4, (6, 12))
    values[np.isinf(distances)] = -1
    lengths = np.where(np.isinf(distances), 0, rng.integers(0, MAX_MATCH + 1, (6, 12)))
    return candidates(distances, values, lengths, (4, 3, 5))


COMPONENTS = [
    Component(("dense",), 0.5),
    Component(("dense", "pointers"), 3.0, 1.5),
    Component(("suffix",), 100.0, 4.0),
    Component(("dense", "suffix"), 8.0, 2.0),
]


@given(st.integers(0, 2**31))
def test_kernels_equal_the_reference(seed: int) -> None:
    found = random_candidates(seed)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(len(COMPONENTS) + 1), size=6)[:, :-1]
    tokens = rng.integers(0, 4, 6)
    expected, left = np.zeros(found.ids.shape), np.ones(6)
    probs = np.zeros((6, len(COMPONENTS)))
    for n, component in enumerate(COMPONENTS):
        columns = found.of(*component.kinds)
        own = plain_component_weights(
            found.distances[:, columns].astype(float),
            found.lengths[:, columns],
            component.temperature,
            component.length_power,
        )
        expected[:, columns] += own * shares[:, n, None]
        left -= np.where(own.sum(1) > 0, shares[:, n], 0)
        probs[:, n] = (own * (found.values[:, columns] == tokens[:, None])).sum(1)
    weights, lm = candidate_weights(found, COMPONENTS, shares)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(lm, left, atol=1e-12)
    np.testing.assert_allclose(weights.sum(1) + lm, 1, atol=1e-5)
    np.testing.assert_allclose(component_probs(found, COMPONENTS, tokens), probs, atol=1e-5)


def test_sources_stand_side_by_side() -> None:
    found = random_candidates(0)
    assert found.of("dense") == slice(0, 4)
    assert found.of("pointers") == slice(4, 7)
    assert found.of("dense", "pointers") == slice(0, 7)
    assert found.of("pointers", "suffix") == slice(4, 12)


def test_candidates_of_several_calls_weigh_as_before() -> None:
    """However many columns of each kind each call found."""
    whole = random_candidates(3)
    tokens, shares = np.arange(len(whole.ids)) % 3, np.full((len(whole.ids), len(COMPONENTS)), 0.2)
    narrow = whole._replace(  # one dense column less, and no suffix match
        ids=whole.ids[:, 1:7],
        values=whole.values[:, 1:7],
        distances=whole.distances[:, 1:7],
        lengths=whole.lengths[:, 1:7],
        columns=(3, 3, 0),
    )
    parts = [whole, narrow, whole.rows(slice(2))]
    joined = Candidates.joined(parts)
    assert joined.columns == whole.columns
    rows = [tokens, tokens, tokens[:2]]
    each = [component_probs(one, COMPONENTS, t) for one, t in zip(parts, rows, strict=True)]
    found = component_probs(joined, COMPONENTS, np.concatenate(rows))
    np.testing.assert_array_equal(found, np.concatenate(each))
    weighed = [
        candidate_weights(one, COMPONENTS, shares[: len(one.ids)]).candidates.sum(1)
        for one in parts
    ]
    of_joined = candidate_weights(
        joined, COMPONENTS, np.full((len(joined.ids), len(COMPONENTS)), 0.2)
    )
    np.testing.assert_allclose(of_joined.candidates.sum(1), np.concatenate(weighed), atol=1e-6)
    assert Candidates.joined([whole]) is whole


@pytest.mark.parametrize("mix", [vocabulary_log_probs, vocabulary_log_probs_in_torch])
def test_votes_add_up_by_value_and_ignore_missing_ones(mix: Callable[..., torch.Tensor]) -> None:
    weights = np.array([[0.25, 0.1, 0.15, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    values = np.array([[3, 1, 3, -1], [-1, -1, -1, -1]])
    lm = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    expected = torch.tensor([[0.05, 0.2, 0.15, 0.6], [0.4, 0.3, 0.2, 0.1]])
    mixed = mix(lm.log(), Weights(weights, np.array([0.5, 1.0])), values)
    torch.testing.assert_close(mixed.exp(), expected)
    alone = mix(lm.log(), Weights(weights * 2, np.zeros(2)), values)
    torch.testing.assert_close(alone.exp()[0], torch.tensor([0.0, 0.2, 0.0, 0.8]))
    none = mix(lm.log(), Weights(weights[:, :0], np.ones(2)), values[:, :0])
    torch.testing.assert_close(none.exp(), lm)


@pytest.mark.parametrize("mix", [vocabulary_log_probs, vocabulary_log_probs_in_torch])
def test_nan_is_not_hidden(mix: Callable[..., torch.Tensor]) -> None:
    lm, values = torch.tensor([[0.5, 0.5]]).log(), np.array([[0, -1]])
    broken = Weights(np.array([[np.nan, 0]], np.float32), np.array([0.5]))
    assert mix(lm, broken, values).isnan().tolist() == [[True, False]]
    whole = Weights(np.array([[0.5, 0]], np.float32), np.array([0.5]))
    assert mix(lm * torch.tensor([torch.nan, 1]), whole, values).isnan().tolist() == [[True, False]]


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    found = Weights(np.array([[0.5]], np.float32), np.array([0.5]))
    with pytest.raises(ModelError, match="token 3 and the model predicts 3"):
        vocabulary_log_probs(torch.zeros(1, 3), found, np.array([[3]]))


@given(st.integers(0, 2**31), st.integers(0, 70), st.integers(0, 9))
def test_the_kernel_mixes_as_torch_does(seed: int, rows: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    lm = torch.from_numpy(rng.normal(0, 9, (rows, 5)).astype(np.float32)).log_softmax(-1)
    lm[rng.random((rows, 5)) < 0.1] = -INF
    weights = rng.random((rows, width)).astype(np.float32) ** 9 / max(width, 1)
    values = rng.integers(-1, 5, (rows, width))
    weights[values < 0] = 0
    found = Weights(weights, np.maximum(0, 1 - weights.sum(axis=1, dtype=float) - 1e-7))
    mixed = vocabulary_log_probs(lm, found, values)
    expected = vocabulary_log_probs_in_torch(lm, found, values)
    torch.testing.assert_close(mixed, expected, atol=2e-6, rtol=1e-5)


def test_gradients_flow_through_the_mixture() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    found = Weights(np.array([[0.5]], np.float32), np.array([0.5]))
    vocabulary_log_probs(logits.log_softmax(-1), found, np.array([[2]]))[0, 2].backward()
    # log(0.5 + 0.5 p): its derivative by the logits is 0.5 p (1 - p) / (0.5 + 0.5 p) at the token.
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 12, -1 / 12, 1 / 6]]))


@given(st.floats(0, 1, width=32), st.integers(0, 2**31))
def test_the_mixture_is_the_weighted_sum_and_sums_to_one(lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lm = torch.randn(3, 7, generator=generator).log_softmax(-1)
    memory = torch.rand(3, 7, generator=generator)
    memory[:, 2] = 0
    memory /= memory.sum(-1, keepdim=True)
    mixed = mixed_log_probs(lm, lam * memory, torch.full((3, 1), 1 - lam)).exp()
    torch.testing.assert_close(mixed, lam * memory + (1 - lam) * lm.exp(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(3))


def test_a_token_neither_knows_has_probability_zero_not_nan() -> None:
    mixed = mixed_log_probs(torch.tensor([-INF]), torch.tensor([0.0]), torch.tensor([0.5]))
    assert mixed.tolist() == [-INF]


def test_shares_that_exceed_one_by_rounding_leave_nothing_not_nan() -> None:
    mixed = mixed_log_probs(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1e-7]))
    assert mixed.tolist() == [0.0]
