"""The mathematics of kNN-LM against closed forms and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nearest.retrieval.distribution import (
    interpolate,
    knn_weights,
    nll_over_lams,
    target_probs,
    target_probs_on_grid,
    vocabulary_probs,
)

INF = float("inf")


def test_weights_closed_form() -> None:
    distances = torch.tensor([[0.0, 2.0 * np.log(3.0), INF]], dtype=torch.float32)
    torch.testing.assert_close(knn_weights(distances, 2.0), torch.tensor([[0.75, 0.25, 0.0]]))


def test_without_neighbours_nothing_has_weight() -> None:
    assert knn_weights(torch.full((1, 3), INF), 1.0).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e4])
def test_weights_do_not_overflow(offset: float) -> None:
    """Large distances, and inner products (negative distances), keep their differences."""
    weights = knn_weights(torch.tensor([[offset, offset + 1]], dtype=torch.float32), 1.0)
    torch.testing.assert_close(weights[0, 0] / weights[0, 1], torch.tensor(np.e).float())


def test_votes_add_up_by_value_and_ignore_missing_ones() -> None:
    weights = torch.tensor([[0.5, 0.2, 0.3, 0.0]])
    values = torch.tensor([[3, 1, 3, -1]])
    expected = torch.tensor([[0.0, 0.2, 0.0, 0.8]])
    torch.testing.assert_close(vocabulary_probs(weights, values, 4), expected)
    for token in range(4):
        found = target_probs(weights, values, torch.tensor([token]))
        torch.testing.assert_close(found, expected[:, token])


@given(st.floats(0, 1, width=32), st.integers(0, 2**31))
def test_the_mixture_is_the_weighted_sum_and_sums_to_one(lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lm = torch.randn(3, 7, generator=generator).log_softmax(-1)
    memory = torch.rand(3, 7, generator=generator)
    memory[:, 2] = 0
    memory /= memory.sum(-1, keepdim=True)
    mixed = interpolate(lm, memory, torch.full((3, 1), lam)).exp()
    torch.testing.assert_close(mixed, lam * memory + (1 - lam) * lm.exp(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(3))


def test_a_token_neither_knows_has_probability_zero_not_nan() -> None:
    mixed = interpolate(torch.tensor([-INF]), torch.tensor([0.0]), torch.tensor([0.5]))
    assert mixed.tolist() == [-INF]


def random_neighbours(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(6, 9, generator=generator).sort(-1).values * 20 + 400
    distances[4, 5:] = INF
    distances[5] = INF
    values = torch.randint(0, 4, (6, 9), generator=generator)
    values[distances == INF] = -1
    return distances, values, torch.randint(0, 4, (6,), generator=generator)


@given(st.integers(0, 2**31))
def test_the_grid_equals_one_computation_each(seed: int) -> None:
    distances, values, targets = random_neighbours(seed)
    temperatures, ks = (0.01, 0.5, 3.0, 100.0), (1, 4, 5, 9)
    matches = values == targets[:, None]
    grid = target_probs_on_grid(distances, matches, temperatures, ks)
    for i, temperature in enumerate(temperatures):
        for j, k in enumerate(ks):
            weights = knn_weights(distances[:, :k], temperature)
            expected = target_probs(weights, values[:, :k], targets)
            torch.testing.assert_close(grid[:, i, j], expected, atol=1e-6, rtol=1e-4)


def test_nll_over_lams() -> None:
    lm, memory = torch.tensor([0.5, 0.1]).double(), torch.tensor([0.0, 0.9]).double()
    found = nll_over_lams(lm, memory, torch.tensor([0.0, 0.5]).double())
    expected = [-np.log([0.5, 0.1]).mean(), -np.log([0.25, 0.5]).mean()]
    np.testing.assert_allclose(found, expected)
