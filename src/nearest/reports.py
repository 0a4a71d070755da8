"""What the command line shows: tables, progress, and text shaded by its sources."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.style import Style
from rich.table import Table
from rich.text import Text

from nearest.progress import Progress as Report

if TYPE_CHECKING:
    from nearest.build.plan import BuildPlan, SharedPlan
    from nearest.memory import Memory
    from nearest.verbs.evaluate_generated import GeneratedResult
    from nearest.verbs.generate import DocumentShare, Generation
    from nearest.verbs.results import Result
    from nearest.verbs.sweep import Point

_SHADE = (255, 196, 61)  # of a token that came from the memory alone
_USELESS = (
    "Perplexity is then about the base model's / (1 − λ). Usual causes: another model, precision, "
    "key layer or tokenizer than built the memory (--force), damaged keys (`nearest verify "
    "--keys`), a corpus of another language or domain, a temperature that is far too high "
    "(`nearest tune`)"
)
_NAMED = 5  # documents, of those that stand in the memory
_LEAST_SHARE = 0.005  # of the text, for a document to be shown


@contextmanager
def live_progress(console: Console) -> Iterator[Report]:
    """A bar for each stage, with its rate and the time left."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        _Counts(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                for task in tasks.values():  # a stage of unknown length ends when the next begins
                    bars.update(task, total=bars.tasks[task].completed)
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report


class _Counts(ProgressColumn):
    """`done/total` and the rate, in the stage's own unit."""

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{int(task.total):,}"
        speed = task.finished_speed or task.speed
        rate = f" ({speed:,.0f}/s)" if speed else ""
        return Text(f"{int(task.completed):,}{total}{rate}")


def plan_table(plan: "BuildPlan", shared: "SharedPlan") -> RenderableType:
    """What a build would make and take, on one machine and on those that share it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    rows = {
        "documents": f"{plan.documents:,}",
        "entries, about": f"{plan.entries:,}",
        "segments": f"{plan.segments:,}",
        "disk, MB": f"{plan.bytes_needed / 1e6:,.0f} of {plan.bytes_free / 1e6:,.0f} free",
        "RAM beside the model, MB": f"{plan.memory_bytes / 1e6:,.0f}",
        "seconds, about": f"{plan.seconds:,.0f}",
        **{f"  {name}": f"{seconds:,.0f}" for name, seconds in plan.stages.items()},
    }
    if shared.machines > 1:
        rows[f"hours on {shared.machines} machines"] = f"{shared.seconds / 3600:,.2f}"
    if shared.cost is not None:
        rows["cost"] = f"{shared.cost:,.2f} for {shared.machine_hours:,.2f} machine hours"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def results_table(results: Sequence["Result"]) -> RenderableType:
    """A column a method, and below how each compares to the first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="dim")
    for result in results:
        table.add_column(result.method, justify="right")
    rows: dict[str, Callable[[Result], str]] = {
        "tokens": lambda r: f"{r.tokens:,}",
        "nll (nats a token)": lambda r: f"{r.nll:.4f}",
        "95 % interval": lambda r: _interval(r.nll_low, r.nll_high),
        "token perplexity": lambda r: _number(r.ppl, ".2f"),
        "word perplexity": lambda r: _number(r.word_ppl, ",.1f"),
        "bits per byte": lambda r: _number(r.bpb, ".4f"),
        "FoSS": lambda r: _number(r.foss, ".2f"),
        "tokens a second": lambda r: f"{r.tok_s:,.0f}",
        "seconds": lambda r: f"{r.seconds:.1f}",
        "added ms a token": lambda r: f"{r.added_ms:.3f}",
        "λ": lambda r: _number(r.lam, "g"),
        "temperature": lambda r: _number(r.temperature, "g"),
        "k": lambda r: _number(r.k, "d"),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(result) for result in results))
    differences = [
        f"{result.method} − {results[0].method}: {result.delta_nll:+.4f} nats a token, "
        f"paired 95 % interval {_interval(result.delta_low, result.delta_high)}"
        for result in results
        if result.delta_nll is not None
    ]
    harms = [_harm(result) for result in results if result.checks.harm is not None]
    return Group(table, *map(Text, (*differences, *harms, *_leak(results[0]))))


def generated_table(results: Sequence["GeneratedResult"]) -> RenderableType:
    """A row a method: its scores with intervals, and below how each compares to the first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="dim")
    for name in results[0].scores:
        table.add_column(name, justify="right")
    table.add_column("tokens a second", justify="right")
    for result in results:
        scores = [
            f"{s.value:.1f}" + ("" if s.low is None else f" [{s.low:.1f}, {s.high:.1f}]")
            for s in result.scores.values()
        ]
        table.add_row(result.method, *scores, f"{result.tokens / max(result.seconds, 1e-9):,.0f}")
    differences = [
        f"{result.method} − {results[0].method}: {name} {s.delta:+.1f}"
        + (
            ""
            if s.delta_low is None
            else f", paired 95 % [{s.delta_low:+.1f}, {s.delta_high:+.1f}]"
        )
        for result in results[1:]
        for name, s in result.scores.items()
    ]
    return Group(table, *map(Text, differences))


def _harm(result: "Result") -> str:
    harm = result.checks.harm
    assert harm is not None
    text = (
        f"{result.method} is worse than the base model at {harm.fraction:.1%} of the tokens, by "
        f"{harm.mean:.3f} nats on average; 99 % lose at most {harm.p99:.3f}"
    )
    if harm.documents:
        named = ", ".join(f"{name} ({loss:+.3f} a token)" for name, loss in harm.documents)
        text += f"; documents that lose most: {named}"
    return text


def _leak(result: "Result") -> Iterator[str]:
    """What of the text stands in the memory, if anything does."""
    leak, documents = result.checks.leak, len(result.document_tokens)
    if leak is None or not (leak.whole or leak.tokens):
        return
    text = (
        f"{len(leak.whole)} of {documents} documents stand in the memory whole, and "
        f"{leak.tokens / result.tokens:.1%} of the tokens in spans of {leak.span} or more that do"
    )
    ids = [*leak.whole, *leak.partly]
    text += f" ({', '.join(ids[:_NAMED])}{', …' if len(ids) > _NAMED else ''})"
    if leak.whole:
        text += "; --leave-one-out leaves out the entries of documents that stand there whole"
    yield text


def doubts(results: Sequence["Result"]) -> Iterator[str]:
    """Why figures are not what they seem: neighbours that know nothing of the text."""
    for result in results:
        neighbours = result.checks.neighbours
        if neighbours is not None and neighbours.useless:
            yield (
                f"the neighbours of {result.method} are useless: of their weight "
                f"{neighbours.right:.2%} falls on the token that comes, and "
                f"{neighbours.chance:.2%} on tokens from elsewhere in the text. {_USELESS}"
            )


def sweep_table(points: Sequence["Point"]) -> RenderableType:
    """A row a point."""
    table = Table(box=None, pad_edge=False)
    for name in ("method", "setting"):
        table.add_column(name, no_wrap=True)
    for name in ("ppl", "FoSS", "added ms", "difference in nll, 95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        result = point.result
        setting = "" if point.setting is None else f"{point.setting} {_number(point.value, 'g')}"
        difference = _number(result.delta_nll, "+.3f")
        if result.delta_low is not None and result.delta_high is not None:
            difference += f" [{result.delta_low:+.3f}, {result.delta_high:+.3f}]"
        table.add_row(
            result.method,
            setting,
            f"{result.ppl:.2f}",
            _number(result.foss, ".2f"),
            f"{result.added_ms:.3f}",
            difference,
        )
    return table


def info_table(memory: "Memory") -> RenderableType:
    """What a memory holds."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in memory.info().items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
        if value != []:
            table.add_row(name.replace("_", " "), escape(_plain(value)))
    return table


def shaded_generation(generation: "Generation", most: int) -> RenderableType:
    """The continuation, each token shaded by the memory's weight, and the documents behind it."""
    text = Text(generation.prompt + ("" if generation.continues else "\n"), style="bold")
    if not generation.tokens:
        return text.append(generation.text, style="not bold")
    for token in generation.tokens:
        text.append(token.text, style=_shade(token.memory_weight))
    legend = Text("from the memory: ")
    for percent in (0, 25, 50, 75, 100):
        legend.append(f" {percent} % ", style=_shade(percent / 100))
    parts: list[RenderableType] = [text, Text(), legend, Text()]
    if not generation.documents:
        return Group(*parts, Text("no token came from the memory"))
    return Group(*parts, _documents_table(generation.documents, most))


def _documents_table(documents: Sequence["DocumentShare"], most: int) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("share", justify="right")
    table.add_column("document", overflow="fold")
    table.add_column("strongest passage", overflow="fold")
    shown = [document for document in documents if document.weight >= _LEAST_SHARE][:most]
    for document in shown:
        passage = Text("…" + _one_line(document.before))
        passage.append(_one_line(document.token), style=_shade(1.0))
        passage.append(_one_line(document.after) + "…")
        name = Text(document.id)
        if title := document.metadata.get("title"):
            name.append(f"\n{title}", style="dim")
        table.add_row(f"{document.weight:.1%}", name, passage)
    left = documents[len(shown) :]
    rest = f"{len(left)} more documents: {sum(item.weight for item in left):.1%}" if left else ""
    return Group(table, Text(rest, style="dim"))


def _shade(weight: float) -> Style:
    """From no colour (0) to full colour (1), dark text on light so that both stay readable."""
    if weight < 0.02:
        return Style(bold=False)
    red, green, blue = (round(255 + (part - 255) * weight) for part in _SHADE)
    return Style(bold=False, color="black", bgcolor=f"rgb({red},{green},{blue})")


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
