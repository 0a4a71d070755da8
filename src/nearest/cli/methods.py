"""Commands that tune, measure and draw methods on text."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from nearest import reports
from nearest.cli.app import (
    err,
    open_memory,
    open_with_model,
    opened_beside,
    out,
    quiet_libraries,
    say_settings,
    say_what_was_read,
    tuned_and_stored,
)
from nearest.cli.generated import (
    Generating,
    TuningBy,
    evaluate_written,
    refuse_beside,
    tune_by,
)
from nearest.cli.options import (
    AsJson,
    FileOptions,
    FixedSettings,
    LeaveOneOut,
    MemoryPath,
    MethodSettings,
    MoreMemories,
    Opening,
    PassageSettings,
    Reading,
    ScoreEos,
    Stream,
    TextPaths,
    Workers,
    given,
    numbers,
    with_commas,
)
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.memory import Memory


def tune(
    memory: MemoryPath,
    text: TextPaths,
    method: Annotated[
        str,
        typer.Option(
            help="knn, retomaton, suffix, hybrid, in-context+knn …, or several with commas, for "
            "which the text is read once."
        ),
    ] = "knn",
    gate: Annotated[
        Literal["none", "buckets", "meta-k", "adaptret", "mixture"],
        typer.Option(help="Train a gate in place of a fixed λ; hybrid always has its own."),
    ] = "none",
    *,
    opening: Opening,
    settings: FixedSettings,
    more: Annotated[
        list[Path] | None,
        typer.Option(
            "--memory",
            metavar="MEMORY",
            help="Find the weights of this one and the first, each used as tuned; repeatable.",
        ),
    ] = None,
    tuning: TuningBy,
    reading: Reading,
    files: FileOptions,
    leave_one_out: LeaveOneOut = False,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="MEMORY",
            help="Learn on from this memory's gate for the method: it needs less text then. "
            "hybrid has one that ships.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find a method's λ, temperature and more on text not scored later; the memory keeps them.

    k is swept for knn, the length power for suffix, where they are not given. With --gate a gate is
    trained instead, and the method is then called knn+buckets, suffix+mixture and so on. With --by
    bleu, chrf … what the model writes for each encoder text decides, not the text's probability.
    """
    quiet_libraries()
    from nearest.models.scoring import read_text
    from nearest.retrieval.settings import check_methods, settings_of
    from nearest.verbs.tune import settings_to_tune
    from nearest.verbs.tune import tune as tune_memory

    names = [
        one if gate == "none" or one.endswith("hybrid") else f"{one}+{gate}"
        for one in with_commas(method)
    ]
    by_text, options = tuning.by != "nll", given(**vars(settings))
    check_methods(names, options, has_memory=True)
    if (by_text or more) and len(names) > 1:
        raise NearestError(f"--by and --memory take one method, and {len(names)} are named")
    if by_text:
        windows = {"window": reading.window, "stride": reading.stride}
        others = {"leave_one_out": leave_one_out, "memory": more, "start": start, **windows}
        refuse_beside(f"--by {tuning.by}", **others)
    texts = files.corpus(text)
    opened, loaded, tokenizer = open_with_model(memory, opening)
    if by_text:
        options |= {"batch_size": reading.batch_size, "force": reading.force}
        tune_by(tuning, loaded, tokenizer, opened, texts, names[0], options, as_json=as_json)
        say_what_was_read(texts)
        return
    if more:
        if gate != "none" or leave_one_out or start is not None:
            raise NearestError(
                "weights of memories are found with each used as it was tuned: tune gates first, "
                "and leave --gate, --start and --leave-one-out out"
            )
        memories = opened_beside(opened, MoreMemories(more))
        options = {**vars(reading), **options}
        _tune_weights(loaded, tokenizer, memories, texts, names[0], options, as_json=as_json)
        say_what_was_read(texts)
        return
    for name in names:
        settings_to_tune(name, opened, settings_of(name, options))
    begin = None if start is None else open_memory(start)
    how = {"tokenizer": tokenizer, "leave_one_out": leave_one_out, **vars(reading)}
    with reports.live_progress(err) as progress:
        plain = [name for name in names if not name.startswith("in-context")]
        read: Any = texts
        if len(plain) > 1:
            read = read_text(loaded, opened, texts, progress=progress, **how)
        for name in names:
            tuning_run = partial(
                tune_memory,
                loaded,
                opened,
                read if name in plain else texts,
                method=name,
                start=begin,
                progress=progress,
                **how,
                **settings_of(name, options),
            )
            _say_tuned(name, tuned_and_stored(opened, tuning_run), as_json=as_json)
    say_what_was_read(texts)


def _say_tuned(name: str, tuned: Any, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"method": name, **tuned.to_dict()}))
        return
    found = ", ".join(f"{key} {value}" for key, value in tuned.settings.of(name).items())
    out.print(
        f"{name}: nll {tuned.nll:.4f} (base {tuned.base_nll:.4f}) on {tuned.tokens:,} tokens "
        f"with {found}; stored"
    )


def _tune_weights(
    model: Any,
    tokenizer: Any,
    memories: "list[Memory]",
    texts: Iterable[Any],
    method: str,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    from nearest.verbs.weights import tune_weights

    with reports.live_progress(err) as progress:
        tuned = tune_weights(
            model, memories, texts, method, tokenizer=tokenizer, progress=progress, **options
        )
    if as_json:
        typer.echo(json.dumps({"method": method, **asdict(tuned)}))
        return
    weights = ",".join(f"{weight:g}" for weight in tuned.weights)
    out.print(
        f"{method}: nll {tuned.nll:.4f} (base {tuned.base_nll:.4f}) on {tuned.tokens:,} tokens "
        f"with --weights {weights}"
    )


def evaluate(
    memory: MemoryPath,
    text: TextPaths,
    method: Annotated[
        str,
        typer.Option(
            help="base, knn, retomaton, suffix, hybrid, knn+mixture …, in-context, in-context+knn "
            "…, or several with commas."
        ),
    ] = "base,knn",
    *,
    opening: Opening,
    settings: MethodSettings,
    beside: MoreMemories,
    reading: Reading,
    files: FileOptions,
    score_eos: ScoreEos = False,
    leave_one_out: LeaveOneOut = False,
    stream: Stream = False,
    records: Annotated[
        Path | None, typer.Option(help="Parquet file for what each token was predicted with.")
    ] = None,
    sharing: Workers,
    generating: Generating,
    as_json: AsJson = False,
) -> None:
    """Measure how well text is predicted, by the base model and with the memory.

    With --generate the model writes a text for each encoder text (what an encoder reads, or a
    causal model's prompt), and BLEU, chrF and others compare it to the document's text.
    """
    quiet_libraries()
    from nearest.verbs.evaluate import evaluate as evaluate_memory

    generating.check()
    if generating.generate:
        refuse_beside(
            "--generate",
            score_eos=score_eos,
            leave_one_out=leave_one_out,
            stream=stream,
            records=records,
            window=reading.window,
            stride=reading.stride,
            **vars(sharing),
        )
    texts = files.corpus(text)
    opened, loaded, tokenizer = open_with_model(memory, opening)
    memories, methods = opened_beside(opened, beside), with_commas(method)
    say_settings(memories, methods)
    if generating.generate:
        options = {
            "weights": numbers(beside.weights, "weights", "0.7,0.3"),
            "batch_size": reading.batch_size,
            "force": reading.force,
            **settings.named(),
        }
        evaluate_written(
            generating, loaded, tokenizer, memories, texts, methods, options, as_json=as_json
        )
        say_what_was_read(texts)
        return
    with reports.live_progress(err) as progress:
        results = evaluate_memory(
            loaded,
            memories,
            texts,
            methods,
            weights=numbers(beside.weights, "weights", "0.7,0.3"),
            tokenizer=tokenizer,
            score_eos=score_eos,
            leave_one_out=leave_one_out,
            stream=stream,
            records=records,
            progress=progress,
            **vars(sharing),
            **vars(reading),
            **settings.named(),
        )
    if as_json:
        for result in results:
            typer.echo(json.dumps(result.to_dict()))
    else:
        out.print(reports.results_table(results))
    say_what_was_read(texts)
    for doubt in reports.doubts(results):
        err.print(f"[yellow]note:[/] {escape(doubt)}", soft_wrap=True)


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
    *,
    opening: Opening,
    reading: Reading,
    files: FileOptions,
    passages: PassageSettings,
    score_eos: ScoreEos = False,
    as_json: AsJson = False,
) -> None:
    """Draw perplexity against saved searches and against time, for every method.

    The model reads the text once, and each dense search is made once for all.
    """
    quiet_libraries()
    from nearest.pages.published import published_named
    from nearest.pages.sweep import check_folder, write_report
    from nearest.verbs.sweep import sweep as sweep_memory

    beside = published_named(with_commas(published))
    thresholds, fractions = (
        numbers(min_knns, "min-knns", "1,2,inf"),
        numbers(skip, "skip", "0,0.5,1"),
    )
    check_folder(out_path)
    texts = files.corpus(text)
    opened, loaded, tokenizer = open_with_model(memory, opening)
    with reports.live_progress(err) as progress:
        swept = sweep_memory(
            loaded,
            opened,
            texts,
            None if methods is None else with_commas(methods),
            tokenizer=tokenizer,
            score_eos=score_eos,
            progress=progress,
            **vars(reading),
            min_knns=thresholds,
            skip=fractions,
            **vars(passages),
        )
    write_report(out_path, swept, opened, beside)
    if as_json:
        for point in swept.points:
            typer.echo(json.dumps(point.to_dict()))
    else:
        out.print(reports.sweep_table(swept.points))
    say_what_was_read(texts)
    err.print(f"see {escape(str(out_path / 'sweep.html'))}", soft_wrap=True)
