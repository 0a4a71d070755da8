"""How a document longer than the model's context is cut: every token predicted exactly once."""

from dataclasses import dataclass

from nearest.errors import SettingError

_DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Window:
    """Inputs [start, stop) of a document; positions from `first` on predict their successor."""

    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        """Number of input tokens."""
        return self.stop - self.start


def windows(length: int, window: int, stride: int) -> list[Window]:
    """Windows over a document of `length` tokens whose first is context only.

    Position i predicts token i+1, so the last position is no input. Windows start every `stride`
    tokens; each predicts what the ones before it did not, with at least window-stride tokens of
    context where they exist.

    >>> windows(11, window=8, stride=4)
    [Window(start=0, stop=8, first=0), Window(start=4, stop=10, first=8)]
    """
    check_windows(window, stride)
    inputs = length - 1
    planned = []
    start = first = 0
    while first < inputs:
        stop = min(start + window, inputs)
        planned.append(Window(start, stop, first))
        start, first = start + stride, stop
    return planned


def choose_windows(
    window: int | None, stride: int | None, positions: int | None
) -> tuple[int, int]:
    """Fill in what was not given: at most 512 of the model's positions, and half as stride.

    Raises:
        SettingError: the result would lose tokens or exceed the model's positions.
    """
    if window is None:
        window = min(_DEFAULT_WINDOW, positions or _DEFAULT_WINDOW)
    if stride is None:
        stride = max(1, window // 2)
    check_windows(window, stride, positions)
    return window, stride


def check_windows(window: int, stride: int, positions: int | None = None) -> None:
    """Refuse windows that lose tokens or exceed the model's positions (SettingError)."""
    if not 1 <= stride < window:
        raise SettingError(
            f"stride {stride} must be at least 1 and below the window, {window}: "
            "try a stride of half the window"
        )
    if positions is not None and window > positions:
        raise SettingError(
            f"a window of {window} is longer than the model's {positions} positions: "
            f"pass --window {positions} or less"
        )
