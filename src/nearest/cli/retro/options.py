"""Options that commands of `nearest retro` share, and how they are turned into what they name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearest.cli.app import out
from nearest.cli.options import Encoding, Spec

if TYPE_CHECKING:
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.data.stages import Databases, TableOptions
    from nearest.retro.data.table import NeighbourTable

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...", help="A memory; or files, folders, hf://owner/name\\[/config][:split]."
    ),
]
DatabasePath = Annotated[
    Path, typer.Argument(metavar="MEMORY", help="A memory whose documents are cut into chunks.")
]
OutPath = Annotated[
    Path | None, typer.Option("--out", help="The new memory; a memory holds its chunks itself.")
]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub name; a memory's own by default.")
]
EmbedderName = Annotated[
    str,
    typer.Option(
        "--embedder", help="A sentence-transformers model; bert:NAME and bert-cls:NAME pool a BERT."
    ),
]
PartOf = Annotated[str, typer.Option("--part", help="This process's share, as 2/4.")]
TablePath = Annotated[
    Path | None, typer.Option("--table", help="A table of neighbours; MEMORY/neighbours.")
]
Queries = Annotated[
    str | None,
    typer.Option("--queries", help="Whose chunks: a memory's or a corpus's; its own by default."),
]
More = Annotated[
    list[str] | None, typer.Option("--database", help="Search these too, as one; repeat or commas.")
]


@dataclass(frozen=True)
class Cutting:
    """How documents become chunks."""

    tokenizer: TokenizerName = None
    chunk_size: Annotated[int, typer.Option(help="Tokens a chunk.")] = 64
    start_token: Annotated[
        bool, typer.Option("--start-token", help="Begin each document with BOS or [CLS].")
    ] = False
    end_token: Annotated[
        bool, typer.Option(help="End each document with EOS or [SEP], where the tokenizer has one.")
    ] = True
    encoding_errors: Encoding = "strict"

    def cut(self, sources: list[str], out_path: Path | None) -> "ChunkDatabase":
        """The chunks of a memory, or of a corpus."""
        from nearest.retro.data.opening import chunk_sources

        return chunk_sources(
            sources,
            out_path,
            tokenizer=self.tokenizer,
            size=self.chunk_size,
            start=self.start_token,
            end=self.end_token,
            encoding_errors=self.encoding_errors,
        )


@dataclass(frozen=True)
class Embedding:
    """How texts of chunks become vectors."""

    prefix: Annotated[str, typer.Option(help="Put before each text that is embedded.")] = ""
    batch_size: Annotated[int, typer.Option(help="Texts embedded at once.")] = 64
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How vectors are stored.")
    ] = "float16"


@dataclass(frozen=True)
class Indexing:
    """How vectors are indexed."""

    index: Spec = "auto"
    recall: Annotated[float, typer.Option(help="Recall@4 that the index is searched to.")] = 0.95


@dataclass(frozen=True)
class Finding:
    """How neighbours are found, and what may be none."""

    neighbours: Annotated[int, typer.Option(help="Neighbours stored of each chunk.")] = 20
    method: Annotated[
        Literal["dense", "bm25", "rerank", "fusion"],
        typer.Option(help="By vectors, by words, by words among the nearest vectors, or by both."),
    ] = "dense"
    longest_run: Annotated[
        int,
        typer.Option(help="Strike out what shares so many tokens in a row with the query; 0: no."),
    ] = 0
    ngram: Annotated[
        int,
        typer.Option(help="Strike out near-duplicates by n-grams of this length (13); 0: no."),
    ] = 0
    jaccard: Annotated[float, typer.Option(help="From this similarity of n-grams on.")] = 0.8
    older: Annotated[
        bool,
        typer.Option("--older", help="Only neighbours older than the document, by their dates."),
    ] = False
    same_document: Annotated[
        bool, typer.Option(help="Keep neighbours from the query's own document and its copies.")
    ] = False

    def options(self) -> "TableOptions":
        """As `make_table` takes them."""
        from nearest.retro.data.filters import Filters
        from nearest.retro.data.stages import TableOptions

        filters = Filters(
            same_document=not self.same_document,
            longest_run=self.longest_run,
            ngram=self.ngram,
            jaccard=self.jaccard,
            dates="older" if self.older else "any",
        )
        return TableOptions(self.neighbours, self.method, filters)


def opened_databases(database: Path, more: list[str] | None) -> "Databases":
    """A database, and those named beside it, to be searched as one."""
    from nearest.retro.data.stages import Databases

    return Databases.open([database, *(part for name in more or () for part in name.split(","))])


def stored_table(own: "ChunkDatabase", table: Path | None) -> "tuple[NeighbourTable, TableOptions]":
    """A table, and the options that it was made with."""
    from nearest.retro.data.filters import Filters
    from nearest.retro.data.stages import TableOptions
    from nearest.retro.data.table import NeighbourTable

    stored = NeighbourTable.open(own.path / "neighbours" if table is None else table)
    record = stored.record
    filters = Filters(**record["filters"])
    return stored, TableOptions(record["neighbours"], record["method"], filters)


def counts_of(database: "ChunkDatabase") -> dict[str, Any]:
    """How much a database holds."""
    names = ("documents", "tokens", "chunks", "chunk_size")
    return {name: database.record[name] for name in names}


def report(told: dict[str, Any], as_json: bool) -> None:
    """Print what a command found, as one JSON object or a line for each name."""
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
        return
    for name, value in told.items():
        out.print(f"{name:>12}  {value}", markup=False)
