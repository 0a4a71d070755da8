"""The stages from documents to neighbours, each by itself or all in turn."""

from dataclasses import asdict

from nearest import reports
from nearest.cli.app import err, quiet_libraries
from nearest.cli.options import AsJson, Device
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
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a vector for each chunk; a run that was stopped goes on."""
    quiet_libraries()
    from nearest.retro.data.database import ChunkDatabase, Part
    from nearest.retro.data.embedders import embedder_named
    from nearest.retro.data.opening import decoder, tokenizer_of

    opened = ChunkDatabase.open(database)
    named = embedder_named(
        embedder, prefix=embedding.prefix, device=device, batch_size=embedding.batch_size
    )
    decode = decoder(tokenizer_of(opened, tokenizer))
    with reports.live_progress(err) as progress:
        whole = opened.embed(
            named, decode, dtype=embedding.dtype, part=Part.named(part), progress=progress
        )
    report({"embedded": whole, "part": part, **asdict(named.identity)}, as_json)


def index(database: DatabasePath, *, indexing: Indexing, as_json: AsJson = False) -> None:
    """Make an index of the vectors, and measure its recall@4."""
    from nearest.retro.data.database import ChunkDatabase

    made = ChunkDatabase.open(database).build_index(indexing.spec, indexing.recall)
    report(asdict(made.record), as_json)


def neighbours(
    database: DatabasePath,
    *,
    more: More = None,
    queries: Queries = None,
    out_path: TablePath = None,
    finding: Finding,
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
        table = make_table(
            searched.databases,
            own,
            out_path,
            finding.options(),
            part=Part.named(part),
            progress=progress,
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
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Cut, embed, index and find neighbours; a run that was stopped goes on where it was."""
    quiet_libraries()
    from nearest.retro.data.embedders import embedder_named
    from nearest.retro.data.opening import decoder, tokenizer_of
    from nearest.retro.data.stages import make_table

    options = finding.options()
    named = embedder_named(
        embedder, prefix=embedding.prefix, device=device, batch_size=embedding.batch_size
    )
    made = cutting.cut(sources, out_path)
    decode = decoder(tokenizer_of(made, cutting.tokenizer))
    with reports.live_progress(err) as progress:
        made.embed(named, decode, dtype=embedding.dtype, progress=progress)
        if not made.indexed:
            made.build_index(indexing.spec, indexing.recall)
        table = make_table(made, None, None, options, progress=progress)
    counts = {} if table is None else table.record["counts"]
    report({**counts_of(made), **asdict(made.index.record), **counts}, as_json)
