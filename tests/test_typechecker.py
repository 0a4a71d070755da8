"""What checks the annotations while tests run checks the first calls of each test, no others."""

from collections.abc import Callable

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from typechecker import ENOUGH, check

ROWS = np.ones((2, 3))


@jaxtyped(typechecker=check)
def summed(rows: Float[np.ndarray, "n m"], wrong: bool = False) -> Float[np.ndarray, " n"]:
    return rows.sum(axis=0 if wrong else 1)


def inner() -> Callable[..., object]:
    @jaxtyped(typechecker=check)
    def summed(rows: Float[np.ndarray, "n m"], wrong: bool = False) -> Float[np.ndarray, " n"]:
        return rows.sum(axis=0 if wrong else 1)

    return summed


@pytest.mark.parametrize("time", ["first", "again"])
@pytest.mark.parametrize("made", [lambda: summed, inner], ids=["outer", "inner"])
def test_first_calls_are_checked(made: Callable[[], Callable[..., object]], time: str) -> None:
    np.testing.assert_array_equal(made()(ROWS), [3, 3])
    with pytest.raises(TypeCheckError, match="return value"):
        made()(ROWS, wrong=True)
    with pytest.raises(TypeCheckError, match="rows"):
        made()(ROWS[0])
    for _ in range(ENOUGH - 3):
        made()(ROWS)
    np.testing.assert_array_equal(made()(ROWS, wrong=True), [2, 2, 2])


def test_the_package_is_checked() -> None:
    from nearest.index.neighbours import Neighbours, sort_nearest_first

    with pytest.raises(TypeCheckError, match="k"):
        sort_nearest_first(Neighbours.none(1), "all")
