"""Output that loses no result: any terminal's encoding, closed pipes, full disks."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from nearest.errors import FolderError


class OutputError(Exception):
    """Standard output cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.closed = error.errno == errno.EPIPE  # its reader, such as `head`, has seen enough


class _Output:
    """A stream whose errors are told from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError):  # a stream without a file, as in tests
                # so that the interpreter does not fail again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise OutputError(error) from error


def check_place(path: Path) -> None:
    """Refuse a place that no file can be written to, before anything is computed (FolderError)."""
    if not path.parent.is_dir():
        raise FolderError(f"the folder {path.parent} does not exist: make it, or choose another")
    if path.is_dir():
        raise FolderError(f"{path} is a folder: name a file")


def write_in_any_encoding() -> None:
    """Write characters that a terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def whole_output() -> Iterator[None]:
    """Standard output, all of which is written at the end.

    Raises:
        OutputError: it cannot be; the rest of what is written there is lost.
    """
    with redirect_stdout(_Output(sys.stdout)):
        yield
        sys.stdout.flush()  # what cannot be written is found here, and not at the very end
