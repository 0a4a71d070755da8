"""Windows over a document: every token predicted exactly once, with enough context."""

import doctest

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import nearest.corpus.windows
import nearest.store.parts.corpus
from nearest.corpus.windows import Window, check_windows, choose_windows, windows
from nearest.errors import SettingError

sizes = st.tuples(
    st.integers(0, 400), st.integers(2, 60), st.integers(1, 59)
)  # length, window, stride


@settings(max_examples=250, deadline=None)
@given(sizes)
@example((1, 2, 1))
@example((0, 2, 1))
@example((400, 2, 1))
@example((121, 60, 59))
def test_every_position_is_predicted_once_within_the_limits(size: tuple[int, int, int]) -> None:
    length, window, stride = size
    assume(stride < window)
    planned = windows(length, window, stride)
    predicted = [i for part in planned for i in range(part.first, part.stop)]
    assert predicted == list(range(length - 1))  # in order, none twice, none lost
    for part in planned:
        assert 0 <= part.start <= part.first < part.stop <= length - 1
        assert part.length == part.stop - part.start <= window


@settings(max_examples=250, deadline=None)
@given(sizes)
def test_context_is_what_the_windows_before_did_not_reach(size: tuple[int, int, int]) -> None:
    length, window, stride = size
    assume(stride < window)
    for number, part in enumerate(windows(length, window, stride)):
        assert part.start == number * stride
        for i in range(part.first, part.stop):
            # The first of the windows [n*stride, n*stride + window) that holds position i.
            first = next(n for n in range(length) if i < n * stride + window)
            assert first == number
            context = i - part.start + 1  # tokens that the prediction of i + 1 can see
            assert context >= min(i + 1, window - stride)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (0, 8, 4, []),
        (1, 8, 4, []),
        (2, 8, 4, [(0, 1, 0)]),
        (9, 8, 4, [(0, 8, 0)]),
        (10, 8, 4, [(0, 8, 0), (4, 9, 8)]),
        (13, 8, 4, [(0, 8, 0), (4, 12, 8)]),
        (14, 8, 4, [(0, 8, 0), (4, 12, 8), (8, 13, 12)]),
        (6, 2, 1, [(0, 2, 0), (1, 3, 2), (2, 4, 3), (3, 5, 4)]),
        (20, 8, 7, [(0, 8, 0), (7, 15, 8), (14, 19, 15)]),
        (6, 8, 1, [(0, 5, 0)]),
    ],
)
def test_examples(
    length: int, window: int, stride: int, expected: list[tuple[int, int, int]]
) -> None:
    assert windows(length, window, stride) == [Window(*part) for part in expected]


@pytest.mark.parametrize(
    ("window", "stride"), [(8, 8), (8, 9), (8, 0), (8, -1), (1, 1), (0, 0), (0, 1), (-4, -5)]
)
def test_windows_that_would_lose_tokens_are_refused(window: int, stride: int) -> None:
    for call in (lambda: windows(100, window, stride), lambda: check_windows(window, stride)):
        with pytest.raises(SettingError, match=f"stride {stride} must be at least 1 and below"):
            call()


@pytest.mark.parametrize(
    ("window", "stride", "positions", "expected"),
    [
        (None, None, None, (512, 256)),
        (None, None, 2048, (512, 256)),
        (None, None, 512, (512, 256)),
        (None, None, 64, (64, 32)),
        (None, None, 2, (2, 1)),
        (None, 100, 2048, (512, 100)),
        (None, 10, 64, (64, 10)),
        (1024, None, 2048, (1024, 512)),
        (2048, None, 2048, (2048, 1024)),
        (2048, None, None, (2048, 1024)),
        (3, None, 64, (3, 1)),
        (2, None, 64, (2, 1)),
        (64, 63, 64, (64, 63)),
    ],
)
def test_what_is_not_given_is_chosen(
    window: int | None, stride: int | None, positions: int | None, expected: tuple[int, int]
) -> None:
    assert choose_windows(window, stride, positions) == expected


@pytest.mark.parametrize(
    ("window", "stride", "positions", "message"),
    [
        (65, None, 64, "a window of 65 is longer than the model's 64 positions: pass --window 64"),
        (4096, 1, 512, "longer than the model's 512 positions: pass --window 512 or less"),
        (None, 64, 64, "stride 64 must be at least 1 and below the window, 64"),
        (None, 0, 64, "stride 0 must be at least 1"),
        (1, None, 64, "below the window, 1"),
        (0, None, 64, "below the window, 0"),
        (-8, None, 64, "below the window, -8"),
        (None, None, 1, "below the window, 1"),
    ],
)
def test_choices_that_cannot_work_are_refused(
    window: int | None, stride: int | None, positions: int | None, message: str
) -> None:
    with pytest.raises(SettingError) as caught:
        choose_windows(window, stride, positions)
    assert message in str(caught.value)


@pytest.mark.parametrize("module", [nearest.corpus.windows, nearest.store.parts.corpus])
def test_the_examples_in_the_documentation_hold(module: object) -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 1
    assert results.failed == 0
