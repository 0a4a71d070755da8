"""How figures are drawn, on pages and in files. Needs matplotlib (extra: plots)."""

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GREY, RULE = "#1f2328", "#8b8f96", "#e4e1d8"
AMBER, TEAL, ROSE = "#d18b00", "#1b7f79", "#b8405e"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "nearest",
    "font.size": 9.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


class Drawing(Figure):
    """A figure that shows itself in a notebook, whatever draws there."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()


def figure(width: float, height: float) -> tuple[Drawing, Axes]:
    """One pair of axes on the page's own ground; inches."""
    drawn = Drawing(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0)
    axes = drawn.add_subplot()
    axes.patch.set_alpha(0)
    return drawn, axes


def svg(drawn: Figure, label: str) -> str:
    """An inline SVG element: no XML prologue, no metadata, width left to the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawn.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    tag, _, body = text[text.index("<svg") :].partition(">")
    box = re.findall(r'viewBox="[^"]*"', tag)[0]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return f'<svg role="img" aria-label="{label}" {box}>{body}'


def axis_label(name: str) -> str:
    """A name short enough for an axis, its dollars kept from being read as formulae."""
    return (name if len(name) <= 30 else name[:29] + "…").replace("$", r"\$")
