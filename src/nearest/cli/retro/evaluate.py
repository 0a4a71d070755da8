"""`nearest retro eval` and `analyse`: whether neighbours help, and where."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from nearest import reports
from nearest.cli.app import err, out, quiet_libraries
from nearest.cli.options import AsJson, with_commas
from nearest.cli.retro.options import DatabasePath, More, Queries
from nearest.cli.retro.reading import (
    ModelPath,
    OpeningRetro,
    Readings,
    Subset,
    TextTables,
    Windows,
    check_tokenizers,
    dataset_of_text,
    decoder_of,
    opened_texts,
)
from nearest.errors import ModelError, NearestError

if TYPE_CHECKING:
    from nearest.retro.evaluation.evaluate import RetroResult


def evaluate(
    model: ModelPath,
    database: DatabasePath,
    *,
    texts: TextTables = None,
    more: More = None,
    queries: Queries = None,
    readings: Readings = "on,off",
    as_code: Annotated[
        Literal["norlund"] | None,
        typer.Option(
            "--as",
            help="Give that public code's figure: the first --window tokens of each document.",
        ),
    ] = None,
    subset: Subset = None,
    windows: Windows,
    opening: OpeningRetro,
    as_json: AsJson = False,
) -> None:
    """Perplexity of texts with their neighbours, without, and with fewer or wrong ones."""
    quiet_libraries()
    from nearest.retro.evaluation.evaluate import evaluate_retro

    opened = opened_texts(database, more, texts, queries)
    loaded, tokenizer = opening.load(model)
    results: list[RetroResult] = []
    for text in opened:
        check_tokenizers(tokenizer, text)
        with reports.live_progress(err) as progress:
            results += evaluate_retro(
                loaded,
                dataset_of_text(text, subset),
                text.table,
                with_commas(readings),
                text=text.name,
                decode=decoder_of(tokenizer, text),
                first_only=as_code == "norlund",
                progress=progress,
                **windows.options(),
            )
    if as_json:
        for result in results:
            typer.echo(json.dumps(result.to_dict()))
    else:
        out.print(_table(results))


def analyse(
    model: ModelPath,
    database: DatabasePath,
    out_path: Annotated[Path, typer.Option("--out", help="Folder for page, figure and tables.")],
    *,
    texts: TextTables = None,
    more: More = None,
    queries: Queries = None,
    readings: Readings = "on,off",
    subset: Subset = None,
    windows: Windows,
    opening: OpeningRetro,
    as_json: AsJson = False,
) -> None:
    """Losses by what a text shares with its neighbours: does retrieval help, or the text leak?"""
    quiet_libraries()
    from nearest.pages.overlap import check_folder, chunk_row, token_row, write_report
    from nearest.retro.analysis.analyse import analyse as analyse_text

    check_folder(out_path)
    opened = opened_texts(database, more, texts, queries)
    if len(opened) > 1:
        raise NearestError("one text is analysed at a time: give one --text")
    (text,) = opened
    loaded, tokenizer = opening.load(model)
    check_tokenizers(tokenizer, text)
    decode = decoder_of(tokenizer, text)
    if decode is None:
        raise ModelError(
            f"neither {model} nor {text.own.path} has its tokenizer, without which no bytes are "
            "counted: save one into the model's folder"
        )
    with reports.live_progress(err) as progress:
        found = analyse_text(
            loaded,
            dataset_of_text(text, subset),
            text.table,
            decode,
            readings=with_commas(readings),
            progress=progress,
            **windows.options(),
        )
    write_report(out_path, found, str(model), text.name)
    if as_json:
        for row in map(chunk_row, found.by_share()):
            typer.echo(json.dumps({"by": "share", **row}))
        for row in map(token_row, found.by_match()):
            typer.echo(json.dumps({"by": "match", **row}))
    else:
        out.print(f"{out_path / 'overlap.html'}", markup=False)


def _table(results: "list[RetroResult]") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("text")
    table.add_column("reading")
    for name in ("tokens", "perplexity", "bits a byte", "nll", "difference", "95 % interval"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result.text,
            result.reading,
            f"{result.tokens:,}",
            f"{result.ppl:.3f}",
            _number(result.bpb, ".4f"),
            f"{result.nll:.4f}",
            _number(result.delta_nll, "+.4f"),
            ""
            if result.delta_low is None or result.delta_high is None
            else f"{result.delta_low:+.4f} … {result.delta_high:+.4f}",
        )
    return table


def _number(value: float | None, spec: str) -> Any:
    return "" if value is None else format(value, spec)
