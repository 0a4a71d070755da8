"""A sweep's curves: perplexity over saved searches, and over time. Needs matplotlib (plots)."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from nearest.pages.figures import GREY, INK, RULE, STYLE, Drawing, figure, svg
from nearest.pages.published import Published
from nearest.retrieval.settings import IN_CONTEXT
from nearest.verbs.sweep import RANDOM_SKIP, Point

# Colours that are told apart with any colour vision (Okabe & Ito), one for each method's sources;
# its gate decides the marker, and passages before the text break the line.
_COLOURS = {
    "knn": "#0072B2",
    "retomaton": "#E69F00",
    "suffix": "#009E73",
    "hybrid": "#D55E00",
    IN_CONTEXT: "#CC79A7",
}
_MARKERS = {"": "o", "buckets": "^", "meta-k": "v", "adaptret": "s", "mixture": "D"}
_NO_SKIP = ("knn", None)  # what random skipping starts from


class Curve(NamedTuple):
    """Points of a method, in the order of what is varied."""

    name: str
    points: list[Point]
    style: dict[str, Any]


def curves(points: Sequence[Point]) -> list[Curve]:
    """The points of each method as a curve, without the base model's."""
    found: dict[tuple[str, str | None], list[Point]] = {}
    for point in points[1:]:
        found.setdefault((point.result.method, point.setting), []).append(point)
    return [_curve(method, setting, found) for method, setting in found]


def _curve(
    method: str, setting: str | None, found: dict[tuple[str, str | None], list[Point]]
) -> Curve:
    own = found[method, setting]
    sources, _, gate = method.removeprefix(f"{IN_CONTEXT}+").partition("+")
    colour = _COLOURS[sources]
    if setting == RANDOM_SKIP:
        style = {"color": colour, "linewidth": 1.1, "linestyle": (0, (2, 2)), "zorder": 2}
        return Curve(f"{method}, skipping at random", [*found[_NO_SKIP], *own], style)
    marker = _MARKERS["mixture" if sources == "hybrid" else gate]
    style = {
        "color": colour,
        "linewidth": 1.8,
        "linestyle": (0, (5, 2)) if method.startswith(IN_CONTEXT) else "solid",
        "marker": marker,
        "markersize": 6,
        "markerfacecolor": "white" if gate else colour,
        "zorder": 3,
    }
    return Curve(method, own, style)


def foss_plot(points: Sequence[Point]) -> str:
    """Perplexity over the fraction of saved searches, as an SVG element."""
    return _alone(partial(_draw_foss, points=points), "Perplexity against saved searches")


def time_plot(points: Sequence[Point]) -> str:
    """Perplexity over added time, as an SVG element."""
    return _alone(partial(_draw_time, points=points), "Perplexity against added time")


def published_plot(points: Sequence[Point], published: Sequence[Published]) -> str:
    """Perplexity relative to kNN-LM's, with published curves, as an SVG element."""
    draw = partial(_draw_published, points=points, published=published)
    return _alone(draw, "Relative perplexity against saved searches, with published curves")


def sweep_png(points: Sequence[Point], published: Sequence[Published], mark: str) -> bytes:
    """All panels side by side; `mark` says in the file what wrote it."""
    with matplotlib.rc_context(STYLE):
        drawn, buffer = sweep_figure(points, published), io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=160, metadata={"Software": mark})
        return buffer.getvalue()


def sweep_figure(points: Sequence[Point], published: Sequence[Published]) -> Drawing:
    """All panels side by side."""
    draws: list[Callable[[Axes], None]] = [
        partial(_draw_foss, points=points),
        partial(_draw_time, points=points),
    ]
    if published:
        draws.append(partial(_draw_published, points=points, published=published))
    with matplotlib.rc_context(STYLE):
        drawn = Drawing(figsize=(5.4 * len(draws), 4.6), layout="constrained")
        panels = drawn.subplots(1, len(draws))
        for axes, draw in zip(panels, draws, strict=True):
            draw(axes)
        _legend_above(panels[0])
        for axes in panels[2:]:
            _legend_above(axes)
        return drawn


def _alone(draw: Callable[[Axes], None], label: str) -> str:
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.2, 4.4)
        draw(axes)
        _legend_above(axes)
        return svg(drawn, label)


def _draw_foss(axes: Axes, points: Sequence[Point]) -> None:
    for curve in curves(points):
        if curve.points[0].result.foss is None:  # passages alone: there are no searches to save
            continue
        axes.plot(_saved(curve), _perplexities(curve), label=curve.name, **curve.style)
        for point in curve.points if curve.points[0].setting == "min_knns" else ():
            _name_value(axes, point)
    _mark_base(axes, points)
    _foss_axis(axes)


def _draw_time(axes: Axes, points: Sequence[Point]) -> None:
    axes.set_xscale("log")
    for curve in curves(points):
        timed = [point.result for point in curve.points if point.result.added_ms > 0]
        added, ppl = [result.added_ms for result in timed], [result.ppl for result in timed]
        axes.plot(added, ppl, label=curve.name, **curve.style)
    _mark_base(axes, points)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("added ms a token (left is better)")


def _draw_published(axes: Axes, points: Sequence[Point], published: Sequence[Published]) -> None:
    """Each curve relative to kNN-LM on the same corpus and model; ours only if that is known."""
    ours = [
        point.result.ppl for point in points if (point.result.method, point.setting) == _NO_SKIP
    ]
    for curve in curves(points) if ours else ():
        if curve.points[-1].setting != RANDOM_SKIP:
            relative = [ppl / ours[0] for ppl in _perplexities(curve)]
            axes.plot(_saved(curve), relative, label=curve.name, **curve.style)
    for number, corpus in enumerate(published):
        marker, colour = "Xp*h"[number % 4], (GREY, INK)[number % 2]
        for method, curve_points in corpus.curves.items():
            name = f"{method}, {corpus.corpus} (published)"
            style: dict[str, Any] = {"color": colour, "linestyle": (0, (4, 3)), "label": name}
            known = [(foss, ppl / corpus.knn) for foss, ppl in curve_points if foss is not None]
            if known:
                foss, ppl = zip(*known, strict=True)
                axes.plot(foss, ppl, marker=marker, linewidth=1.4, **style)
            else:  # a level
                axes.axhline(curve_points[0][1] / corpus.knn, linewidth=0.8, **style)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.text(1.0, 1, "kNN-LM", ha="right", va="bottom", color=INK)
    _foss_axis(axes)
    axes.set_ylabel("perplexity relative to kNN-LM’s (lower is better)")


def _saved(curve: Curve) -> list[float]:
    return [point.result.foss or 0.0 for point in curve.points]


def _perplexities(curve: Curve) -> list[float]:
    return [point.result.ppl for point in curve.points]


def _name_value(axes: Axes, point: Point) -> None:
    value = "∞" if point.value == float("inf") else f"{point.value:g}"
    axes.annotate(
        value,
        (point.result.foss, point.result.ppl),
        (0, -12),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=INK,
    )


def _mark_base(axes: Axes, points: Sequence[Point]) -> None:
    """Scale to what the methods reach, and say where the base model is: often far above."""
    base = points[0].result.ppl
    reached = [p.result.ppl for p in points[1:] if p.setting != RANDOM_SKIP]
    low, high = min(reached), max(reached)
    low, high = min(low, base), max(high, base) if base <= 1.3 * high else high
    margin = 0.09 * np.log(high / low) + 0.01
    axes.set_yscale("log")
    axes.set_ylim(low * np.exp(-margin), high * np.exp(margin))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylabel("token perplexity (lower is better)")
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    label = f"model alone: {base:.1f}" + ("" if base <= high * np.exp(margin) else " ↑")
    axes.axhline(base, label=label, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))


def _foss_axis(axes: Axes) -> None:
    axes.set_xlim(-0.04, 1.04)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("FoSS, the fraction of saved searches (right is cheaper)")


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        handlelength=2.2,
        columnspacing=1.4,
        fontsize=9,
    )
