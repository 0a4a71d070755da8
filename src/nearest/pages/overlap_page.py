"""The page of an analysis of overlap: how much neighbours help, and on which part of a text."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from nearest import __version__
from nearest.errors import require
from nearest.pages.page import filled, interval, number, percent
from nearest.retro.analysis.analyse import LEAKED, UNSHARED, Analysis, Point

MARK = "nearest retro analyse"  # says in a file what wrote it
_TEMPLATE = Path(__file__).with_name("overlap.html")


def render(analysis: Analysis, model: str, text: str) -> str:
    """The whole page.

    Raises:
        NearestError: matplotlib is missing.
    """
    require("matplotlib", "plots")
    from nearest.pages.overlap_plots import match_plot, share_plot

    shares, matches = analysis.by_share(), analysis.by_match()
    whole = shares[-1]
    first, second = analysis.readings[:2]
    return filled(
        _TEMPLATE,
        mark=MARK,
        text=escape(text),
        title=f'Bits a byte <span class="from">{whole.losses[second]:.3f} →</span> '
        f"{whole.losses[first]:.3f}",
        lead=escape(_lead(analysis, shares)),
        share_note="Each point is over all chunks of which at most so much stands, in one piece, "
        f"in one of its {analysis.compared} nearest neighbours. On the left are those that the "
        "database hardly holds.",
        share_plot=share_plot(analysis),
        match_note=f"How much less {escape(first)} loses than {escape(second)} on a token, by how "
        "many tokens in a row up to it stand in a neighbour. Lines are 95 % intervals.",
        match_plot=match_plot(analysis),
        share_table=_table("at most shared", shares, analysis, ".4f"),
        match_table=_table("match", matches, analysis, ".3f"),
        leak=escape(_leak(analysis)),
        leak_table=_leak_table(analysis),
        facts="\n".join(f"    <li>{fact}</li>" for fact in _facts(analysis, model, text)),
    )


def _lead(analysis: Analysis, shares: Sequence[Point]) -> str:
    first, second = analysis.readings[:2]
    whole = shares[-1]
    said = (
        f"On {whole.tokens:,} tokens of {whole.documents:,} documents, {first} takes "
        f"{number(whole.gain, '.4f')} bits a byte less than {second}{_certainty(whole)}."
    )
    unshared = [point for point in shares if (point.high or 0) <= UNSHARED]
    if unshared and unshared[-1] is not whole:
        point = unshared[-1]
        said += (
            f" On the {percent(point.chunks / whole.chunks)} of chunks that share at most "
            f"{percent(point.high or 0, '.3g')} with a neighbour it is "
            f"{number(point.gain, '.4f')}{_certainty(point)}."
        )
    return said


def _certainty(point: Point) -> str:
    low, high = point.interval
    if low is None or high is None:
        return ""
    return f" (95 %: {number(low, '.4f')} to {number(high, '.4f')})"


def _table(head: str, points: Sequence[Point], analysis: Analysis, spec: str) -> str:
    names = (head, "chunks", "tokens", *analysis.readings, "gain", "95 % interval", "of all gain")
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(_row(point, analysis.readings, spec) for point in points)
    return f'<table class="figures"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _row(point: Point, readings: Sequence[str], spec: str) -> str:
    cells = (
        f"{point.chunks:,}",
        f"{point.tokens:,}",
        *(number(point.losses[name], spec) for name in readings),
        number(point.gain, f"+{spec}"),
        interval(*point.interval),
        percent(point.share),
    )
    found = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr><th>{_group(point)}</th>{found}</tr>"


def _group(point: Point) -> str:
    """A part of a chunk, or a number of tokens."""
    if point.high is not None and not isinstance(point.high, int):
        return percent(point.high, ".3g")
    low, high = int(point.low), point.high
    return f"{low} and more" if high is None else f"{low}" if low == high else f"{low} to {high}"


def _leak(analysis: Analysis) -> str:
    leak = analysis.leak()
    return (
        f"Of {leak.chunks:,} chunks, {percent(leak.half, '.2g')} stand at least half, and "
        f"{percent(leak.whole, '.2g')} whole, in one of their nearest neighbours. "
        f"{percent(leak.tokens, '.2g')} of tokens end a run of at least {LEAKED} that was "
        "retrieved word for word. Where these are many, a gain says what was copied; strike "
        "near-duplicates out (--longest-run, --ngram of nearest retro neighbours) and compare."
    )


def _leak_table(analysis: Analysis) -> str:
    leak = analysis.leak()
    if not leak.documents:
        return f"<p>No document has a run of {LEAKED} tokens.</p>"
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{tokens:,}</td></tr>" for name, tokens in leak.documents
    )
    heads = f"<th>document</th><th>tokens that end a run of {LEAKED}</th>"
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _facts(analysis: Analysis, model: str, text: str) -> Iterator[str]:
    yield f"Model: {escape(model)}; text: {escape(text)}; nearest {__version__}."
    yield (
        "Only chunks with a predecessor count: neighbours act from the last token of their chunk "
        "on, so that none act on a document's first chunk."
    )
    yield (
        "Shared: the longest run of tokens of a chunk that stands in one of its own "
        f"{analysis.compared} nearest neighbours or in the chunk that follows it, over the size of "
        "chunks (arXiv:2112.04426, 2.6: 10 neighbours). A match is with what the model read: the "
        "neighbours of the chunk before; it may have begun in that chunk."
    )
    yield (
        "Bits a byte: the losses of all tokens of these chunks over their UTF-8 bytes. Intervals "
        "resample documents; the gain is paired."
    )
    yield f"Readings: {', '.join(map(escape, analysis.readings))}."
