"""How long-running work reports: a plain function, so that libraries stay silent."""

from collections.abc import Callable

# (stage, done, total): total is None where it is not known beforehand.
Progress = Callable[[str, int, int | None], None]


def no_progress(_stage: str, _done: int, _total: int | None) -> None:
    """Report to nobody."""
