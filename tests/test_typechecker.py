"""Wrong shapes are refused where annotations are checked (CHECK_ALL=1)."""

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from typechecker import check


def test_annotations_are_checked_where_asked_for() -> None:
    @jaxtyped(typechecker=check)
    def summed(rows: Float[np.ndarray, "n m"], wrong: bool = False) -> Float[np.ndarray, " n"]:
        return rows.sum(axis=0 if wrong else 1)

    rows = np.ones((2, 3))
    np.testing.assert_array_equal(summed(rows), [3, 3])
    with pytest.raises(TypeCheckError, match="return value"):
        summed(rows, wrong=True)
    with pytest.raises(TypeCheckError, match="rows"):
        summed(rows[0])
