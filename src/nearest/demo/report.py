"""The demo's page: one HTML file that needs nothing else, made of one run's results alone."""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from nearest import __version__
from nearest.demo.corpus import Split, repeated_share
from nearest.demo.passage import Passage
from nearest.errors import require
from nearest.pages.page import filled, interval, number, percent
from nearest.verbs.generate import DocumentShare, Generation
from nearest.verbs.results import Result
from nearest.verbs.settings_search import Tuned

_TEMPLATE = Path(__file__).with_name("template.html")
_FULL_SHADE = 20.0  # times as likely, or as unlikely
_SOURCES = 4
_LEAST_SHARE = 0.005  # of the text, for a document to be shown


class Writing(NamedTuple):
    """A prompt continued by the model alone, and with the memory."""

    base: Generation
    knn: Generation


class Compared(NamedTuple):
    """Another model with a memory of the same text, tuned and scored on the same."""

    model: str
    parameters: int
    base: Result
    knn: Result


@dataclass(frozen=True)
class Story:
    """Everything a run of the demo found; `ships`: whether the model comes with nearest."""

    python: str
    model: str
    parameters: int
    split: Split
    entries: int
    tuned: Tuned
    base: Result
    knn: Result
    passage: Passage
    writings: list[Writing]
    writing_temperature: float
    seconds: float
    ships: bool = True
    beside: Compared | None = None


def render(story: Story) -> str:
    """The whole page.

    Raises:
        NearestError: matplotlib is missing.
    """
    require("matplotlib", "plots")
    from nearest.demo.plots import documents_plot, tuning_plot

    base, knn, tuned, split = story.base, story.knn, story.tuned, story.split
    headline = f"perplexity {base.ppl:.1f} → {knn.ppl:.1f}"
    names = [document.id for document in split.test]
    settings = tuned.settings
    return filled(
        _TEMPLATE,
        headline=headline,
        title=f'Perplexity <span class="from">{base.ppl:.1f} →</span> {knn.ppl:.1f}',
        lead=escape(_lead(story)),
        measured=f"{base.tokens:,} tokens of {len(names)} topics that neither the memory nor its "
        "tuning has seen, each predicted once. Intervals are 95 %, by resampling topics.",
        results=_results_table(base, knn),
        beside=_beside(story),
        tuning_note=f"Perplexity on {len(split.tuning)} other topics, for every weight λ of the "
        f"memory. Lowest: λ {settings.lam:g} at temperature "
        f"{settings.temperature:g} with the {settings.k:,} nearest entries.",
        tuning_plot=tuning_plot(tuned),
        documents_note=_documents_note(base, knn),
        documents_plot=documents_plot(names, base, knn),
        passage_note=f"The beginning of <b>{escape(story.passage.document)}</b>, the test topic "
        "whose gain is the median: each token coloured by how much likelier, or less likely, the "
        f"memory makes it. With λ {settings.lam:g} it can at worst take "
        f"{percent(settings.lam)} of a token’s probability away; what it can give has no such "
        "bound.",
        passage="".join(_gain(text, gain) for text, gain in story.passage.tokens),
        passage_legend=_legend_of_gains(settings.lam),
        writing_note=f"Greedy, with the tuned λ and temperature {story.writing_temperature:g}: the "
        "nearest entries decide, and much is quoted. (At the tuned temperature, which predicts "
        "best, a small model soon turns in circles when it always takes the likeliest token, "
        "as it does alone.) Every token knows its sources.",
        writing_legend="from the memory: "
        + "".join(_shaded(percent(share), share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        writings="".join(_writing(writing) for writing in story.writings),
        facts=_facts(story),
        commands=escape(_commands(story)),
        model=escape(story.model),
        whence="comes with nearest" if story.ships else "was made for this page",
    )


def _legend_of_gains(lam: float) -> str:
    """From the worst that λ allows to where the colour is full."""
    worst = [(f"×{1 - lam:.2g}", math.log1p(-lam))] if 0 < lam < 1 else []
    marks = [*worst, ("as likely", 0.0), ("×2", math.log(2)), ("×5", math.log(5))]
    full = (f"×{_FULL_SHADE:g} and more", math.log(_FULL_SHADE))
    return "".join(_gain(label, gain) for label, gain in [*marks, full])


def _lead(story: Story) -> str:
    low, high = story.knn.delta_low, story.knn.delta_high
    change = percent(math.expm1(story.knn.delta_nll or 0), "+.0f")
    if low is not None and high is not None:
        ends = (percent(math.expm1(end), "+.0f") for end in (low, high))
        change += " (95\xa0% interval {} to {}, paired by topic)".format(*ends)
    return (
        f"A general language model of {story.parameters / 1e6:.1f} million parameters reads "
        f"held-out topics of Python’s language reference with perplexity {story.knn.ppl:.1f} "
        f"instead of {story.base.ppl:.1f} when it looks up other topics of it in a memory: "
        f"{change}. "
        "Not one weight of the model changes."
    )


def _documents_note(base: Result, knn: Result) -> str:
    better = int((knn.document_nll < base.document_nll).sum())
    return (
        f"What the memory changes in each test topic: {better} of {len(base.document_nll)} are "
        "predicted better with it. The line is the mean over all tokens, the band its interval."
    )


def _results_table(base: Result, knn: Result) -> str:
    rows: dict[str, Callable[[Result], str]] = {
        "token perplexity": lambda r: f"{r.ppl:.2f}",
        "negative log-likelihood, nats a token": lambda r: f"{r.nll:.4f}",
        "95 % interval": lambda r: interval(r.nll_low, r.nll_high),
        "paired difference": lambda r: number(r.delta_nll, "+.4f"),
        "95 % interval of the difference": lambda r: interval(r.delta_low, r.delta_high),
        "word perplexity": lambda r: number(r.word_ppl, ",.0f"),
        "bits a byte": lambda r: number(r.bpb, ".3f"),
        "tokens": lambda r: f"{r.tokens:,}",
        "tokens a second, on this machine": lambda r: f"{r.tok_s:,.0f}",
    }
    body = "".join(
        f"<tr><th>{name}</th><td>{cell(base)}</td><td>{cell(knn)}</td></tr>"
        for name, cell in rows.items()
    )
    return (
        '<table class="figures"><thead><tr><th></th><th>model alone</th><th>with memory</th></tr>'
        f"</thead><tbody>{body}</tbody></table>"
    )


def _beside(story: Story) -> str:
    """Both models' perplexities; a token of the two is not the same where their tokenizers differ.

    So bits a byte, which do not depend on them, stand beside.
    """
    if story.beside is None:
        return ""
    own = Compared(story.model, story.parameters, story.base, story.knn)
    rows = "".join(
        f"<tr><th>{escape(one.model)}, {one.parameters / 1e6:.1f} million parameters</th>"
        f"<td>{one.base.ppl:.2f}</td><td>{one.knn.ppl:.2f}</td>"
        f"<td>{percent(math.expm1(one.knn.delta_nll or 0), '+.0f')}</td>"
        f"<td>{number(one.base.bpb, '.3f')}</td><td>{number(one.knn.bpb, '.3f')}</td></tr>"
        for one in (own, story.beside)
    )
    return (
        "<p>The same text remembered, tuned on and read by a model of another size. The better a "
        "model predicts by itself, the less a memory is left to add. Tokens differ between "
        'models, bytes do not.</p><table class="figures"><thead><tr><th></th><th>perplexity alone'
        "</th><th>with memory</th><th>change</th><th>bits a byte alone</th><th>with memory</th>"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _writing(writing: Writing) -> str:
    """Both continuations side by side, and the documents behind the memory's."""
    shaded = "".join(_shaded(token.text, token.memory_weight) for token in writing.knn.tokens)
    prompt = escape(writing.knn.prompt)
    documents = writing.knn.documents
    shown = [item for item in documents if item.weight >= _LEAST_SHARE][:_SOURCES]
    rest = [item.weight for item in documents[len(shown) :]]
    share = ("less than " if sum(rest) < 0.001 else "") + percent(max(0.001, sum(rest)), ".1f")
    return (
        '<div class="writing"><div class="pair">'
        f'<div><p class="note">with memory</p><div class="text"><b>{prompt}</b>{shaded}</div></div>'
        f'<div><p class="note">model alone</p><div class="text plain"><b>{prompt}</b>'
        f"{escape(writing.base.text)}</div></div></div>"
        f'<table class="sources"><tbody>{"".join(map(_source, shown))}</tbody></table>'
        f'<p class="note">{len(rest)} more documents: {share}</p></div>'
    )


def _source(document: DocumentShare) -> str:
    title = escape(str(document.metadata.get("title", "")))
    before, token, after = (
        escape(part.replace("\n", "⏎"))
        for part in (document.before, document.token, document.after)
    )
    return (
        f'<tr><td class="share">{percent(document.weight, ".1f")}'
        f'<span class="bar" style="--w:{document.weight:.3f}"></span></td>'
        f'<td class="name">{escape(document.id)}<small>{title}</small></td>'
        f'<td class="quote">…{before}<mark>{token}</mark>{after}…</td></tr>'
    )


def _shaded(text: str, weight: float) -> str:
    return _span("memory", weight, f"{percent(weight)} from the memory", text)


def _gain(text: str, gain: float) -> str:
    factor = math.exp(abs(gain))
    shade = min(abs(gain) / math.log(_FULL_SHADE), 1.0)
    if gain < 0:
        return _span("loss", shade, f"{factor:.1f} times less likely", text)
    return _span("gain", shade, f"{factor:.1f} times as likely", text)


def _span(kind: str, shade: float, tip: str, text: str) -> str:
    return f'<span class="{kind}" style="--w:{shade:.2f}" title="{tip}">{escape(text)}</span>'


def _facts(story: Story) -> str:
    split = story.split
    characters = [sum(len(d.text) for d in part) for part in split[:3]]
    memory, test = ([document.text for document in part] for part in (split.memory, split.test))
    facts = (
        f"Text: the topics of <code>pydoc</code> in Python {escape(story.python)}. "
        f"{len(split.repeated)} of them repeat a longer one and are left out: of the test’s "
        f"eight-word runs, {percent(repeated_share(test, memory), '.1f')} stand in the memory.",
        f"Memory: {len(split.memory)} topics, {characters[0]:,} characters, {story.entries:,} "
        "entries.",
        f"Tuning: {len(split.tuning)} topics, {characters[1]:,} characters, "
        f"{story.tuned.tokens:,} tokens. Test: {len(split.test)} topics, {characters[2]:,} "
        f"characters, {story.base.tokens:,} tokens.",
        f"Model: {escape(story.model)}, {story.parameters:,} parameters, as shipped.",
        f"nearest {escape(__version__)}, on the CPU, in {story.seconds:.0f} seconds.",
    )
    return "\n".join(f"    <li>{fact}</li>" for fact in facts)


def _commands(story: Story) -> str:
    return "\n".join(
        (
            "nearest build MODEL corpus/memory.jsonl --out my.memory",
            "nearest tune my.memory --text corpus/tuning.jsonl",
            "nearest eval my.memory --text corpus/test.jsonl",
            f"nearest generate my.memory --prompt {shlex.quote(story.writings[0].knn.prompt)} "
            f"--sources --knn-temperature {story.writing_temperature:g}",
        )
    )
