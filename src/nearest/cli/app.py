"""The application that commands are registered with, and what all of them do alike."""

import functools
import inspect
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape

from nearest import __version__
from nearest.cli.options import (
    Answering,
    MethodSettings,
    ModelChoice,
    MoreMemories,
    Opening,
    Sampling,
    given,
    numbers,
)
from nearest.cli.output import OutputError, whole_output, write_in_any_encoding
from nearest.corpus.report import CorpusWarning
from nearest.errors import ModelError, NearestError, NotStoredError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nearest.corpus.reading import Corpus
    from nearest.memory import Memory
    from nearest.remote.servers import Patience

Command = Callable[..., None]
_ADDRESS = re.compile(r"(https?|ray):/+([^/]+)(?:/+(.+))?")  # as a path, with one slash
_STORE_EVERY, _STORE_TRIES = 10, 60  # seconds, and how often

app = typer.Typer(
    help="A memory for language models: look a corpus up while predicting, with sources.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _prepare(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say which this is."),
    ] = False,
) -> None:
    """Keep stdout for reports: notes go to stderr."""

    def note(message: Warning | str, *_: Any) -> None:
        err.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)

    write_in_any_encoding()
    warnings.showwarning = note  # type: ignore[assignment]
    warnings.simplefilter("ignore", CorpusWarning)  # each command says it itself


def register(name: str, function: Command, group: typer.Typer = app) -> None:
    """Make a function a command of this name, of the application or of a group of commands."""
    group.command(name)(_explained(_flat(function)))


def _explained(function: Command) -> Command:
    """Turn the errors a user can mend, and an interruption, into a message and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with whole_output():
                function(*args, **kwargs)
            return
        except OutputError as error:
            if error.closed:
                raise typer.Exit(0) from error
            err.print(
                f"[bold red]error:[/] standard output cannot be written ({error}): make "
                "room there, or write to another place; what the command changed is done",
                soft_wrap=True,
            )
        except NearestError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        except KeyboardInterrupt:
            err.print("[bold red]stopped:[/] nothing half-written is in use; run it again")
        raise typer.Exit(2)

    return run


def _flat(function: Command) -> Command:
    """Take apart each parameter that is a group of options (a dataclass) for the command line."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        parameters += [parameter] if group is None else _options_of(group)

    @functools.wraps(function)
    def run(**options: Any) -> None:
        for name, group in groups.items():
            own = {field.name: options.pop(field.name) for field in fields(group)}
            options[name] = group(**own)
        function(**options)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def tuned_and_stored(memory: "Memory", tune: Callable[[], Any]) -> Any:
    """What tuning finds; where it cannot be stored, that is tried again, for it took minutes."""
    try:
        return tune()
    except NotStoredError as error:
        from nearest.verbs.tune import store_tuned

        failed = error
    for _ in range(_STORE_TRIES):
        err.print(
            f"[bold]not stored yet:[/] {escape(str(failed.__cause__))}. Mend that: it is tried "
            f"again every {_STORE_EVERY} s, {_STORE_TRIES} times",
            soft_wrap=True,
        )
        time.sleep(_STORE_EVERY)
        try:
            store_tuned(memory, failed.tuned)
        except NotStoredError as again:
            failed = again
        else:
            return failed.tuned
    raise failed


def open_memory(path: Path, search_on: str = "cpu", patience: "Patience | None" = None) -> "Memory":
    """Open a memory's folder, or one that `nearest serve` holds at http://HOST:PORT[/NAME].

    A memory in object storage (s3://BUCKET/NAME) is fetched into a cache. Several servers, be they
    of all shards or of the same memory, stand with commas between them: http://HOST:PORT,HOST:PORT.
    Of ray://auto/FOLDER, actors of a Ray cluster hold the shards; the folder's path is whole.
    The key of servers is read from NEAREST_API_KEY; `patience` is how long they are waited for.
    """
    from nearest.memory import Memory

    address = _ADDRESS.fullmatch(str(path))
    if address is None:
        return Memory.open(path, search_on)
    scheme, host, name = address.groups()
    wait = 30.0 if patience is None else patience.answer
    if scheme == "ray":
        folder = Path("/", name or "")
        shards = f"ray://{host}"
        return Memory.open(folder, search_on, shards=shards, patience=patience, wait=wait)
    from nearest.remote.memory import RemoteMemory
    from nearest.remote.sharded import ShardedMemory, refuse_to_search_on

    urls, key = [f"{scheme}://{one}" for one in host.split(",")], os.environ.get("NEAREST_API_KEY")
    asked: dict[str, Any] = {"api_key": key, "patience": patience}
    refuse_to_search_on(search_on)
    if len(urls) > 1 and RemoteMemory(urls, name, **asked, one_shard=True).shard is not None:
        return ShardedMemory(urls, name, **asked, wait=wait)
    return RemoteMemory(urls, name, **asked)


def open_beside(path: Path, search_on: str, patience: "Patience | None" = None) -> "Memory":
    """As `open_memory`, beside another; what servers hold is searched where they are told to."""
    address = _ADDRESS.fullmatch(str(path))
    held = address is not None and address[1] != "ray"
    return open_memory(path, "cpu" if held else search_on, patience)


def open_with_model(memory: Path, opening: Opening) -> "tuple[Memory, PreTrainedModel, Any]":
    """Open a memory and load the model that built it, or the one named instead."""
    opened = open_memory(memory, opening.search_on)
    return opened, *model_of(opened, opening)


def model_of(memory: "Memory", choice: ModelChoice) -> "tuple[PreTrainedModel, Any]":
    """Load the model that built a memory, or the one named instead, and its tokenizer.

    Raises:
        ModelError: none built it, or one that was nowhere but in RAM, or loading fails.
    """
    from nearest.encode.loading import load_model_and_tokenizer

    record = memory.manifest.model
    if record.tokenizer_only and choice.model is None:
        raise ModelError(
            f"{memory.path} was built with the tokenizer {record.name!r} alone: name a language "
            "model that has this tokenizer (--model)"
        )
    return load_model_and_tokenizer(choice.model or _named(memory), choice.dtype, choice.device)


def what_reads_for(memory: "Memory", choice: ModelChoice) -> tuple[Any, Any]:
    """What reads documents for a memory: a model, or None where none built it, and a tokenizer."""
    from nearest.encode.loading import load_tokenizer

    if memory.manifest.model.tokenizer_only and choice.model is None:
        return None, load_tokenizer(_named(memory))
    return model_of(memory, choice)


def _named(memory: "Memory") -> str:
    """Where the model, or the tokenizer alone, that built a memory is."""
    if not memory.manifest.model.name:
        raise ModelError(
            f"{memory.path} does not say where its model is, for it was built with one in RAM: "
            "name it (--model)"
        )
    return memory.manifest.model.name


def opened_to_write(
    memory: Path,
    answering: Answering,
    sampling: Sampling,
    opening: Opening,
    settings: MethodSettings,
    beside: MoreMemories,
) -> "tuple[list[Memory], PreTrainedModel, Any, dict[str, Any]]":
    """Memories, their model, its tokenizer, and what `generate` and `Chat` are told alike.

    Raises:
        NearestError: an option is out of range, or something cannot be opened.
    """
    arguments = sampling.arguments()  # before a model is loaded for nothing
    arguments |= {
        "method": answering.method,
        "weights": numbers(beside.weights, "weights", "0.7,0.3"),
        "settings": given(**settings.named()),
        "force": answering.force,
    }
    import torch

    opened, model, tokenizer = open_with_model(memory, opening)
    torch.manual_seed(sampling.seed)
    memories = opened_beside(opened, beside)
    say_settings(memories, [answering.method])
    return memories, model, tokenizer, arguments


def say_what_was_read(corpus: "Corpus") -> None:
    """Say what of a corpus was left out or not taken as it stands, if anything."""
    if corpus.report.notable or corpus.report.encoder_field is not None:
        err.print(f"[yellow]note:[/] {escape(str(corpus.report))}", soft_wrap=True)


def opened_beside(first: "Memory", beside: MoreMemories) -> "list[Memory]":
    """The first memory, and those that were named beside it."""
    return [first, *(open_beside(path, first.search_on) for path in beside.more or ())]


def say_settings(memories: "Sequence[Memory]", methods: Sequence[str]) -> None:
    """Say where settings come from that are not given: tuned, self-tuned, or the defaults."""
    from nearest.retrieval.settings import MEMORY_METHODS

    for memory in memories:
        used = [
            f"{name}: {memory.settings_from(name)}" for name in methods if name in MEMORY_METHODS
        ]
        if used:
            err.print(f"[dim]settings of {escape(str(memory.path))}: {', '.join(used)}[/]")


def quiet_libraries() -> None:
    """Keep transformers' advice and progress bars out of the way of our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
