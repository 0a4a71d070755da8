"""The shell lines of a page, run as they stand, with `nearest` answered by the test's process.

A command of its own would import torch each time. So `nearest`, in the folder that stands first on
the shell's PATH, hands its arguments to this process over a socket and prints what comes back.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path

from typer.testing import CliRunner

from nearest.cli import app

# `-S -E`: without site-packages it starts in some ten milliseconds.
SHIM = """#!{python} -SE
import os, sys
from multiprocessing.connection import Client
given = "" if sys.stdin.isatty() else sys.stdin.read()
with Client({address!r}, authkey={key!r}) as line:
    line.send((sys.argv[1:], os.getcwd(), given))
    code, out, err = line.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Shell:
    """Runs shell scripts in a folder; `ran` are the commands of `nearest` that they ran."""

    def __init__(self, folder: Path, path: str) -> None:
        self._folder = folder
        self._environment = {**os.environ, "PATH": path}
        self.ran: list[list[str]] = []

    def run(self, script: str, given: str = "") -> str:
        """What a script prints, which must end well; `given` is its standard input."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self._folder,
            env=self._environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{script}\nprinted:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def answer_all(self, listener: Listener) -> None:
        """Run the commands that the scripts' `nearest` hands over, until it hands over None."""
        while True:
            with listener.accept() as line:
                asked = line.recv()
                if asked is None:
                    return
                line.send(self._answer(*asked))

    def _answer(self, arguments: list[str], folder: str, given: str) -> tuple[int, str, str]:
        self.ran.append(arguments)
        os.chdir(folder)
        result = CliRunner().invoke(app, arguments, input=given)
        error = result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            error += f"{type(result.exception).__name__}: {result.exception}"
        return result.exit_code, result.stdout, error


@contextmanager
def shell(folder: Path, tools: Path) -> Iterator[Shell]:
    """A shell whose scripts run in `folder`; `tools` is an empty folder for its `nearest`."""
    key, before = os.urandom(16), Path.cwd()
    with Listener(str(tools / "socket"), authkey=key) as listener:
        shim = SHIM.format(python=sys.executable, address=listener.address, key=key)
        (tools / "nearest").write_text(shim)
        (tools / "nearest").chmod(0o755)
        running = Shell(folder, f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        thread = threading.Thread(target=running.answer_all, args=[listener], daemon=True)
        thread.start()
        try:
            yield running
        finally:
            with Client(listener.address, authkey=key) as line:
                line.send(None)
            thread.join()
            os.chdir(before)
