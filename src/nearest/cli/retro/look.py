"""What a database and its table of neighbours hold, and whether they still do."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearest.cli.app import out, quiet_libraries
from nearest.cli.options import AsJson
from nearest.cli.output import check_place
from nearest.cli.retro.options import (
    DatabasePath,
    More,
    Queries,
    TablePath,
    TokenizerName,
    counts_of,
    opened_databases,
    report,
    stored_table,
)
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.retro.data.database import ChunkDatabase


def show(
    database: DatabasePath,
    *,
    document: Annotated[
        str | None, typer.Option(help="Id or number of a document to look at.")
    ] = None,
    more: More = None,
    queries: Queries = None,
    table: TablePath = None,
    neighbours: Annotated[int, typer.Option(help="Neighbours shown of each chunk.")] = 2,
    tokenizer: TokenizerName = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a database holds; or show a document's chunks with their neighbours."""
    quiet_libraries()
    if html is not None:
        check_place(html)
    from nearest.folder import disk_errors_explained, write_atomically
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.data.opening import decoder, tokenizer_of
    from nearest.retro.data.show import as_html, document_number, shown_chunks

    searched = opened_databases(database, more)
    own = searched.databases[0] if queries is None else ChunkDatabase.open(queries)
    if document is None:
        report(_described(own, table), as_json)
        return
    stored, options = stored_table(own, table)
    number = document_number(own.chunks, document)
    decode = decoder(tokenizer_of(own, tokenizer))
    listed = shown_chunks(number, own, searched, stored, options, decode, neighbours)
    if html is not None:
        with disk_errors_explained(html.parent):
            write_atomically(html, as_html(own.chunks.name(number), listed).encode())
        return
    for chunk in listed:
        if as_json:
            typer.echo(json.dumps(asdict(chunk), ensure_ascii=False))
            continue
        out.print(f"chunk {chunk.number}: {chunk.text}", markup=False)
        for shown in [*chunk.neighbours, *chunk.struck]:
            why = f", struck out: {shown.reason}" if shown.reason else ""
            where = f"  {shown.document} at {shown.position}, {shown.distance:.3f}{why}"
            out.print(f"{where}\n    {shown.text} → {shown.continuation}", markup=False)


def verify(
    database: DatabasePath,
    *,
    more: More = None,
    queries: Queries = None,
    table: TablePath = None,
    sample: Annotated[float, typer.Option(help="Share of the table that is made again.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Check files against their checksums, and search a sample of the neighbours again."""
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.data.stages import differing_rows

    searched = opened_databases(database, more)
    own = None if queries is None else ChunkDatabase.open(queries)
    checked = [*searched.databases, *([] if own is None else [own])]
    problems = [f"{d.path}: {problem}" for d in checked for problem in d.problems()]
    folder = table or (own or searched.databases[0]).path / "neighbours"
    if not problems and (table is not None or folder.exists()):
        stored, options = stored_table(own or searched.databases[0], table)
        wrong = differing_rows(stored, searched.databases, own, options, sample)
        if wrong:
            problems.append(f"{folder}: other neighbours for {len(wrong)} chunks, as {wrong[:5]}")
    report({"problems": problems}, as_json)
    if problems:
        raise typer.Exit(1)


def _described(database: "ChunkDatabase", table: Path | None) -> dict[str, Any]:
    """What is there; a stage that is not made yet is left out."""
    told = counts_of(database)
    parts: dict[str, Callable[[], Any]] = {
        "embedder": lambda: asdict(database.embedder),
        "index": lambda: database.index.to_dict(),
        "neighbours": lambda: stored_table(database, table)[0].record["counts"],
    }
    for name, of in parts.items():
        try:
            told[name] = of()
        except NearestError:
            continue
    return told
