"""A page from its template and the style that pages share; numbers as they are written there."""

from pathlib import Path
from string import Template

_STYLE = Path(__file__).with_name("style.css")


def filled(template: Path, **fields: str) -> str:
    """A page of one file: the template with its fields, and $style, filled in.

    Fields are HTML: what comes from outside must have been escaped.
    """
    return Template(template.read_text("utf-8")).substitute(
        style=_STYLE.read_text("utf-8"), **fields
    )


def number(value: float | None, spec: str) -> str:
    """With a true minus; nothing where there is no value."""
    return "" if value is None else format(value, spec).replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Both ends; nothing where there are none."""
    return "" if low is None or high is None else f"{low:.4f} … {high:.4f}".replace("-", "−")


def percent(share: float, spec: str = ".0f") -> str:
    """A share of 1."""
    return f"{number(100 * share, spec)}\xa0%"
