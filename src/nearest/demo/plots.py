"""The report's plots, as SVG elements to stand inside a page. Needs matplotlib (extra: plots)."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from nearest.pages.figures import AMBER, GREY, INK, ROSE, RULE, STYLE, TEAL, axis_label, figure, svg
from nearest.retrieval.gates.fitting import TEMPERATURES
from nearest.verbs.results import Result
from nearest.verbs.settings_search import LAMS, Tuned

_STEP = 4  # temperatures are √2 apart; the plotted ones ×4


def tuning_plot(tuned: Tuned) -> str:
    """Perplexity on the tuning text against λ, a line a temperature, the best settings marked."""
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.2, 4.3)
        _draw_tuning(axes, tuned)
        return svg(drawn, "Perplexity against the weight of the memory, by temperature")


def documents_plot(names: list[str], base: Result, knn: Result) -> str:
    """Change in nll a token of every scored document, the largest gain on top."""
    change = (knn.document_nll - base.document_nll) / base.document_tokens
    order = np.argsort(-change)
    with matplotlib.rc_context(STYLE):
        drawn, axes = figure(5.2, 1.0 + 0.185 * len(names))
        colours = [TEAL if change[i] < 0 else ROSE for i in order]
        axes.barh(np.arange(len(order)), change[order], color=colours, height=0.68)
        axes.set_yticks(np.arange(len(order)), [axis_label(names[i]) for i in order])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.axvline(0, color=GREY, linewidth=0.8)
        if knn.delta_nll is not None:
            axes.axvline(knn.delta_nll, color=AMBER, linewidth=1.6)
        if knn.delta_low is not None and knn.delta_high is not None:
            axes.axvspan(knn.delta_low, knn.delta_high, color=AMBER, alpha=0.22, lw=0, zorder=0)
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("change in nll, nats a token (left is better)")
        return svg(drawn, "Change in negative log-likelihood of every test topic")


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
