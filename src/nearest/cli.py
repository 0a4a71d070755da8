"""The `nearest` command: reads arguments, calls the verbs, and prints what they return.

Reports go to stdout (`--json`: one object a line), logs and progress to stderr. A mistake of the
user's is one message and exit code 2, never a traceback. Heavy imports wait for their command.
"""

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from nearest import reports
from nearest.errors import NearestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nearest.memory.memory import Memory

app = typer.Typer(
    help="A memory for language models: look a corpus up while predicting, with sources.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

MemoryPath = Annotated[Path, typer.Argument(metavar="MEMORY", help="The memory's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
TextPaths = Annotated[
    list[Path], typer.Option("--text", help="Text to score: .txt, .md, .jsonl or a folder.")
]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens a window; the memory's own, or at building the model's, up to 512."),
]
Stride = Annotated[
    int | None, typer.Option(help="New tokens a window; the memory's own, or half the window.")
]
BatchSize = Annotated[int | None, typer.Option(help="Windows a forward pass.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="The model, where it is not where it was at building.")
]
ScoreEos = Annotated[bool, typer.Option(help="Predict each document's end too.")]
Force = Annotated[
    bool, typer.Option(help="Accept another model than built it: neighbours may then mean nothing.")
]
Lam = Annotated[float | None, typer.Option("--lam", help="Weight of the memory, 0 to 1.")]
Temperature = Annotated[float | None, typer.Option(help="Temperature of the neighbours' softmax.")]
K = Annotated[int | None, typer.Option("--k", help="Number of neighbours.")]
LengthPower = Annotated[
    float | None, typer.Option(help="Weigh entries by (1 + match length) to this power.")
]
MinKnns = Annotated[
    float | None, typer.Option(help="Search when fewer pointers are left; inf: always, 0: never.")
]
MaxKnns = Annotated[int | None, typer.Option(help="Pointers and cluster members, at most.")]
Dedup = Annotated[
    bool | None, typer.Option("--dedup/--no-dedup", help="Count no entry twice in one prediction.")
]
SuffixMatches = Annotated[
    int | None, typer.Option("--matches", help="Entries with the longest matches, at most.")
]
Skip = Annotated[
    float | None, typer.Option(help="Fraction of dense searches that the gate is to save.")
]
Guard = Annotated[
    bool | None,
    typer.Option("--guard/--no-guard", help="Weigh base and memory by how well each predicts."),
]
Distances = Annotated[
    Literal["keys", "index"] | None, typer.Option(help="Distances of stored keys, or the index's.")
]
Encoding = Annotated[
    Literal["strict", "replace"], typer.Option(help="What to do with text that is not UTF-8.")
]
Spec = Annotated[str, typer.Option(help='"auto", "exact", or a FAISS index_factory string.')]
Nprobe = Annotated[
    int | None, typer.Option(help="Lists to probe; found by the recall target when not given.")
]
Recall = Annotated[float, typer.Option(help="Recall@100 after re-ranking to tune the index to.")]


_P = ParamSpec("_P")
_R = TypeVar("_R")


def explained(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn the errors a user can mend, and an interruption, into a message and exit code 2."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except NearestError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        except KeyboardInterrupt:
            err.print("[bold red]stopped:[/] nothing half-written was left; run it again")
        raise typer.Exit(2)

    return run


@app.callback()
def _prepare() -> None:
    """Keep stdout for reports: notes go to stderr."""

    def note(message: Warning | str, *_: Any) -> None:
        err.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)

    warnings.showwarning = note  # type: ignore[assignment]


@app.command()
@explained
def build(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.")],
    corpus: Annotated[list[Path], typer.Argument(metavar="CORPUS...", help="Files or folders.")],
    out_path: Annotated[Path, typer.Option("--out", metavar="MEMORY", help="The new folder.")],
    keys: Annotated[
        Literal["fp16", "int8", "none"],
        typer.Option(help="How keys are stored; none: no forward pass, for suffix matching only."),
    ] = "fp16",
    key_layer: Annotated[
        Literal["last_ffn_input", "last_hidden"], typer.Option(help="Which states are keys.")
    ] = "last_ffn_input",
    window: Window = None,
    stride: Stride = None,
    index: Spec = "auto",
    metric: Annotated[
        Literal["l2", "ip"], typer.Option(help="Squared L2, or inner product.")
    ] = "l2",
    recall: Recall = 0.95,
    nprobe: Nprobe = None,
    batch_size: BatchSize = None,
    encoding_errors: Encoding = "strict",
    as_json: AsJson = False,
) -> None:
    """Make a memory of documents (.txt, .md, .jsonl, folders of them)."""
    quiet_libraries()
    from nearest.verbs.build import build as build_memory

    with reports.live_progress(err) as progress:
        memory = build_memory(
            model,
            corpus,
            out_path,
            encoding_errors=encoding_errors,
            keys=keys,
            key_layer=key_layer,
            window=window,
            stride=stride,
            index=index,
            metric=metric,
            recall=recall,
            nprobe=nprobe,
            batch_size=batch_size,
            progress=progress,
        )
    show_info(memory, as_json)


@app.command()
@explained
def info(memory: MemoryPath, as_json: AsJson = False) -> None:
    """Say what a memory holds, how it is searched and what was tuned."""
    from nearest.memory.memory import Memory

    show_info(Memory.open(memory), as_json)


@app.command()
@explained
def verify(memory: MemoryPath, as_json: AsJson = False) -> None:
    """Read everything and find what is damaged."""
    from nearest.memory.verify import verify as problems_of

    with reports.live_progress(err) as progress:
        problems = problems_of(memory, progress)
    if as_json:
        typer.echo(json.dumps({"memory": str(memory), "sound": not problems, "problems": problems}))
    elif not problems:
        out.print(f"{escape(str(memory))} is sound")
    if problems:
        raise NearestError(
            f"{memory} is damaged: {'; '.join(problems)}. Restore it from a copy, or rebuild it"
        )


@app.command()
@explained
def index(
    memory: MemoryPath,
    spec: Spec = "auto",
    recall: Recall = 0.95,
    nprobe: Nprobe = None,
    as_json: AsJson = False,
) -> None:
    """Give a memory another index, as a new generation."""
    from nearest.memory.memory import Memory
    from nearest.memory.segment_writer import IndexChoice
    from nearest.memory.writer import rebuild_index

    with reports.live_progress(err) as progress:
        rebuild_index(memory, IndexChoice(spec, recall, nprobe), progress)
    show_info(Memory.open(memory), as_json)


@app.command()
@explained
def cluster(
    memory: MemoryPath,
    clusters: Annotated[int | None, typer.Option(help="Number of clusters (k-means).")] = None,
    sample: Annotated[
        int | None, typer.Option(help="Entries to find centroids with; 32 a cluster if not given.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Of k-means; 10 if not given.")] = None,
    greedy_merge: Annotated[
        bool, typer.Option("--greedy-merge", help="Join near entries of the same value instead.")
    ] = False,
    neighbours: Annotated[
        int | None, typer.Option(help="Of each entry, for greedy merge; 9 if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find which entries share a state, for RetoMaton to follow; a new generation."""
    from nearest.memory.clustering import GreedyMerge, KMeans, cluster_memory
    from nearest.memory.memory import Memory

    def given(**options: int | None) -> dict[str, int]:
        return {name: value for name, value in options.items() if value is not None}

    kmeans = given(clusters=clusters, sample=sample, iterations=iterations)
    merge = given(neighbours=neighbours)
    if greedy_merge == bool(kmeans) or (merge and not greedy_merge):
        raise NearestError(
            "give either --clusters (with --sample, --iterations) or --greedy-merge (with "
            "--neighbours)"
        )
    if not greedy_merge and clusters is None:
        raise NearestError("k-means needs a number of clusters: give --clusters")
    with reports.live_progress(err) as progress:
        cluster_memory(memory, GreedyMerge(**merge) if greedy_merge else KMeans(**kmeans), progress)
    show_info(Memory.open(memory), as_json)


@app.command()
@explained
def compress(
    memory: MemoryPath,
    keys: Annotated[
        str | None, typer.Option(help="int8, or pqM: M bytes a key (product quantisation).")
    ] = None,
    pca: Annotated[int | None, typer.Option(help="Dimensions to keep.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join near entries of the same value into one.")
    ] = False,
    neighbours: Annotated[
        int | None, typer.Option(help="Of each entry, to merge; 9 if not given.")
    ] = None,
    index: Annotated[
        str | None, typer.Option("--spec", help="Another index; the kind it has if not given.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Recall@100 to tune the index to; as before if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a memory's keys smaller, as a new generation; tune it again afterwards."""
    from nearest.memory.compress import Compression, compress_memory
    from nearest.memory.memory import Memory

    how = Compression(keys, pca, merge, neighbours, index, recall)
    with reports.live_progress(err) as progress:
        compress_memory(memory, how, progress)
    show_info(Memory.open(memory), as_json)


@app.command()
@explained
def tune(
    memory: MemoryPath,
    text: TextPaths,
    method: Annotated[
        Literal["knn", "retomaton", "suffix", "hybrid"], typer.Option(help="What to tune.")
    ] = "knn",
    gate: Annotated[
        Literal["none", "buckets", "meta-k", "adaptret", "mixture"],
        typer.Option(help="Train a gate in place of a fixed λ; hybrid always has its own."),
    ] = "none",
    model: ModelName = None,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    k: K = None,
    length_power: LengthPower = None,
    distances: Distances = None,
    min_knns: MinKnns = None,
    max_knns: MaxKnns = None,
    dedup: Dedup = None,
    matches: SuffixMatches = None,
    skip: Skip = None,
    guard: Guard = None,
    encoding_errors: Encoding = "strict",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find a method's λ, temperature and more on text not scored later; the memory keeps them.

    k is swept for knn, the length power for suffix, where they are not given. With --gate a gate is
    trained instead, and the method is then called knn+buckets, suffix+mixture and so on.
    """
    quiet_libraries()
    from nearest.corpus.documents import read_documents
    from nearest.verbs.tune import tune as tune_memory

    name = method if gate == "none" or method == "hybrid" else f"{method}+{gate}"
    opened, loaded, tokenizer = open_with_model(memory, model)
    with reports.live_progress(err) as progress:
        tuned = tune_memory(
            loaded,
            opened,
            read_documents(text, encoding_errors=encoding_errors),
            method=name,
            tokenizer=tokenizer,
            window=window,
            stride=stride,
            batch_size=batch_size,
            force=force,
            progress=progress,
            k=k,
            length_power=length_power,
            distances=distances,
            min_knns=min_knns,
            max_knns=max_knns,
            dedup=dedup,
            matches=matches,
            skip=skip,
            guard=guard,
        )
    if as_json:
        typer.echo(json.dumps({"method": name, **tuned.as_json()}))
    else:
        found = ", ".join(f"{key} {value}" for key, value in tuned.settings.of(name).items())
        out.print(
            f"{name}: nll {tuned.nll:.4f} (base {tuned.base_nll:.4f}) on {tuned.tokens:,} tokens "
            f"with {found}; stored"
        )


@app.command(name="eval")
@explained
def evaluate(
    memory: MemoryPath,
    text: TextPaths,
    method: Annotated[
        str,
        typer.Option(
            help="base, knn, retomaton, suffix, hybrid, knn+mixture …, or several with commas."
        ),
    ] = "base,knn",
    model: ModelName = None,
    lam: Lam = None,
    temperature: Temperature = None,
    length_power: LengthPower = None,
    k: K = None,
    distances: Distances = None,
    min_knns: MinKnns = None,
    max_knns: MaxKnns = None,
    dedup: Dedup = None,
    matches: SuffixMatches = None,
    skip: Skip = None,
    guard: Guard = None,
    window: Window = None,
    stride: Stride = None,
    score_eos: ScoreEos = False,
    batch_size: BatchSize = None,
    encoding_errors: Encoding = "strict",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well text is predicted, by the base model and with the memory."""
    quiet_libraries()
    from nearest.corpus.documents import read_documents
    from nearest.verbs.evaluate import evaluate as evaluate_memory

    opened, loaded, tokenizer = open_with_model(memory, model)
    with reports.live_progress(err) as progress:
        results = evaluate_memory(
            loaded,
            opened,
            read_documents(text, encoding_errors=encoding_errors),
            _with_commas(method),
            tokenizer=tokenizer,
            window=window,
            stride=stride,
            score_eos=score_eos,
            batch_size=batch_size,
            force=force,
            progress=progress,
            lam=lam,
            temperature=temperature,
            length_power=length_power,
            k=k,
            distances=distances,
            min_knns=min_knns,
            max_knns=max_knns,
            dedup=dedup,
            matches=matches,
            skip=skip,
            guard=guard,
        )
    if as_json:
        for result in results:
            typer.echo(json.dumps(result.as_json()))
    else:
        out.print(reports.results_table(results))


@app.command()
@explained
def sweep(
    memory: MemoryPath,
    text: TextPaths,
    out_path: Annotated[
        Path, typer.Option("--out", help="Folder for sweep.csv, sweep.png and sweep.html.")
    ],
    methods: Annotated[
        str | None,
        typer.Option(help="With commas: knn, retomaton …; what was tuned when not given."),
    ] = None,
    min_knns: Annotated[
        str | None, typer.Option(help="Values of RetoMaton, with commas: 1,2,5,20,100,inf.")
    ] = None,
    skip: Annotated[
        str | None, typer.Option(help="Values of search gates, with commas: 0,.25,.5,.75,.9,1.")
    ] = None,
    published: Annotated[
        str, typer.Option(help="Draw published curves too: wikitext-103, law-mt, or both.")
    ] = "",
    model: ModelName = None,
    window: Window = None,
    stride: Stride = None,
    score_eos: ScoreEos = False,
    batch_size: BatchSize = None,
    encoding_errors: Encoding = "strict",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw perplexity against saved searches and against time, for every method.

    The model reads the text once, and each dense search is made once for all.
    """
    quiet_libraries()
    from nearest.corpus.documents import read_documents
    from nearest.pages.published import published_named
    from nearest.pages.sweep import check_folder, write_report
    from nearest.verbs.sweep import sweep as sweep_memory

    beside = published_named(_with_commas(published))
    values = {"min_knns": _numbers(min_knns, "min-knns"), "skip": _numbers(skip, "skip")}
    check_folder(out_path)
    opened, loaded, tokenizer = open_with_model(memory, model)
    with reports.live_progress(err) as progress:
        swept = sweep_memory(
            loaded,
            opened,
            read_documents(text, encoding_errors=encoding_errors),
            None if methods is None else _with_commas(methods),
            tokenizer=tokenizer,
            window=window,
            stride=stride,
            score_eos=score_eos,
            batch_size=batch_size,
            force=force,
            progress=progress,
            **values,
        )
    write_report(out_path, swept, opened, beside)
    if as_json:
        for point in swept.points:
            typer.echo(json.dumps(point.as_json()))
    else:
        out.print(reports.sweep_table(swept.points))
    err.print(f"see {escape(str(out_path / 'sweep.html'))}", soft_wrap=True)


@app.command()
@explained
def generate(
    memory: MemoryPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    method: Annotated[
        str, typer.Option(help="base, knn, retomaton, suffix, hybrid, knn+mixture …")
    ] = "knn",
    sources: Annotated[bool, typer.Option("--sources", help="Name the documents used.")] = False,
    model: ModelName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 60,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams to search with.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    show: Annotated[int, typer.Option(min=1, help="Documents to show at most.")] = 5,
    lam: Lam = None,
    temperature: Temperature = None,
    length_power: LengthPower = None,
    k: K = None,
    distances: Distances = None,
    min_knns: MinKnns = None,
    max_knns: MaxKnns = None,
    dedup: Dedup = None,
    matches: SuffixMatches = None,
    skip: Skip = None,
    guard: Guard = None,
    replay: Annotated[
        str, typer.Option(help='Positions of the prompt to look up before the last, or "full".')
    ] = "0",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt; with --sources, shade each token by how much the memory decided it."""
    quiet_libraries()
    import torch

    from nearest.verbs.generate import generate as continue_prompt

    opened, loaded, tokenizer = open_with_model(memory, model)
    torch.manual_seed(seed)
    options = {
        "lam": lam,
        "temperature": temperature,
        "length_power": length_power,
        "k": k,
        "distances": distances,
        "min_knns": min_knns,
        "max_knns": max_knns,
        "dedup": dedup,
        "matches": matches,
        "skip": skip,
        "guard": guard,
    }
    given = {name: value for name, value in options.items() if value is not None}
    generation = continue_prompt(
        loaded,
        tokenizer,
        opened,
        prompt,
        method=method,
        sources=sources,
        force=force,
        replay=int(replay) if replay.isdecimal() else replay,
        settings=given,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=sample,
    )
    if as_json:
        typer.echo(json.dumps(generation.as_json()))
    else:
        out.print(reports.shaded_generation(generation, show))


@app.command()
@explained
def demo(
    out_path: Annotated[
        Path, typer.Option("--out", help="Folder for the memory and report.")
    ] = Path("demo"),
) -> None:
    """The whole story offline, in minutes: build, tune, evaluate, generate, report.html."""
    quiet_libraries()
    from nearest.demo.run import run_demo

    run_demo(out_path, out, err)


def open_with_model(memory: Path, model: str | None) -> "tuple[Memory, PreTrainedModel, Any]":
    """Open a memory and load the model that built it, or the one named instead."""
    from nearest.encode.identity import load_model_and_tokenizer
    from nearest.memory.memory import Memory

    opened = Memory.open(memory)
    if not (model or opened.manifest.model.name):
        raise NearestError(
            f"{memory} does not say where its model is, for it was built from one in memory: "
            "name it (--model)"
        )
    return opened, *load_model_and_tokenizer(model or opened.manifest.model.name)


def _with_commas(text: str) -> list[str]:
    """The parts of a list that is written with commas."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in _with_commas(text)]
    except ValueError as error:
        raise NearestError(
            f"--{option} {text!r} is no list of numbers: write them with commas, as in 1,2,inf"
        ) from error


def show_info(memory: "Memory", as_json: bool) -> None:
    """Print what a memory holds."""
    if as_json:
        typer.echo(json.dumps(reports.memory_info(memory)))
    else:
        out.print(reports.info_table(memory))


def quiet_libraries() -> None:
    """Keep transformers' advice and progress bars out of the way of our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Entry point of the `nearest` command."""
    app()


if __name__ == "__main__":
    main()
