"""What tests of memory folders share: copies, damage, and writers killed in the middle of work."""

import functools
import itertools
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conftest import edit_manifest, snapshot
from nearest import Memory
from nearest.errors import FolderError
from nearest.folder import sha256_of
from nearest.store.verify import verify

Build = Callable[..., Memory]
Moment = tuple[str, str, int]


def copied(folder: Path, to: Path) -> Path:
    """A copy of a memory below `to`, to be changed or damaged."""
    return Path(shutil.copytree(folder, to / "copy.memory"))


def files(folder: Path) -> set[str]:
    """The paths of all files below a folder."""
    return {name for name, data in snapshot(folder).items() if data is not None}


def live_files(folder: Path) -> set[str]:
    """The paths that a memory's folder should have: the manifest, and what it names."""
    return {
        "manifest.json",
        *(record.path for record in Memory.open(folder).manifest.file_records()),
    }


def found_by_verify(folder: Path) -> str:
    """What verify says, whether it gives a list or cannot even open the memory."""
    try:
        return "; ".join(verify(folder))
    except FolderError as error:
        return str(error)


def flipped(file: Path, rng: np.random.Generator, count: int) -> Iterator[None]:
    """Flip a bit of the file's first byte, of its last, and of `count` others, one after another.

    In the end the file is as it was.
    """
    data = file.read_bytes()
    for position in sorted({0, len(data) - 1, *rng.integers(len(data), size=count).tolist()}):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        yield
    file.write_bytes(data)


def replaced(folder: Path, path: str, content: bytes | np.ndarray) -> None:
    """Write another file, as if it had been written so: the manifest describes it."""
    file = folder / path
    file.unlink()
    if isinstance(content, np.ndarray):
        np.save(file, content, allow_pickle=False)
    else:
        file.write_bytes(content)
    found = {"size": file.stat().st_size, "sha256": sha256_of(file)}

    def describe(item: Any) -> None:
        parts = item.values() if isinstance(item, dict) else item
        if isinstance(item, dict) and item.get("path") == path:
            item.update(found)
        elif isinstance(item, dict | list):
            for part in parts:
                describe(part)

    edit_manifest(folder, describe)


def place_of(folder: Path, moment: Moment) -> Path:
    """The memory of one moment."""
    return folder / "-".join(map(str, moment))


def kill_writers(
    changes: Mapping[str, Callable[[Path], Any]], folder: Path, moments: Sequence[Moment]
) -> None:
    """Let forks of this process change `place_of` each moment, and kill themselves then.

    A moment is a change's name, a function's, and before which of its calls the fork dies.

    Args:
        changes: functions of a path, by name.
        folder: where the memories are.
        moments: all of them must come.
    """
    children = []
    for moment in moments:
        verb, name, count = moment
        child = os.fork()
        if not child:
            try:
                signal.alarm(120)
                _kill_before(Path if name in ("replace", "unlink") else os, name, count)
                changes[verb](place_of(folder, moment))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    ended = [os.WIFSIGNALED(status) and os.WTERMSIG(status) for status in statuses]
    assert ended == [signal.SIGKILL] * len(moments)


def _kill_before(owner: Any, name: str, count: int) -> None:
    """Die just before the count-th call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, call)
