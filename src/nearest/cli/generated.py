"""What `eval --generate` and `tune --by` do: let the model write, and score what it wrote."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearest import reports
from nearest.cli.app import err, out, tuned_and_stored
from nearest.cli.options import with_commas
from nearest.cli.output import check_place
from nearest.errors import SettingError

if TYPE_CHECKING:
    from nearest.corpus.reading import Corpus
    from nearest.memory import Memory
    from nearest.verbs.evaluate_generated import GeneratedResult


@dataclass(frozen=True)
class Generating:
    """How texts are written to be scored."""

    generate: Annotated[
        bool,
        typer.Option(
            "--generate", help="Let the model write a text for each encoder text, and score that."
        ),
    ] = False
    metrics: Annotated[
        str, typer.Option(help="Of --generate, with commas: bleu, chrf, rouge, exact.")
    ] = "bleu,chrf,exact"
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Of --generate: most tokens of a text.")
    ] = 128
    num_beams: Annotated[int, typer.Option(min=1, help="Of --generate: beams of beam search.")] = 1
    written: Annotated[
        Path | None,
        typer.Option(help="Of --generate: JSON Lines file for what each method wrote."),
    ] = None

    def check(self) -> None:
        """Refuse a place that texts cannot be written to, before anything is computed.

        Raises:
            NearestError: there is no such folder, or nothing is to be written.
        """
        if self.written is None:
            return
        if not self.generate:
            raise SettingError("--written is for what --generate writes: add that, or leave it out")
        check_place(self.written)


@dataclass(frozen=True)
class TuningBy:
    """What settings are judged by."""

    by: Annotated[
        Literal["nll", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact"],
        typer.Option(help="Judge settings by the loss of the text, or by what the model writes."),
    ] = "nll"
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Of --by bleu and its like: most tokens of a text.")
    ] = 128
    num_beams: Annotated[
        int, typer.Option(min=1, help="Of --by bleu and its like: beams of beam search.")
    ] = 1


def tune_by(
    tuning: TuningBy,
    model: Any,
    tokenizer: Any,
    memory: "Memory",
    texts: "Corpus",
    method: str,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Tune a method by what the model writes, and print what was found."""
    from nearest.verbs.tune_generated import tune_generated

    with reports.live_progress(err) as progress:
        tuning_run = partial(
            tune_generated,
            model,
            memory,
            texts,
            method=method,
            metric=tuning.by,
            max_new_tokens=tuning.max_new_tokens,
            num_beams=tuning.num_beams,
            tokenizer=tokenizer,
            progress=progress,
            **options,
        )
        tuned = tuned_and_stored(memory, tuning_run)
    if as_json:
        typer.echo(json.dumps({"method": method, **tuned.to_dict()}))
        return
    found = ", ".join(f"{key} {value}" for key, value in tuned.settings.of(method).items())
    out.print(
        f"{method}: {tuned.metric} {tuned.score:.2f} (base {tuned.base_score:.2f}) of "
        f"{len(tuned.tried)} settings, with {found}; stored"
    )


def refuse_beside(option: str, **others: Any) -> None:
    """Refuse options of given texts beside one that lets the model write (SettingError)."""
    for name, value in others.items():
        if value not in (None, False, []):
            raise SettingError(
                f"--{name.replace('_', '-')} is of texts that are given, and {option} judges what "
                "the model writes: leave one of them out"
            )


def evaluate_written(
    generating: Generating,
    model: Any,
    tokenizer: Any,
    memories: "list[Memory]",
    texts: "Corpus",
    methods: Sequence[str],
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Score what each method writes, print it and keep it where that was asked for."""
    from nearest.verbs.evaluate_generated import evaluate_generated

    with reports.live_progress(err) as progress:
        results = evaluate_generated(
            model,
            memories,
            texts,
            methods,
            metrics=with_commas(generating.metrics),
            max_new_tokens=generating.max_new_tokens,
            num_beams=generating.num_beams,
            tokenizer=tokenizer,
            progress=progress,
            **options,
        )
    if generating.written is not None:
        _write(generating.written, results)
    if as_json:
        for result in results:
            typer.echo(json.dumps(result.to_dict()))
    else:
        out.print(reports.generated_table(results))


def _write(path: Path, results: "list[GeneratedResult]") -> None:
    """One object a document: its id, encoder text and reference, and each method's text."""
    from nearest.folder import disk_errors_explained, whole_file

    pairs = results[0].pairs
    with disk_errors_explained(path.parent), whole_file(path) as file:
        rows = zip(pairs.ids, pairs.encoder_texts, pairs.references, strict=True)
        for n, (name, encoder_text, reference) in enumerate(rows):
            texts = {result.method: result.texts[n] for result in results}
            row = {"id": name, "encoder_text": encoder_text, "reference": reference}
            file.write(json.dumps(row | {"texts": texts}, ensure_ascii=False).encode() + b"\n")
