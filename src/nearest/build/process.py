"""A worker as a process: `python -m nearest.build.process MODULE:SPEC FOLDER TOKEN VALUES`."""

import os
import sys
import threading
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
    """Work until nothing is left; an error that a user can mend goes to standard output."""
    name, folder, token, values = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, kind = name.partition(":")
    try:
        spec: Spec = msgspec.json.decode(values, type=getattr(import_module(module), kind))
        spec.work(Path(folder), token)
    except NearestError as error:
        sys.stdout.buffer.write(telling(error))
        sys.stdout.buffer.flush()
        os._exit(2)
    os._exit(0)  # the thread that waits for standard input holds it


if __name__ == "__main__":
    main()
