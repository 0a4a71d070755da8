"""What checks the annotations while tests run checks the first calls of each test, or all."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

import typechecker
from nearest.index.neighbours import Neighbours, sort_nearest_first
from typechecker import check

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
@pytest.mark.parametrize("enough", [5, math.inf])
@pytest.mark.parametrize("made", [lambda: summed, inner], ids=["outer", "inner"])
def test_first_calls_are_checked(
    made: Callable[[], Callable[..., object]],
    enough: float,
    time: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(typechecker, "ENOUGH", enough)
    np.testing.assert_array_equal(made()(ROWS), [3, 3])
    with pytest.raises(TypeCheckError, match="return value"):
        made()(ROWS, wrong=True)
    with pytest.raises(TypeCheckError, match="rows"):
        made()(ROWS[0])
    for _ in range(20):
        made()(ROWS)
    if enough == 5:
        np.testing.assert_array_equal(made()(ROWS, wrong=True), [2, 2, 2])
    else:
        with pytest.raises(TypeCheckError, match="return value"):
            made()(ROWS, wrong=True)


def test_the_package_is_checked() -> None:
    with pytest.raises(TypeCheckError, match="sort_nearest_first"):
        sort_nearest_first(Neighbours.none(1), "all")
