"""`nearest retro`: neighbours of every chunk, models that read them, and what they are worth."""

from nearest.cli.app import Command
from nearest.cli.retro import convert, data, evaluate, generate, look, train

COMMANDS: dict[str, Command] = {
    "prepare": data.prepare,
    "chunks": data.chunks,
    "embed": data.embed,
    "index": data.index,
    "neighbours": data.neighbours,
    "show": look.show,
    "verify": look.verify,
    "convert": convert.convert,
    "train": train.train,
    "fit": train.fit,
    "eval": evaluate.evaluate,
    "analyse": evaluate.analyse,
    "generate": generate.generate,
}
