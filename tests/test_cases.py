"""`--few-cases` leaves out what it says, and no test as a whole."""

from pathlib import Path
from types import SimpleNamespace

from conftest import cases_left_out


def cases(name: str, count: int) -> list[SimpleNamespace]:
    path = Path("tests/test_x.py")
    return [
        SimpleNamespace(path=path, originalname=name, name=f"{name}[{i}]") for i in range(count)
    ]


def test_four_of_many_cases_are_left_and_all_of_few() -> None:
    many, few, one = cases("many", 10), cases("few", 4), cases("one", 1)
    left_out = cases_left_out([*many, *few, *one], 4)
    assert left_out == [many[i] for i in (1, 2, 4, 5, 7, 8)]
    assert cases_left_out([*many, *few, *one], 1) == [*many[1:], *few[1:]]
