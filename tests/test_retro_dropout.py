"""Dropout of our own on CPUs: what F.dropout promises."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from nearest.retro.dropout import Dropout, drop


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_share_becomes_zero_and_the_rest_is_scaled(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 1001, dtype=dtype, requires_grad=True)
    found = drop(x, share)
    scale = 1 / (1 - round(share * 2**16) / 2**16)
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], scale))
    flat, deviation = kept.flatten().float(), (share * (1 - share)) ** 0.5
    for lane in range(4):  # a random word decides about four numbers
        some = flat[lane::4]
        assert abs(float(some.mean()) - (1 - share)) < 5 * deviation / len(some) ** 0.5
    neighbours = (flat[1:] - flat.mean()) * (flat[:-1] - flat.mean())
    assert abs(float(neighbours.mean())) < 5 * deviation**2 / len(neighbours) ** 0.5
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(kept, scale, 0).to(dtype))


@pytest.mark.parametrize("share", [0.0, 1e-9, 1 - 1e-9, 1.0])
def test_the_ends_are_those_of_torch(share: float) -> None:
    x = torch.randn(3, 5)
    torch.manual_seed(0)
    found = drop(x, share)
    torch.manual_seed(0)
    torch.testing.assert_close(found, F.dropout(x, share))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 7)])
def test_any_shape_and_the_same_seed_the_same_numbers(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(drop(x, 0.5))
    assert found[0].shape == x.shape
    torch.testing.assert_close(*found)


def test_only_while_training_and_only_shares() -> None:
    layer, x = Dropout(0.5), torch.ones(100)
    assert (layer(x) == 0).any()
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="dropout probability"):
        drop(x, 1.5)
