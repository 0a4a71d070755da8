"""`nearest retro generate`: text written with neighbours that can be seen."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from nearest.cli.app import err, out, quiet_libraries
from nearest.cli.options import AsJson, Sampling, given, with_commas
from nearest.cli.retro.reading import ModelPath, OpeningRetro
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.writing import Written, WrittenChunk


@dataclass(frozen=True)
class NeighbourOrigin:
    """Where neighbours come from: one of these, or retrieval is off."""

    database: Annotated[
        list[str] | None,
        typer.Option(help="A database of chunks, or the memory beside it; repeat or commas."),
    ] = None
    neighbours_file: Annotated[
        Path | None, typer.Option(help="Passages, one a line: the neighbours of every chunk.")
    ] = None
    ask: Annotated[bool, typer.Option("--ask", help="You type the neighbours of each chunk.")] = (
        False
    )
    service: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a service (nearest serve --chunks); repeat or commas for more of the "
            "same chunks. Its key is read from NEAREST_API_KEY."
        ),
    ] = None
    method: Annotated[
        Literal["dense", "bm25", "rerank", "fusion"], typer.Option(help="How they are found.")
    ] = "dense"
    start_token: Annotated[
        bool | None,
        typer.Option(
            "--start-token/--no-start-token",
            help="Begin prompts with BOS or CLS, as documents that were cut so.  "
            "\\[default: as the database or the service has it; without these, as the model was "
            "trained]",
            show_default=False,
        ),
    ] = None
    neighbours: Annotated[int, typer.Option(min=1, help="Neighbours of each chunk.")] = 2
    continuations: Annotated[int, typer.Option(min=0, help="Chunks after each neighbour.")] = 1
    cache_size: Annotated[int, typer.Option(min=1, help="Chunks whose neighbours are kept.")] = 4096

    def retrieve(self, tokenizer: Any, chunk_size: int) -> Any:
        """A callable as `generate` takes it; None where no origin is named.

        Raises:
            NearestError: more than one is named, or one cannot be used.
        """
        from nearest.retro import AskedNeighbours, FixedNeighbours, NeighbourCache

        named = {
            "--database": self.database is not None,
            "--neighbours-file": self.neighbours_file is not None,
            "--ask": self.ask,
            "--service": bool(self.service),
        }
        if sum(named.values()) > 1:
            both = " and ".join(name for name, is_given in named.items() if is_given)
            raise NearestError(f"{both} are given: neighbours come from one of them")
        if self.method != "dense" and self.database is None:
            raise NearestError(
                f"--method {self.method} is of a --database: a service has its own (nearest serve)"
            )
        length = chunk_size * (1 + self.continuations)
        if self.neighbours_file is not None:
            return FixedNeighbours.from_file(self.neighbours_file, tokenizer, length)
        if self.ask:
            return AskedNeighbours(tokenizer, self.neighbours, length, _typed)
        if self.service:
            return NeighbourCache(self._of_service(tokenizer), self.cache_size)
        if self.database is not None:
            return NeighbourCache(self._of_databases(tokenizer), self.cache_size)
        return None

    def _of_databases(self, tokenizer: Any) -> Any:
        from nearest.retro import MemoryNeighbours
        from nearest.retro.data.opening import decoder, embedder_of
        from nearest.retro.opening import check_vocabulary

        databases = self._opened()
        for database in databases:
            check_vocabulary(tokenizer, database)
        return MemoryNeighbours(
            databases,
            None if self.method == "bm25" else embedder_of(databases[0]),
            decoder(tokenizer),
            neighbours=self.neighbours,
            continuation=self.continuations,
            method=self.method,
        )

    def _of_service(self, tokenizer: Any) -> Any:
        from nearest.remote.neighbours import RemoteNeighbours

        return RemoteNeighbours(
            [part for name in self.service or () for part in with_commas(name)],
            neighbours=self.neighbours,
            continuation=self.continuations,
            tokenizer=tokenizer,
            api_key=os.environ.get("NEAREST_API_KEY"),
        )

    def _opened(self) -> "list[ChunkDatabase]":
        from nearest.retro.data.database import ChunkDatabase

        names = [part for name in self.database or () for part in with_commas(name)]
        return [ChunkDatabase.open(name) for name in names]

    def start(self, tokenizer: Any, retrieve: Any, trained: int | None) -> int | None:
        """The token that documents begin with, if any, in what is searched or as it is said here.

        trained: the one of the model's training text.

        Raises:
            NearestError: the tokenizer has none, or the service does not answer.
        """
        from nearest.retro.data.opening import start_of

        if self.start_token is None:
            if self.service:
                start: int | None = retrieve.retrieve.refresh()
                return start
            if self.database is not None:
                return self._opened()[0].cut.start
            return trained
        return start_of(tokenizer) if self.start_token else None


def generate(
    model: ModelPath,
    *,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to go on from; without it, prompts are read until they end."),
    ] = None,
    origin: NeighbourOrigin,
    sampling: Sampling,
    no_repeat_ngram: Annotated[
        int, typer.Option(min=0, help="Write no run of so many tokens twice; 0: any.")
    ] = 0,
    min_length: Annotated[int, typer.Option(min=0, help="Least new tokens.")] = 0,
    show: Annotated[
        bool, typer.Option("--show/--no-show", help="Show each chunk's neighbours as they come.")
    ] = True,
    opening: OpeningRetro,
    as_json: AsJson = False,
) -> None:
    """Write with neighbours from a database, a file, a service or your own hand."""
    quiet_libraries()
    import torch

    from nearest.retro.writing import write

    options = {
        **sampling.arguments(),
        **given(no_repeat_ngram_size=no_repeat_ngram or None, min_new_tokens=min_length or None),
    }
    loaded, tokenizer = opening.load(model)
    if tokenizer is None:
        raise NearestError(
            f"{model} was saved without its tokenizer, so that no text can be read: save one into "
            "the folder"
        )
    retrieve = origin.retrieve(tokenizer, loaded.retro_config.chunk_size)
    if retrieve is None:
        err.print(
            "[yellow]note:[/] retrieval is off: give --database, --service, --neighbours-file or "
            "--ask",
            soft_wrap=True,
        )
    start = origin.start(tokenizer, retrieve, loaded.retro_config.document_start_id)
    tell = _shown if show and not as_json else _untold

    def answer(text: str) -> "Written":
        torch.manual_seed(sampling.seed)
        return write(loaded, tokenizer, text, retrieve, start=start, tell=tell, **options)

    if prompt is not None:
        _print(answer(prompt), as_json)
        return
    for text in _prompts():
        try:
            _print(answer(text), as_json)
        except NearestError as error:  # the next one may go well: a service comes back
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


def _prompts() -> Iterator[str]:
    """Lines of standard input, asked for where a person types them; blank ones are passed over."""
    asked = sys.stdin.isatty()
    while True:
        if asked:
            err.print("[bold]prompt:[/] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _typed(question: str) -> str:
    """An answer from standard input; its end is the end of the command."""
    err.print(question, end="", markup=False, soft_wrap=True)
    line = sys.stdin.readline()
    if not line:
        raise NearestError("standard input ended before all neighbours were typed")
    return line.rstrip("\n")


def _untold(_: "WrittenChunk") -> None:
    return


def _shown(chunk: "WrittenChunk") -> None:
    """A chunk and its neighbours, as soon as they are found."""
    err.print(f"[dim]chunk:[/] {_line(chunk.text)}", soft_wrap=True)
    for neighbour in chunk.neighbours:
        source = neighbour.source
        where = "given" if source is None else f"{source.document} at {source.position}"
        far = "" if source is None else f", {source.distance:.3f}"
        err.print(f"[dim]  {_line(where + far)}:[/] {_line(neighbour.text)}", soft_wrap=True)


def _line(text: str) -> str:
    """On one line, and not read as markup."""
    return escape(" ".join(text.split()))


def _print(written: "Written", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(written.to_dict(), ensure_ascii=False))
    else:
        out.print(written.prompt + written.text, markup=False, soft_wrap=True)
