"""A worker as a process, whose arguments are MODULE:SPEC FOLDER TOKEN VALUES."""

import os
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

import msgspec

from nearest.build.workers import Spec, telling
from nearest.errors import NearestError


def _end_with_parent() -> None:
    """End at once when standard input does: whoever started this process is gone."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def main() -> None:
    """Work until nothing is left; an error goes to standard output, its traceback beside it."""
    name, folder, token, values = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, kind = name.partition(":")
    try:
        spec: Spec = msgspec.json.decode(values, type=getattr(import_module(module), kind))
        spec.work(Path(folder), token)
    except Exception as error:
        if not isinstance(error, NearestError):
            traceback.print_exc()
        sys.stdout.buffer.write(telling(error))
        sys.stdout.buffer.flush()
        os._exit(2)
    os._exit(0)  # the thread that waits for standard input holds it
