"""The command that chats with a model and its memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nearest import reports
from nearest.cli.app import err, opened_to_write, out, quiet_libraries
from nearest.cli.generating import shown_as_it_comes
from nearest.cli.options import (
    Answering,
    MemoryPath,
    MethodSettings,
    MoreMemories,
    Opening,
    Sampling,
)
from nearest.errors import NearestError

if TYPE_CHECKING:
    from nearest.verbs.chat import Chat

_HELP = """/sources      where the last answer came from
/off, /on     answer without the memory, and with it again
/method NAME  knn, retomaton, suffix, hybrid …
/new          begin a new conversation
/quit         leave (as does the end of input)"""


def chat(
    memory: MemoryPath,
    system: Annotated[str | None, typer.Option(help="System message before the first.")] = None,
    *,
    answering: Answering,
    sampling: Sampling,
    opening: Opening,
    settings: MethodSettings,
    beside: MoreMemories,
) -> None:
    """Chat with the model, which looks the memory up while it answers; /help lists commands."""
    quiet_libraries()
    from nearest.verbs.chat import Chat

    memories, loaded, tokenizer, arguments = opened_to_write(
        memory, answering, sampling, opening, settings, beside
    )
    talk = Chat(loaded, tokenizer, memories, system=system, **arguments)
    name = memories[0].manifest.model.name
    err.print(f"{escape(name)} with {escape(str(memory))}; /help lists commands")
    for line in _lines():
        try:
            if line in ("/quit", "/exit"):
                break
            if line.startswith("/"):
                _command(talk, line, answering.show)
            else:
                talk.say(line, shown_as_it_comes if sampling.num_beams == 1 else None)
                out.print("" if sampling.num_beams == 1 else talk.answer)
        except NearestError as error:  # a line that cannot be answered ends no conversation
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


def _lines() -> Iterator[str]:
    """What is typed, line by line, without empty ones, until the input ends."""
    import contextlib
    import sys

    with contextlib.suppress(ImportError):  # where it is, arrow keys edit and recall lines
        import readline  # noqa: F401
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _command(talk: "Chat", line: str, show: int) -> None:
    name, _, value = line[1:].partition(" ")
    if name == "help":
        out.print(_HELP, markup=False)
    elif name == "sources":
        if talk.last is None:
            raise NearestError("there is no answer yet: ask something first")
        out.print(reports.shaded_generation(talk.last, show))
    elif name in ("off", "on"):
        talk.remembers = name == "on"
        out.print(f"the memory is {name}")
    elif name == "method" and value:
        talk.use(value.strip())
        out.print(f"method {talk.method}")
    elif name == "method":
        out.print(f"method {talk.method}; another: /method NAME")
    elif name == "new":
        talk.begin_anew()
        out.print("a new conversation")
    else:
        raise NearestError(f"/{name} is unknown: /help lists commands")
