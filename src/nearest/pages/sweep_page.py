"""The page of a sweep: what was reached, the curves, every setting, and how it was measured."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path, PurePath

from nearest import __version__
from nearest.errors import require
from nearest.memory import Memory
from nearest.pages.page import filled, interval, number, percent
from nearest.pages.published import Published
from nearest.retrieval.settings import BASE, IN_CONTEXT, MEMORY_METHODS, method_named
from nearest.verbs.sweep import RANDOM_SKIP, Point, Sweep

MARK = "nearest sweep"  # says in a file what wrote it
_TEMPLATE = Path(__file__).with_name("sweep.html")


def render(swept: Sweep, memory: Memory, published: Sequence[Published] = ()) -> str:
    """The whole page.

    Raises:
        NearestError: matplotlib is missing.
    """
    require("matplotlib", "plots")
    from nearest.pages.sweep_plots import foss_plot, time_plot

    points = swept.points
    best = _lowest(points[1:])
    return filled(
        _TEMPLATE,
        mark=MARK,
        memory=escape(memory.path.name),
        title=f'Perplexity <span class="from">{points[0].result.ppl:.1f} →</span> '
        f"{best.result.ppl:.1f}",
        lead=escape(_lead(points, memory)),
        foss_note="Each point is a method at one value of what decides how often it searches. "
        "Numbers beside points are values of min_knns.",
        foss_plot=foss_plot(points),
        time_note="What a method adds to each token’s time, its searches included, on this "
        "machine; the axis is logarithmic.",
        time_plot=time_plot(points),
        published=_published_section(points, published) if published else "",
        table_note="Difference: nll in nats a token against the model alone, with its paired 95 % "
        "interval by resampling documents. The same figures, and more, are in sweep.csv.",
        table=_table(points),
        facts="\n".join(f"    <li>{fact}</li>" for fact in _facts(swept, memory)),
    )


def _lowest(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.result.nll)


def _lead(points: Sequence[Point], memory: Memory) -> str:
    base, best = points[0].result, _lowest(points[1:])
    said = (
        f"The model alone reads {base.tokens:,} tokens of {len(base.document_tokens):,} documents "
        f"with perplexity {base.ppl:.1f}. With {memory.path.name} the lowest is {_placed(best)}."
    )
    without = [p for p in points[1:] if p.result.foss == 1 and p.setting != RANDOM_SKIP]
    if without and _lowest(without) is not best:
        said += f" Without any search it is {_placed(_lowest(without))}."
    return said


def _placed(point: Point) -> str:
    result = point.result
    setting = "" if point.setting is None else f" ({_setting(point)})"
    saved = "" if result.foss is None else f" at FoSS {result.foss:.2f}"
    return (
        f"{result.ppl:.1f}, by {result.method}{setting}{saved}, "
        f"which adds {result.added_ms:.2g} ms a token"
    )


def _setting(point: Point) -> str:
    if point.setting is None or point.value is None:
        return "as tuned"
    if point.setting == RANDOM_SKIP:
        return f"{percent(point.value)} at random"
    return f"{point.setting} {'∞' if point.value == float('inf') else format(point.value, 'g')}"


def _table(points: Sequence[Point]) -> str:
    names = ("", "perplexity", "FoSS", "added ms", "difference", "95 % interval", "tokens/s")
    heads = "".join(f"<th{_wide(column)}>{name}</th>" for column, name in enumerate(names))
    bodies = "".join(
        f"<tbody>{_method_row(list(own))}</tbody>"
        for _, own in groupby(points, lambda point: point.result.method)
    )
    return f'<table class="figures"><thead><tr>{heads}</tr></thead>{bodies}</table>'


def _method_row(points: Sequence[Point]) -> str:
    result = points[0].result
    given = (("λ", result.lam), ("temperature", result.temperature), ("k", result.k))
    settings = ", ".join(f"{name} {value:g}" for name, value in given if value is not None)
    head = f'<th colspan="7">{escape(result.method)} <span class="note">{settings}</span></th>'
    return f"<tr>{head}</tr>" + "".join(map(_row, points))


def _row(point: Point) -> str:
    result = point.result
    cells = (
        f"{result.ppl:.2f}",
        number(result.foss, ".2f"),
        f"{result.added_ms:.3f}",
        number(result.delta_nll, "+.4f"),
        interval(result.delta_low, result.delta_high),
        f"{result.tok_s:,.0f}",
    )
    name = "no memory" if result.method == BASE else _setting(point)
    return (
        f"<tr><th>{name}</th>"
        + "".join(f"<td{_wide(column)}>{cell}</td>" for column, cell in enumerate(cells, 1))
        + "</tr>"
    )


def _wide(column: int) -> str:
    """Marks the columns that a phone has no room for."""
    return ' class="wide"' if column > 4 else ""


def _published_section(points: Sequence[Point], published: Sequence[Published]) -> str:
    from nearest.pages.sweep_plots import published_plot

    base = ", ".join(
        f"{escape(one.corpus)} (model alone {one.base:g}, kNN-LM {one.knn:g})" for one in published
    )
    sources = "; ".join(sorted({one.source for one in published}))
    return (
        '<section class="pair">\n  <div>\n    <h2>Beside published curves</h2>\n'
        "    <p>Dashed, in grey and black: validation perplexities as reported by "
        f"{escape(sources)} on {base}. They are of other models, corpora and memories, so each "
        "curve is drawn relative to kNN-LM on its own: the shapes can be compared, the numbers "
        "cannot. A level without points is a method’s best, at whatever FoSS.</p>\n  </div>\n"
        f"  <div>{published_plot(points, published)}</div>\n</section>"
    )


def _facts(swept: Sweep, memory: Memory) -> Iterator[str]:
    model, clusters = memory.manifest.model.name, memory.manifest.clusters
    yield (
        f"Memory: {escape(memory.path.name)}, {memory.entries:,} entries of {memory.documents:,} "
        f"documents; model: {escape(PurePath(model).name or 'in memory')}; nearest {__version__}."
    )
    yield (
        "The model reads the text once, for all methods. Every method then predicts each token "
        "once for every setting, in turn, on the same machine."
    )
    if any(point.result.method.startswith(IN_CONTEXT) for point in swept.points):
        yield (
            "Where passages stand before the text it is read once more, and what that takes "
            "longer is part of added ms."
        )
    if swept.search_ms:
        by_method = ", ".join(f"{name} {ms:.3f}" for name, ms in swept.search_ms.items())
        yield (
            "The dense search of a query is made once, when the first setting asks for it, and "
            "answered from a cache after that; methods share it when they look at equally many "
            f"candidates by the same distances. Mean time of a search, in ms: {by_method}."
        )
    yield (
        "<b>Added ms</b> is therefore not one measured run: it is the setting’s own measured time "
        "(everything but answering searches), plus the number of searches that it asks for times "
        "the mean time of one in this sweep. <code>nearest eval</code> measures a setting by "
        "itself."
    )
    yield "FoSS: the fraction of tokens that are predicted without a dense search."
    if any(_follows_pointers(point) for point in swept.points):
        yield (
            "Pointers are followed without clusters: the memory has none."
            if clusters is None
            else f"Pointers are followed with {clusters.clusters:,} clusters, made by "
            f"{escape(clusters.made_by)}."
        )
    if any(point.setting == RANDOM_SKIP for point in swept.points):
        yield (
            "Skipping at random is not run: its nll and time are the expected ones, mixed from "
            "those of kNN-LM and of the model alone."
        )
    if swept.untuned:
        yield (
            f"Not tuned, so with default settings: {', '.join(swept.untuned)}. "
            "<code>nearest tune</code> finds better ones."
        )
    yield (
        "λ, temperatures and gates are what <code>nearest tune</code> had stored. Whoever chooses "
        "a setting by these curves has tuned it on this text."
    )


def _follows_pointers(point: Point) -> bool:
    method = point.result.method
    return method in MEMORY_METHODS and "pointers" in method_named(method).kinds
