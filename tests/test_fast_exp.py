"""exp by plain arithmetic."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nearest.fast_exp import fast_exp


@given(st.floats(-86.5, 0, width=32))
def test_exp_to_two_ten_millionths(x: float) -> None:
    exact = np.exp(np.float64(np.float32(x)))
    assert abs(float(fast_exp(np.float32(x))) - exact) <= 3e-7 * exact


def test_its_ends() -> None:
    assert fast_exp(np.float32(0)) == 1
    assert fast_exp(np.float32(-np.inf)) == 0
    assert fast_exp(np.float32(-100)) == 0
