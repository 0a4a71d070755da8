"""`nearest retro`: from documents to neighbours of every chunk, and weights of public models."""

from nearest.cli.app import Command
from nearest.cli.retro import convert, data, look

COMMANDS: dict[str, Command] = {
    "prepare": data.prepare,
    "chunks": data.chunks,
    "embed": data.embed,
    "index": data.index,
    "neighbours": data.neighbours,
    "show": look.show,
    "verify": look.verify,
    "convert": convert.convert,
}
