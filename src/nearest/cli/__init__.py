"""The `nearest` command: reads arguments, calls the verbs, and prints what they return.

Reports go to stdout (`--json`: one object a line), logs and progress to stderr. A mistake of the
user's is one message and exit code 2, never a traceback. Heavy imports wait for their command.
"""

import typer

from nearest.cli import (
    building,
    chat,
    generating,
    importing,
    keys,
    looking,
    memories,
    methods,
    serving,
)
from nearest.cli.app import Command, app, register
from nearest.cli.retro import COMMANDS as RETRO_COMMANDS

_COMMANDS: dict[str, Command] = {
    "build": building.build,
    "join": building.join,
    "import": importing.import_store,
    "add": memories.add,
    "update": memories.update,
    "sync": memories.sync,
    "remove": memories.remove,
    "compact": memories.compact,
    "info": memories.info,
    "documents": looking.documents,
    "search": looking.search,
    "verify": memories.verify,
    "upload": memories.upload,
    "index": keys.index,
    "cluster": keys.cluster,
    "compress": keys.compress,
    "tune": methods.tune,
    "eval": methods.evaluate,
    "sweep": methods.sweep,
    "generate": generating.generate,
    "chat": chat.chat,
    "serve": serving.serve,
    "demo": generating.demo,
}
for _name, _function in _COMMANDS.items():
    register(_name, _function)

_retro = typer.Typer(
    no_args_is_help=True, help="RETRO: neighbours of a corpus, training, evaluation, generation."
)
for _name, _function in RETRO_COMMANDS.items():
    register(_name, _function, _retro)
app.add_typer(_retro, name="retro")


def main() -> None:
    """Entry point of the `nearest` command."""
    app()
