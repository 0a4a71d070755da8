"""The curves of an analysis of overlap. Needs matplotlib (plots)."""

import io
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes

from nearest.pages.figures import GREY, INK, RULE, STYLE, Drawing, figure, svg
from nearest.retro.analysis.analyse import Analysis

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7")  # Okabe & Ito
_MARKERS = "osD^v"


def share_plot(analysis: Analysis) -> str:
    """Bits a byte against the part of a chunk that is shared, as an SVG element."""
    return _alone(_draw_shares, analysis, "Bits a byte against what is shared with neighbours")


def match_plot(analysis: Analysis) -> str:
    """Gain a token against the length of the match that ends there, as an SVG element."""
    return _alone(_draw_matches, analysis, "Gain a token against the length of the match")


def overlap_png(analysis: Analysis, mark: str) -> bytes:
    """Both panels side by side; `mark` says in the file what wrote it."""
    with matplotlib.rc_context(STYLE):
        drawn, buffer = overlap_figure(analysis), io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=160, metadata={"Software": mark})
        return buffer.getvalue()


def overlap_figure(analysis: Analysis) -> Drawing:
    """Both panels side by side."""
    with matplotlib.rc_context(STYLE):
        drawn = Drawing(figsize=(10.8, 4.6), layout="constrained")
        left, right = drawn.subplots(1, 2)
        _draw_shares(left, analysis)
        _draw_matches(right, analysis)
        return drawn


def _alone(draw: Callable[[Axes, Analysis], None], analysis: Analysis, label: str) -> str:
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.2, 4.4)
        draw(axes, analysis)
        return svg(drawn, label)


def _draw_shares(axes: Axes, analysis: Analysis) -> None:
    points = analysis.by_share()
    places = [100 * (point.high or 0) for point in points]
    for i, name in enumerate(analysis.readings):
        axes.plot(
            places,
            [point.losses[name] for point in points],
            label=name,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            linewidth=1.8,
        )
    axes.set_xlabel("at most so much of a chunk stands in a neighbour, %")
    axes.set_ylabel("bits a byte (lower is better)")
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(analysis.readings))


def _draw_matches(axes: Axes, analysis: Analysis) -> None:
    points = analysis.by_match()
    for i, point in enumerate(points):
        axes.plot(i, point.gain, color=_COLOURS[0], marker="o")
        low, high = point.interval
        if low is not None and high is not None:
            axes.plot([i, i], [low, high], color=_COLOURS[0], linewidth=1.4)
    axes.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    names = [
        f"{point.low:g}+"
        if point.high is None
        else f"{point.low:g}"
        if point.low == point.high
        else f"{point.low:g}–{point.high:g}"
        for point in points
    ]
    axes.set_xticks(range(len(points)), names)
    for i, point in enumerate(points):
        axes.annotate(
            f"{100 * point.tokens / len(analysis.matches):.0f} %",
            (i, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            color=GREY,
            fontsize=8.5,
        )
    axes.set_xlabel("tokens in a row that stand in a neighbour (above: share of tokens)")
    axes.set_ylabel("gain, nats a token (higher is better)")
    axes.grid(color=RULE, linewidth=0.8, axis="y")
    axes.set_axisbelow(True)
