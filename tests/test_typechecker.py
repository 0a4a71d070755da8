"""What checks the annotations while tests run checks those of inner functions each time."""

from collections.abc import Callable

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from typechecker import check


def sums() -> Callable[..., object]:
    @jaxtyped(typechecker=check)
    def summed(rows: Float[np.ndarray, "n m"], wrong: bool = False) -> Float[np.ndarray, " n"]:
        return rows.sum(axis=0 if wrong else 1)

    return summed


@pytest.mark.parametrize("time", ["first", "again"])
def test_inner_functions_are_checked(time: str) -> None:
    rows = np.ones((2, 3))
    np.testing.assert_array_equal(sums()(rows), [3, 3])
    with pytest.raises(TypeCheckError, match="return value"):
        sums()(rows, wrong=True)
    with pytest.raises(TypeCheckError, match="rows"):
        sums()(rows[0])
