"""Figures of results, each a matplotlib Figure that shows itself in a notebook (extra: plots).

    plots.methods(evaluate(model, memory, test, ["base", "knn", "hybrid"]))
    plots.tuning(tune(model, memory, valid))
    plots.sources(session.sources(0), tokenizer)

`figure.savefig("name.png")` keeps one.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from nearest.errors import SettingError
from nearest.models.sources import TokenSources
from nearest.pages.figures import (
    AMBER,
    GREY,
    INK,
    ROSE,
    RULE,
    STYLE,
    TEAL,
    Drawing,
    axis_label,
    figure,
)
from nearest.pages.overlap_plots import overlap_figure
from nearest.pages.published import Published
from nearest.pages.sweep_plots import sweep_figure
from nearest.retrieval.gates.fitting import TEMPERATURES
from nearest.retro.analysis.analyse import Analysis
from nearest.verbs.evaluate_generated import GeneratedResult
from nearest.verbs.generate import decode_pieces
from nearest.verbs.results import Result
from nearest.verbs.settings_search import LAMS, Tuned
from nearest.verbs.sweep import Sweep

_STEP = 4  # temperatures are √2 apart; the plotted ones ×4
_DOCUMENTS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # Okabe & Ito


def methods(results: Sequence[Result | GeneratedResult], metric: str = "nll") -> Drawing:
    """A dot a method with its 95 % interval: nll, or a metric of texts that were written.

    Args:
        results: of `evaluate` or `evaluate_generated`, one or more.
        metric: "nll" of the former; "bleu", "chrf" … of the latter.

    Raises:
        SettingError: there is no result, or one without this metric.
    """
    if not results:
        raise SettingError("there is no result to draw: give at least one")
    rows = [_interval_of(result, metric) for result in results]
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.6, 0.9 + 0.32 * len(rows))
        for place, (value, low, high) in enumerate(rows):
            colour = INK if place == 0 else TEAL
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.5)
            axes.plot(value, place, "o", color=colour, markersize=6)
        axes.axvline(rows[0][0], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_yticks(range(len(rows)), [axis_label(result.method) for result in results])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        nll = metric == "nll"
        axes.set_xlabel(
            "nll, nats a token (left is better)" if nll else f"{metric} (right is better)"
        )
        return drawn


def tuning(tuned: Tuned) -> Drawing:
    """Perplexity on the tuning text against λ, a line a temperature, the best settings marked."""
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.2, 4.3)
        _draw_tuning(axes, tuned)
        return drawn


def documents(base: Result, method: Result, names: Sequence[str] | None = None) -> Drawing:
    """Change in nll a token of every scored document, the largest gain on top.

    Args:
        base, method: of the same text, in one call of `evaluate` whose first method is `base`.
        names: of the documents; their numbers where not given.

    Raises:
        SettingError: the results are not of the same documents, or names are not one for each.
    """
    count = len(base.document_nll)
    names = [str(number) for number in range(count)] if names is None else list(names)
    if len(method.document_nll) != count or len(names) != count:
        raise SettingError(
            f"results of {count} and {len(method.document_nll)} documents with {len(names)} names: "
            "give two results of one text, and a name for each document"
        )
    change = (method.document_nll - base.document_nll) / np.maximum(base.document_tokens, 1)
    order = np.argsort(-change)
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.2, 1.0 + 0.185 * count)
        colours = [TEAL if change[i] < 0 else ROSE for i in order]
        axes.barh(np.arange(count), change[order], color=colours, height=0.68)
        axes.set_yticks(np.arange(count), [axis_label(names[i]) for i in order])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, count - 0.3)
        axes.axvline(0, color=GREY, linewidth=0.8)
        if method.delta_nll is not None:
            axes.axvline(method.delta_nll, color=AMBER, linewidth=1.6)
        if method.delta_low is not None and method.delta_high is not None:
            axes.axvspan(
                method.delta_low, method.delta_high, color=AMBER, alpha=0.22, lw=0, zorder=0
            )
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("change in nll, nats a token (left is better)")
        return drawn


def sources(named: Sequence[TokenSources], tokenizer: Any) -> Drawing:
    """A bar a token: how much of its probability the memory gave, by document.

    The documents that gave most in all have colours of their own; the others are grey.

    Args:
        named: of `session.sources(row)`.
        tokenizer: the model's.

    Raises:
        SettingError: there is no token.
    """
    if not named:
        raise SettingError("there is no token to draw: generate some first")
    shares = [_by_document(token) for token in named]
    totals: dict[str, float] = {}
    for one in shares:
        for name, weight in one.items():
            totals[name] = totals.get(name, 0.0) + weight
    first = sorted(totals, key=lambda name: -totals[name])[: len(_DOCUMENTS)]
    layers = [(name, [one.get(name, 0.0) for one in shares]) for name in first]
    others = [sum(w for name, w in one.items() if name not in first) for one in shares]
    pieces = decode_pieces(tokenizer, [], [token.token for token in named])
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(max(5.2, 1.6 + 0.24 * len(named)), 3.6)
        below = np.zeros(len(named))
        colours = [*_DOCUMENTS[: len(layers)], GREY]
        for (name, heights), colour in zip([*layers, ("others", others)], colours, strict=True):
            if any(heights):
                axes.bar(range(len(named)), heights, 0.85, below, color=colour, label=_short(name))
            below += heights
        labels = [_short(piece.replace("\n", "⏎")) for piece in pieces]
        axes.set_xticks(range(len(named)), labels, rotation=90, fontsize=8.5)
        axes.set_ylim(0, 1)
        axes.set_ylabel("given by the memory")
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=8.5)
        return drawn


def sweep(swept: Sweep, published: Sequence[Published] = ()) -> Drawing:
    """Perplexity over saved searches and over time, as `nearest sweep` draws it."""
    return sweep_figure(swept.points, published)


def overlap(analysis: Analysis) -> Drawing:
    """Losses by what a text shares with its neighbours, as `nearest retro analyse` draws it."""
    return overlap_figure(analysis)


def _interval_of(
    result: Result | GeneratedResult, metric: str
) -> tuple[float, float | None, float | None]:
    if isinstance(result, Result):
        if metric != "nll":
            raise SettingError(f"{result.method} has no {metric}: draw its nll")
        return result.nll, result.nll_low, result.nll_high
    if metric not in result.scores:
        raise SettingError(
            f"{result.method} has no {metric}: choose {' or '.join(result.scores)} (metric=…)"
        )
    score = result.scores[metric]
    return score.value, score.low, score.high


def _by_document(token: TokenSources) -> dict[str, float]:
    """What each document gave of a token's probability."""
    shares: dict[str, float] = {}
    for source in token.sources:
        weight = token.memory_weight * source.weight
        shares[source.document_id] = shares.get(source.document_id, 0.0) + weight
    return shares


def _short(text: str) -> str:
    """Fit for a label; legends leave out what begins with an underscore."""
    text = axis_label(text)
    return f" {text}" if text.startswith("_") else text


def _draw_tuning(axes: Axes, tuned: Tuned) -> None:
    settings = tuned.settings
    best_temperature = TEMPERATURES.index(settings.temperature)
    perplexity = np.exp(np.minimum(tuned.curves, 700))
    base, best = np.exp(tuned.base_nll), np.exp(tuned.nll)
    for i in range(best_temperature - 2 * _STEP, best_temperature + 2 * _STEP + 1, _STEP):
        if not 0 <= i < len(TEMPERATURES):
            continue
        is_best = i == best_temperature
        axes.plot(
            LAMS,
            perplexity[i],
            color=AMBER if is_best else GREY,
            linewidth=2.4 if is_best else 1.1,
            linestyle="-" if is_best else _dashes(i - best_temperature),
            label=f"{TEMPERATURES[i]:g}",
            zorder=3 if is_best else 2,
        )
    axes.axhline(base, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.text(0.02, base, "model alone", ha="left", va="bottom", color=INK)
    axes.plot(settings.lam, best, "o", color=AMBER, markersize=7, zorder=4)
    axes.annotate(
        f"λ {settings.lam:g}: {best:.1f}",
        (settings.lam, best),
        (0, -16),
        textcoords="offset points",
        ha="center",
        color=INK,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(best - 0.22 * (base - best + 1), base + 0.25 * (base - best + 1))
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_xlabel("λ, the weight of the memory")
    axes.set_ylabel("token perplexity")
    axes.legend(
        title="temperature",
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=5,
        handlelength=1.5,
        columnspacing=1.2,
    )


def _dashes(offset: int) -> tuple[float, tuple[float, ...] | None]:
    """A pattern for each distance from the best: lines are told apart without colour."""
    patterns: dict[int, tuple[float, tuple[float, ...] | None]] = {
        -2: (0, (1.5, 1.5)),
        -1: (0, (5, 2)),
        1: (0, None),
        2: (0, (6, 2, 1.5, 2)),
    }
    return patterns[offset // _STEP]
