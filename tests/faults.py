"""Disks that fail: every operation that writes, counted, and the n-th of them made to fail."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# ENOSPC and EIO, the call raising; and a write of which only a part reaches the file.
ERRORS = {name: OSError(getattr(errno, name), name) for name in ("ENOSPC", "EIO")}
_OF_OS = ("pwrite", "fsync", "posix_fallocate")
_OF_PATH = ("replace", "mkdir", "unlink")


class Disk:
    """Counts operations; the one numbered `failing` raises `error`."""

    def __init__(self, failing: int | None, error: OSError, short: bool) -> None:
        self.operations: list[str] = []
        self._failing, self._error, self._short = failing, error, short

    def count(self, name: str) -> None:
        """Count one, or fail."""
        self.operations.append(name)
        if len(self.operations) == self._failing:
            raise OSError(self._error.errno, self._error.strerror)

    def wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(name)
            if name == "pwrite" and self._short:
                fd, data, offset = args
                return original(fd, data[: max(1, len(data) // 2)], offset)
            return original(*args, **kwargs)

        return call

    def opened(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`Path.open`, whose buffered files count what is written."""

        def call(path: Path, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
            if "w" not in mode:
                return original(path, mode, buffering, **kwargs)
            self.count("open")
            if buffering == 0:
                return original(path, mode, buffering, **kwargs)
            raw = _CountedFile(path, mode)
            raw.disk = self
            return io.BufferedWriter(raw)

        return call


class _CountedFile(io.FileIO):
    """A file whose writes are counted, and are short where the disk makes them so."""

    disk: Disk

    def write(self, data: Any) -> int:
        self.disk.count("write")
        view = memoryview(data).cast("B")
        return super().write(view[: max(1, len(view) // 2)] if self.disk._short else view)


@contextmanager
def disk(
    failing: int | None = None, error: OSError = ERRORS["ENOSPC"], *, short: bool = False
) -> Iterator[Disk]:
    """Let the n-th operation that writes fail, or (`short`) every write stop half way."""
    made = Disk(failing, error, short)
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_OS:
            patch.setattr(os, name, made.wrapped(name, getattr(os, name)))
        for name in _OF_PATH:
            patch.setattr(Path, name, made.wrapped(name, getattr(Path, name)))
        patch.setattr(Path, "open", made.opened(Path.open))
        yield made
