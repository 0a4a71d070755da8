"""The loss over a large vocabulary against torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from nearest.retro import loss as loss_module
from nearest.retro.loss import next_token_loss


@given(
    rows=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    items=st.sampled_from([None, 7, torch.tensor(5)]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_torchs(
    rows: int, dtype: torch.dtype, items: int | torch.Tensor | None, seed: int
) -> None:
    """With some labels left out; the sum is divided by their number or by what is given."""
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn((2, rows, 50), generator=random) * 20).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (2, rows), generator=random)
    labels[torch.rand((2, rows), generator=random) < 0.3] = -100
    labels[0, 0] = 49
    loss = next_token_loss(logits, labels, items)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    same = logits.detach().double().requires_grad_()
    total = F.cross_entropy(same.flatten(0, 1), labels.flatten(), reduction="sum")
    expected = total / ((labels != -100).sum() if items is None else items)
    (expected_gradient,) = torch.autograd.grad(3 * expected, same)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=tolerance, rtol=tolerance)


def test_nothing_to_predict_is_no_number() -> None:
    """As with torch's own mean."""
    assert next_token_loss(torch.zeros(1, 3, 5), torch.full((1, 3), -100)).isnan()


def test_an_impossible_token_costs_infinity() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 1, 3] = -torch.inf
    labels = torch.tensor([[0, 3]])
    assert next_token_loss(logits, labels) == torch.inf
    assert next_token_loss(logits, torch.tensor([[0, -100]])) == pytest.approx(1.3862944)


def test_a_gpu_gets_a_few_large_blocks_and_every_block_size_gives_the_same(monkeypatch) -> None:
    batch = torch.empty(8 * 1024, 32_128, device="meta", dtype=torch.bfloat16)
    assert len(batch) / loss_module._block_rows(batch) < 5
    random = torch.Generator().manual_seed(0)
    logits = torch.randn((2, 20, 30), generator=random).requires_grad_()
    labels = torch.randint(0, 30, (2, 20), generator=random)
    gradients = []
    for rows in (1, 7, 40, 1000):
        monkeypatch.setattr(loss_module, "_CPU_ROWS", rows)
        gradients += torch.autograd.grad(next_token_loss(logits, labels), logits)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])
