"""Every file of a memory damaged in every way, and what becomes of who uses it."""

import os
import resource
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from folders import found_by_verify, live_files
from memories import answers, furnish
from nearest import Memory
from nearest.errors import NearestError

FLIPS, CUTS, SWAPS, SECONDS = 60, 10, 8, 30
OUTCOMES = {0: "answered as before", 1: "answered otherwise", 2: "refused", 3: "not found"}


def damages(
    data: bytes, others: list[bytes], rng: np.random.Generator, share: float
) -> Iterator[tuple[str, bytes]]:
    """One file, damaged."""
    for _ in range(max(1, int(FLIPS * share))):
        flipped = bytearray(data)
        flipped[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        yield "flipped", bytes(flipped)
    for _ in range(max(1, int(CUTS * share))):
        yield "truncated", data[: int(rng.integers(1, len(data)))]
    yield "emptied", b""
    chosen = rng.choice(len(others), size=max(1, int(SWAPS * share)), replace=False)
    yield from (("swapped", others[i]) for i in chosen.tolist())


def looked_at(path: Path, expected: Any, resized: bool) -> int:
    """What a process that uses the memory ends with: a number of OUTCOMES."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)
    warnings.simplefilter("ignore")  # numpy's, of sums that overflow
    if not found_by_verify(path):
        return 3
    try:
        Memory.open(path)
        assert not resized, "a file of another size was opened"
        return 0 if answers(path) == expected else 1
    except NearestError:
        return 2


def damage(folder: Path, share: float) -> dict[str, Any]:
    """verify finds all; using it answers or refuses, and never crashes or hangs."""
    rng = np.random.default_rng(0)
    path = folder / "memory"
    furnish(path)
    expected = answers(path)
    contents = {name: (path / name).read_bytes() for name in sorted(live_files(path))}
    ended: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    for name, data in contents.items():
        others = [other for other in contents.values() if other != data]
        for kind, damaged in damages(data, others, rng, share):
            shutil.copyfile(path / name, folder / "kept")
            (path / name).write_bytes(damaged)
            child = os.fork()
            if not child:
                code = 9
                try:
                    code = looked_at(path, expected, len(damaged) != len(data))
                finally:
                    os._exit(code)
            status = os.waitpid(child, 0)[1]
            assert os.WIFEXITED(status), (name, kind, status)
            assert os.WEXITSTATUS(status) in OUTCOMES, (name, kind, status)
            ended[OUTCOMES[os.WEXITSTATUS(status)]] += 1
            cases[kind] += 1
            (path / name).write_bytes(data)
    assert answers(path) == expected
    assert ended["not found"] == 0, ended
    return {"files": len(contents), "cases": cases.total(), **cases, **ended}
