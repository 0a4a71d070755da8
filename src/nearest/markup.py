"""What notebooks show: small tables and shaded text as HTML that fits light and dark pages."""

from collections.abc import Iterable, Sequence
from html import escape

_SHADE = "255, 170, 0"  # of text that came from the memory alone


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text; the first column names the rows."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shaded(text: str, weight: float, tip: str) -> str:
    """Text with a ground as strong as a weight (0 to 1) says, and a tip for the pointer."""
    style = f"background: rgba({_SHADE}, {min(max(weight, 0.0), 1.0):.2f}); white-space: pre-wrap"
    return f'<span style="{style}" title="{escape(tip)}">{escape(text)}</span>'


def number(value: float | None, spec: str) -> str:
    """With a true minus; a dash where there is no value."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def interval(low: float | None, high: float | None, spec: str) -> str:
    """Both ends; nothing where there are none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, spec)}, {number(high, spec)}]"
