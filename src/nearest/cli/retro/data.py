"""The stages from documents to neighbours, each by itself or all in turn."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nearest import reports
from nearest.cli.app import err, quiet_libraries
from nearest.cli.options import AsJson, Device, Workers
from nearest.cli.retro.options import (
    Cutting,
    DatabasePath,
    EmbedderName,
    Embedding,
    Finding,
    Indexing,
    More,
    OutPath,
    PartOf,
    Queries,
    Sources,
    TablePath,
    TokenizerName,
    counts_of,
    opened_databases,
    report,
)
from nearest.errors import NearestError
from nearest.progress import Progress

if TYPE_CHECKING:
    from nearest.retro.data.database import ChunkDatabase, Part
    from nearest.retro.data.stages import TableOptions
    from nearest.retro.data.table import NeighbourTable
    from nearest.retro.data.workers import EmbedSpec


def chunks(
    sources: Sources, *, out_path: OutPath = None, cutting: Cutting, as_json: AsJson = False
) -> None:
    """Cut documents into chunks, without embedding them."""
    quiet_libraries()
    report(counts_of(cutting.cut(sources, out_path)), as_json)


def embed(
    database: DatabasePath,
    embedder: EmbedderName,
    *,
    tokenizer: TokenizerName = None,
    embedding: Embedding,
    part: PartOf = "1/1",
    sharing: Workers,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a vector for each chunk; a run that was stopped goes on."""
    quiet_libraries()
    from nearest.build.files import by_workers
    from nearest.build.workers import reached
    from nearest.retro.data.database import ChunkDatabase, Part
    from nearest.retro.data.embedders import embedder_named
    from nearest.retro.data.opening import decoder, tokenizer_of

    opened = ChunkDatabase.open(database)
    named = embedder_named(
        embedder, prefix=embedding.prefix, device=device, batch_size=embedding.batch_size
    )
    decode = decoder(tokenizer_of(opened, tokenizer))
    share = Part.named(part)
    spec = _embed_spec(embedder, tokenizer, embedding, share, device, sharing)
    with reached(spec, sharing.ray), reports.live_progress(err) as progress:
        maker = by_workers(opened.path, spec, **vars(sharing))
        whole = opened.embed(
            named, decode, dtype=embedding.dtype, part=share, maker=maker, progress=progress
        )
    report({"embedded": whole, "part": part, **asdict(named.identity)}, as_json)


def index(
    database: DatabasePath, *, indexing: Indexing, sharing: Workers, as_json: AsJson = False
) -> None:
    """Make an index of the vectors, and measure its recall@4."""
    from nearest.retro.data.database import ChunkDatabase

    opened = ChunkDatabase.open(database)
    with reports.live_progress(err) as progress:
        made = opened.build_index(
            indexing.index, indexing.recall, progress=progress, **vars(sharing)
        )
    report(made.to_dict(), as_json)


def neighbours(
    database: DatabasePath,
    *,
    more: More = None,
    queries: Queries = None,
    out_path: TablePath = None,
    finding: Finding,
    part: PartOf = "1/1",
    sharing: Workers,
    tokenizer: TokenizerName = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the neighbours of every chunk of a database, or of another corpus."""
    quiet_libraries()
    from nearest.retro.data.database import Part
    from nearest.retro.data.opening import query_database

    searched = opened_databases(database, more)
    own, first = None, searched.databases[0]
    if queries is not None:
        if out_path is None:
            raise NearestError("neighbours of another corpus need a folder: give --table FOLDER")
        own = query_database(
            queries,
            first,
            out_path.with_name(out_path.name + ".queries"),
            dense=finding.method != "bm25",
            tokenizer=tokenizer,
            device=device,
        )
    with reports.live_progress(err) as progress:
        table = _table(
            searched.databases,
            own,
            out_path,
            finding.options(),
            Part.named(part),
            sharing,
            progress,
        )
    if table is None:
        report({"part": part, "complete": False}, as_json)
    else:
        report({"part": part, "complete": True, **table.record["counts"]}, as_json)


def prepare(
    sources: Sources,
    embedder: EmbedderName,
    *,
    out_path: OutPath = None,
    cutting: Cutting,
    embedding: Embedding,
    indexing: Indexing,
    finding: Finding,
    sharing: Workers,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Cut, embed, index and find neighbours; a run that was stopped goes on where it was."""
    quiet_libraries()
    from nearest.build.files import by_workers
    from nearest.build.workers import reached
    from nearest.retro.data.database import Part
    from nearest.retro.data.embedders import embedder_named
    from nearest.retro.data.opening import decoder, tokenizer_of

    options = finding.options()
    named = embedder_named(
        embedder, prefix=embedding.prefix, device=device, batch_size=embedding.batch_size
    )
    spec = _embed_spec(embedder, cutting.tokenizer, embedding, Part(), device, sharing)
    with reached(spec, sharing.ray), reports.live_progress(err) as progress:
        made = cutting.cut(sources, out_path)
        decode = decoder(tokenizer_of(made, cutting.tokenizer))
        maker = by_workers(made.path, spec, **vars(sharing))
        made.embed(named, decode, dtype=embedding.dtype, maker=maker, progress=progress)
        if not made.indexed:
            made.build_index(indexing.index, indexing.recall, **vars(sharing))
        table = _table([made], None, None, options, Part(), sharing, progress)
    counts = {} if table is None else table.record["counts"]
    report({**counts_of(made), **made.index.to_dict(), **counts}, as_json)


def _embed_spec(
    embedder: str,
    tokenizer: str | None,
    embedding: Embedding,
    part: "Part",
    device: str,
    sharing: Workers,
) -> "EmbedSpec":
    """What workers that embed are told."""
    from nearest.build.workers import threads_of
    from nearest.encode.dtype import chosen_device
    from nearest.retro.data.workers import EmbedSpec

    return EmbedSpec(
        embedder=embedder,
        prefix=embedding.prefix,
        device=device,
        batch_size=embedding.batch_size,
        tokenizer=tokenizer,
        dtype=embedding.dtype,
        part=(part.number, part.count),
        threads=threads_of(**vars(sharing)),
        gpus=int(chosen_device(device).type == "cuda"),
    )


def _table(
    databases: "Sequence[ChunkDatabase]",
    queries: "ChunkDatabase | None",
    path: Path | None,
    options: "TableOptions",
    part: "Part",
    sharing: Workers,
    progress: Progress,
) -> "NeighbourTable | None":
    """A table, made by this process or by workers; None while other parts are missing."""
    from nearest.build.files import by_workers
    from nearest.build.workers import reached, threads_of
    from nearest.retro.data.stages import make_table, table_folder
    from nearest.retro.data.workers import NeighboursSpec

    spec = NeighboursSpec(
        databases=[str(one.path.resolve()) for one in databases],
        queries=None if queries is None else str(queries.path.resolve()),
        options=options,
        part=(part.number, part.count),
        threads=threads_of(**vars(sharing)),
    )
    maker = by_workers(table_folder(databases, queries, path), spec, **vars(sharing))
    with reached(spec, sharing.ray):
        return make_table(
            databases, queries, path, options, part=part, maker=maker, progress=progress
        )
