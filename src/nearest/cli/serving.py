"""The command that serves memories over HTTP."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nearest.cli.app import err, model_of, open_beside, open_memory, quiet_libraries
from nearest.cli.options import Force, MethodSettings, Opening, given
from nearest.errors import NearestError, SettingError, require

if TYPE_CHECKING:
    from nearest.memory import Memory
    from nearest.retro.data.live import MemoryNeighbours
    from nearest.retro.data.stages import Method
    from nearest.serve.app import ServeOptions
    from nearest.serve.readings import NeighbourSearch


def serve(
    memories: Annotated[
        list[Path], typer.Argument(metavar="MEMORY...", help="Folders of memories to look up.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    method: Annotated[
        str | None,
        typer.Option(help="Method of requests that name none; default: hybrid, knn or suffix."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--served-name", help="What requests call the model.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NEAREST_API_KEY",
            help="Key that every route but /health asks for; required beyond the loopback.",
        ),
    ] = None,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let documents be added and removed over HTTP.")
    ] = False,
    write_key: Annotated[
        str | None,
        typer.Option(envvar="NEAREST_WRITE_KEY", help="Key that changes ask for (--writable)."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, in place of the model's.")
    ] = None,
    chunks: Annotated[
        Path | None,
        typer.Option(help="Folder of `nearest retro prepare`: serve the neighbours of chunks."),
    ] = None,
    retro: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="A RETRO or RETROfit model (or the run it is in) that is served in place of the "
            "memory's, with neighbours from the memories that have chunks. --model then names "
            "what a RETROfit was made of, if not where it was.",
        ),
    ] = None,
    retro_method: Annotated[
        Literal["dense", "bm25", "rerank", "fusion"],
        typer.Option(help="How its neighbours are found (--retro)."),
    ] = "dense",
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER/OF",
            help="Serve look-ups of these segments alone, without a model: 1/4 is the first of "
            "four shards. Memory.open(shards=…) puts the servers of all together.",
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Continuations that advance together.")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Prompts that may wait; more get 429.")
    ] = 256,
    draft: Annotated[
        bool,
        typer.Option(
            "--draft", help="Let memories and texts draft tokens for a pass where that is quicker."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request's body, at most.")] = 8,
    slow_client: Annotated[
        float,
        typer.Option(
            min=0.1, help="Seconds for a request's body to come, and for each piece to be taken."
        ),
    ] = 60,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers have when it is stopped.")
    ] = 20,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which it may be called without a key, beside the loopback's; may be "
            "given several times.",
        ),
    ] = None,
    *,
    opening: Opening,
    settings: MethodSettings,
    force: Force = False,
) -> None:
    """Serve an OpenAI-compatible API and a viewer whose answers show their sources."""
    require("fastapi", "serve")
    require("uvicorn", "serve")
    require("prometheus_client", "serve")
    quiet_libraries()
    from nearest.remote.servers import Patience
    from nearest.serve.app import ServeOptions, make_service
    from nearest.serve.engine import Limits
    from nearest.serve.guards import LOOPBACK
    from nearest.serve.run import Server, check_exposure, log_to
    from nearest.serve.shelf import by_name

    if writable != (write_key is not None):
        raise NearestError(
            "changes over HTTP need both --writable and a key of their own: give --write-key (or "
            "NEAREST_WRITE_KEY) with --writable"
        )
    check_exposure(host, api_key, write_key)
    options = ServeOptions(
        api_key=api_key,
        hosts=(*LOOPBACK, *(allow_host or ())),
        slow_client=slow_client,
        max_body=max_body << 20,
        grace=grace,
    )
    if shard is not None:
        _refuse_beside_shard(
            writable=writable,
            method=method,
            served_name=name,
            chat_template=chat_template,
            chunks=chunks,
            retro=retro,
            model=opening.model,
            **vars(settings),
        )
        _serve_shard(memories, shard, opening.search_on, options, host, port)
        return
    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NearestError(f"{chat_template} cannot be read: {error}") from error
    # While a server elsewhere is waited for, everybody waits.
    patience = Patience(answer=10.0, tries=3, failures=2)
    first, *others = memories
    opened = [open_memory(first, opening.search_on, patience)]
    opened += [open_beside(path, opening.search_on, patience) for path in others]
    by_name(opened)  # says what is wrong before a model is loaded
    search = None
    if retro is None:
        model, tokenizer = model_of(opened[0], opening)
    else:
        model, tokenizer, search = _retro(retro, opened, retro_method, opening, force=force)
    options = replace(
        options,
        model_name=name,
        method=method,
        settings=given(**settings.named()),
        write_key=write_key,
        chat_template=template,
        limits=Limits(max_running, max_waiting),
        draft=draft,
        timeout=timeout,
        force=force,
        chunks=None if chunks is None else _neighbours(chunks, opening),
        retro=search,
    )
    service = make_service(model, tokenizer, opened, options)
    log_to(sys.stderr)
    server = Server(service, options, host, port, lambda: _announce(service.model_name, host, port))
    server.run()
    if server.failed:  # so that what watches over it starts it again
        raise typer.Exit(1)


def _refuse_beside_shard(**others: Any) -> None:
    for option, value in others.items():
        if value not in (None, False):
            raise SettingError(
                f"--shard serves look-ups alone, and --{option.replace('_', '-')} has no effect on "
                "them: leave one of them out"
            )


def _serve_shard(
    folders: list[Path], text: str, search_on: str, options: "ServeOptions", host: str, port: int
) -> None:
    """Serve look-ups of a shard of each memory."""
    from nearest.index.gpu import checked_search_on
    from nearest.memory import Memory
    from nearest.remote.calls import warm_up
    from nearest.serve.run import log_to, shard_server
    from nearest.serve.shelf import Shelf
    from nearest.store.opening import open_snapshot
    from nearest.store.shard import Shard

    shard, place = Shard.parse(text), checked_search_on(search_on)
    opened = [Memory(open_snapshot(folder, None, shard), place) for folder in folders]
    for memory in opened:
        warm_up(memory)
    shelf = Shelf(opened)
    log_to(sys.stderr)
    told = ", ".join(f"shard {shard} of {name}" for name in shelf.names)
    shard_server(shelf, options, host, port, lambda: _announce(told, host, port)).run()


def _announce(what: str, host: str, port: int) -> None:
    """Print the address, which answers from now on."""
    shown = f"[{host}]" if ":" in host else host
    err.print(f"serving {what} on http://{shown}:{port}/", soft_wrap=True)


def _retro(
    name: Path, memories: "list[Memory]", method: "Method", opening: Opening, *, force: bool
) -> "tuple[Any, Any, NeighbourSearch]":
    """A RETRO model, its tokenizer, and what finds its neighbours among the memories' chunks."""
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.data.opening import decoder, embedder_of
    from nearest.retro.opening import open_retro
    from nearest.serve.readings import NeighbourSearch

    cut = next((memory for memory in memories if memory.manifest.chunks is not None), None)
    if cut is None:
        raise NearestError(
            "none of the memories has chunks, among which neighbours are found: run `nearest retro "
            f"prepare {memories[0].path}`"
        )
    model, tokenizer = open_retro(
        name, base=opening.model, dtype=opening.dtype, device=opening.device or "auto", force=force
    )
    if tokenizer is None:
        raise NearestError(
            f"{name} was saved without its tokenizer, so that no text can be read: save one into "
            "the folder"
        )
    embedder = None
    if method != "bm25":
        embedder = embedder_of(ChunkDatabase(cut), device=opening.device or "auto")
    return model, tokenizer, NeighbourSearch(embedder, decoder(tokenizer), method)


def _neighbours(folder: Path, opening: Opening) -> "MemoryNeighbours":
    """What finds the neighbours of chunks in a database, with the embedder that made it."""
    from nearest.retro.data.database import ChunkDatabase
    from nearest.retro.data.live import MemoryNeighbours
    from nearest.retro.data.opening import decoder, embedder_of, tokenizer_of

    database = ChunkDatabase.open(folder)
    return MemoryNeighbours(
        database,
        embedder_of(database, device=opening.device or "auto"),
        decoder(tokenizer_of(database)),
    )
