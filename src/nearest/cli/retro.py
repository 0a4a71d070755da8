"""`nearest retro`: from documents to neighbours of every chunk, and weights of public models."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearest import reports
from nearest.cli.app import Command, err, out, quiet_libraries
from nearest.cli.options import AsJson, Device, Encoding
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.data.stages import Databases, TableOptions
    from nearest.retro.data.table import NeighbourTable

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="A memory; or files, folders, hf://owner/name."),
]
DatabasePath = Annotated[
    Path, typer.Argument(metavar="DATABASE", help="A database of chunks, or the memory beside it.")
]
OutPath = Annotated[Path, typer.Option("--out", help="The new folder.")]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub name; a memory's own by default.")
]
ChunkSize = Annotated[int, typer.Option(help="Tokens a chunk.")]
StartToken = Annotated[
    bool, typer.Option("--start-token", help="Begin each document with BOS or [CLS].")
]
EndToken = Annotated[
    bool, typer.Option(help="End each document with EOS or [SEP], where the tokenizer has one.")
]
EmbedderName = Annotated[
    str,
    typer.Option(
        "--embedder", help="A sentence-transformers model; bert:NAME and bert-cls:NAME pool a BERT."
    ),
]
Prefix = Annotated[str, typer.Option(help="Put before each text that is embedded.")]
BatchSize = Annotated[int, typer.Option(help="Texts embedded at once.")]
VectorDtype = Annotated[Literal["float16", "float32"], typer.Option(help="How vectors are stored.")]
PartOf = Annotated[str, typer.Option("--part", help="This process's share, as 2/4.")]
Spec = Annotated[str, typer.Option(help='"auto", "exact", or a FAISS index_factory string.')]
Recall = Annotated[float, typer.Option(help="Recall@4 that the index is searched to.")]
Neighbours = Annotated[int, typer.Option(help="Neighbours stored of each chunk.")]
MethodName = Annotated[
    Literal["dense", "bm25", "rerank", "fusion"],
    typer.Option(help="By vectors, by words, by words among the nearest vectors, or by both."),
]
LongestRun = Annotated[
    int, typer.Option(help="Strike out what shares so many tokens in a row with the query; 0: no.")
]
Ngram = Annotated[
    int, typer.Option(help="Strike out near-duplicates by n-grams of this length (13); 0: no.")
]
Jaccard = Annotated[float, typer.Option(help="From this similarity of n-grams on.")]
Older = Annotated[
    bool, typer.Option("--older", help="Only neighbours older than the document, by their dates.")
]
SameDocument = Annotated[
    bool, typer.Option(help="Keep neighbours from the query's own document and its copies.")
]
TablePath = Annotated[
    Path | None, typer.Option("--table", help="A table of neighbours; DATABASE/neighbours.")
]
Queries = Annotated[
    str | None,
    typer.Option("--queries", help="Whose chunks: a database, memory, corpus; or its own."),
]
More = Annotated[
    list[str] | None, typer.Option("--database", help="Search these too, as one; repeat or commas.")
]


def chunks(
    sources: Sources,
    out_path: OutPath,
    *,
    tokenizer: TokenizerName = None,
    chunk_size: ChunkSize = 64,
    start_token: StartToken = False,
    end_token: EndToken = True,
    encoding_errors: Encoding = "strict",
    as_json: AsJson = False,
) -> None:
    """Cut documents into chunks, without embedding them."""
    quiet_libraries()
    from nearest.retro.data.opening import chunk_sources

    made = chunk_sources(
        sources,
        out_path,
        tokenizer=tokenizer,
        size=chunk_size,
        start=start_token,
        end=end_token,
        encoding_errors=encoding_errors,
    )
    _report(_counts(made), as_json)


def embed(
    database: DatabasePath,
    embedder: EmbedderName,
    *,
    tokenizer: TokenizerName = None,
    prefix: Prefix = "",
    batch_size: BatchSize = 64,
    dtype: VectorDtype = "float16",
    part: PartOf = "1/1",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a vector for each chunk; a run that was stopped goes on."""
    quiet_libraries()
    from nearest.retro.data.database import Part
    from nearest.retro.data.embedders import embedder_named
    from nearest.retro.data.opening import decoder, open_database, tokenizer_of

    opened = open_database(database)
    named = embedder_named(embedder, prefix=prefix, device=device, batch_size=batch_size)
    decode = decoder(tokenizer_of(opened, tokenizer))
    with reports.live_progress(err) as progress:
        whole = opened.embed(named, decode, dtype=dtype, part=Part.named(part), progress=progress)
    _report({"embedded": whole, "part": part, **asdict(named.identity)}, as_json)


def index(
    database: DatabasePath,
    *,
    spec: Spec = "auto",
    recall: Recall = 0.95,
    as_json: AsJson = False,
) -> None:
    """Make an index of the vectors, and measure its recall@4."""
    from nearest.retro.data.opening import open_database

    made = open_database(database).build_index(spec, recall)
    _report(asdict(made.record), as_json)


def neighbours(
    database: DatabasePath,
    *,
    more: More = None,
    queries: Queries = None,
    out_path: TablePath = None,
    neighbours: Neighbours = 20,
    method: MethodName = "dense",
    longest_run: LongestRun = 0,
    ngram: Ngram = 0,
    jaccard: Jaccard = 0.8,
    older: Older = False,
    same_document: SameDocument = False,
    part: PartOf = "1/1",
    tokenizer: TokenizerName = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the neighbours of every chunk of a database, or of another corpus."""
    quiet_libraries()
    from nearest.retro.data.database import Part
    from nearest.retro.data.opening import query_database
    from nearest.retro.data.stages import make_table

    options = _options(neighbours, method, longest_run, ngram, jaccard, older, same_document)
    searched = _databases(database, more)
    own, first = None, searched.databases[0]
    if queries is not None:
        if out_path is None:
            raise NearestError("neighbours of another corpus need a folder: give --table FOLDER")
        own = query_database(
            queries,
            first,
            out_path.with_name(out_path.name + ".queries"),
            dense=method != "bm25",
            tokenizer=tokenizer,
            device=device,
        )
    with reports.live_progress(err) as progress:
        table = make_table(
            searched.databases, own, out_path, options, part=Part.named(part), progress=progress
        )
    if table is None:
        _report({"part": part, "complete": False}, as_json)
    else:
        _report({"part": part, "complete": True, **table.record["counts"]}, as_json)


def prepare(
    sources: Sources,
    out_path: OutPath,
    embedder: EmbedderName,
    *,
    tokenizer: TokenizerName = None,
    chunk_size: ChunkSize = 64,
    start_token: StartToken = False,
    end_token: EndToken = True,
    encoding_errors: Encoding = "strict",
    prefix: Prefix = "",
    batch_size: BatchSize = 64,
    dtype: VectorDtype = "float16",
    spec: Spec = "auto",
    recall: Recall = 0.95,
    neighbours: Neighbours = 20,
    method: MethodName = "dense",
    longest_run: LongestRun = 0,
    ngram: Ngram = 0,
    jaccard: Jaccard = 0.8,
    older: Older = False,
    same_document: SameDocument = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Cut, embed, index and find neighbours; a run that was stopped goes on where it was."""
    quiet_libraries()
    from nearest.retro.data.embedders import embedder_named
    from nearest.retro.data.opening import chunk_sources, decoder, tokenizer_of
    from nearest.retro.data.stages import make_table

    options = _options(neighbours, method, longest_run, ngram, jaccard, older, same_document)
    named = embedder_named(embedder, prefix=prefix, device=device, batch_size=batch_size)
    made = chunk_sources(
        sources,
        out_path,
        tokenizer=tokenizer,
        size=chunk_size,
        start=start_token,
        end=end_token,
        encoding_errors=encoding_errors,
    )
    decode = decoder(tokenizer_of(made, tokenizer))
    with reports.live_progress(err) as progress:
        made.embed(named, decode, dtype=dtype, progress=progress)
        if not (made.path / "index.json").exists():
            made.build_index(spec, recall)
        table = make_table(made, None, None, options, progress=progress)
    counts = {} if table is None else table.record["counts"]
    _report({**_counts(made), **asdict(made.index.record), **counts}, as_json)


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
    from nearest.retro.data.opening import decoder, open_database, tokenizer_of
    from nearest.retro.data.show import as_html, document_number, shown_chunks

    searched = _databases(database, more)
    own = searched.databases[0] if queries is None else open_database(queries)
    if document is None:
        _report(_described(own, table), as_json)
        return
    stored, options = _stored(own, table)
    number = document_number(own.chunks, document)
    decode = decoder(tokenizer_of(own, tokenizer))
    listed = shown_chunks(number, own, searched, stored, options, decode, neighbours)
    if html is not None:
        html.write_text(as_html(own.chunks.name(number), listed), encoding="utf-8")
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
    from nearest.retro.data.opening import open_database
    from nearest.retro.data.stages import differing_rows

    searched = _databases(database, more)
    own = None if queries is None else open_database(queries)
    checked = [*searched.databases, *([] if own is None else [own])]
    problems = [f"{d.path}: {problem}" for d in checked for problem in d.problems()]
    folder = table or (own or searched.databases[0]).path / "neighbours"
    if not problems and folder.exists():
        stored, options = _stored(own or searched.databases[0], table)
        wrong = differing_rows(stored, searched.databases, own, options, sample)
        if wrong:
            problems.append(f"{folder}: other neighbours for {len(wrong)} chunks, as {wrong[:5]}")
    _report({"problems": problems}, as_json)
    if problems:
        raise typer.Exit(1)


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of either public implementation.")],
    *,
    out_path: Annotated[Path | None, typer.Option("--out", help="The model's new folder.")] = None,
    config: Annotated[Path | None, typer.Option(help="The checkpoint's retro.json.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether all weights are there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a public checkpoint into a folder for `RetroForCausalLM.from_pretrained`."""
    quiet_libraries()
    from nearest.retro.convert import model_of, read_retro_json

    if out_path is None and not check:
        raise NearestError("a converted model needs a folder: give --out FOLDER, or --check")
    model = model_of(checkpoint, None if config is None else read_retro_json(config))
    if out_path is not None and not check:
        model.save_pretrained(out_path)
    weights = sum(weight.numel() for weight in model.parameters())
    _report({"weights": weights, "missing": [], "surplus": []}, as_json)


def _options(
    neighbours: int,
    method: Any,
    longest_run: int,
    ngram: int,
    jaccard: float,
    older: bool,
    same_document: bool,
) -> "TableOptions":
    from nearest.retro.data.filters import Filters
    from nearest.retro.data.stages import TableOptions

    filters = Filters(
        same_document=not same_document,
        longest_run=longest_run,
        ngram=ngram,
        jaccard=jaccard,
        dates="older" if older else "any",
    )
    return TableOptions(neighbours, method, filters)


def _databases(database: Path, more: list[str] | None) -> "Databases":
    from nearest.retro.data.opening import open_database
    from nearest.retro.data.stages import Databases

    named = [part for name in more or () for part in name.split(",")]
    return Databases([open_database(path) for path in (str(database), *named)])


def _stored(own: "ChunkDatabase", table: Path | None) -> "tuple[NeighbourTable, TableOptions]":
    from nearest.retro.data.filters import Filters
    from nearest.retro.data.stages import TableOptions
    from nearest.retro.data.table import NeighbourTable

    stored = NeighbourTable.open(own.path / "neighbours" if table is None else table)
    record = stored.record
    filters = Filters(**record["filters"])
    return stored, TableOptions(record["neighbours"], record["method"], filters)


def _counts(database: "ChunkDatabase") -> dict[str, Any]:
    names = ("documents", "tokens", "chunks", "chunk_size")
    return {name: database.record[name] for name in names}


def _described(database: "ChunkDatabase", table: Path | None) -> dict[str, Any]:
    """What is there; a stage that is not made yet is left out."""
    told = _counts(database)
    parts: dict[str, Callable[[], Any]] = {
        "embedder": lambda: asdict(database.embedder),
        "index": lambda: asdict(database.index.record),
        "neighbours": lambda: _stored(database, table)[0].record["counts"],
    }
    for name, of in parts.items():
        try:
            told[name] = of()
        except NearestError:
            continue
    return told


def _report(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
        return
    for name, value in told.items():
        out.print(f"{name:>12}  {value}", markup=False)


COMMANDS: dict[str, Command] = {
    "prepare": prepare,
    "chunks": chunks,
    "embed": embed,
    "index": index,
    "neighbours": neighbours,
    "show": show,
    "verify": verify,
    "convert": convert,
}
