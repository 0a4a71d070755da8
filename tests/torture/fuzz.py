"""Manifests, JSON lines and array headers of mutated bytes: refused or read, and nothing else."""

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from memories import furnish

from nearest.corpus.documents import _parse_line
from nearest.errors import NearestError
from nearest.folder import open_array
from nearest.memory.manifest import _decode

EXECUTIONS = {"manifests": 300_000, "lines": 500_000, "headers": 250_000}
PIECES = [b"", b"{", b"}", b"[", b"]", b'"', b"null", b"1e999", b"-1", b"\\ud800", b"\xff", b"NaN"]
PIECES += [b"9" * 40, b"..", b"\0", b"True", b"(", b"'", b"<f8", b"|O", b"[" * 2000]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Data with a few bytes changed, cut out, doubled, or put in."""
    for _ in range(int(rng.integers(1, 5))):
        at, end = sorted(rng.integers(0, len(data) + 1, size=2).tolist())
        end = min(end, at + 30)
        kind = int(rng.integers(4))
        middle = {
            0: bytes(rng.integers(0, 256, size=2, dtype=np.uint8)),
            1: b"",
            2: data[at:end] * 2,
            3: PIECES[int(rng.integers(len(PIECES)))],
        }[kind]
        data = data[:at] + middle + data[end:]
    return data


def fuzz(folder: Path, share: float) -> dict[str, Any]:
    """Each target as often as EXECUTIONS says; any error but ours ends the run."""
    furnish(folder / "memory")
    manifest = (folder / "memory/manifest.json").read_bytes()
    line = json.dumps({"id": "a", "text": "the text ä", "title": [1, {"b": None}]}).encode()
    np.save(folder / "seed.npy", np.arange(12, dtype=np.float16).reshape(3, 4))
    array, path = (folder / "seed.npy").read_bytes(), folder / "array.npy"

    def read_array(data: bytes) -> None:
        path.write_bytes(data)
        open_array(path, np.dtype(np.float16), (3, 4))

    targets: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
        "manifests": (manifest, lambda data: _decode(folder, data)),
        "lines": (
            line,
            lambda data: _parse_line(data.decode(errors="replace"), "name", "origin"),
        ),
        "headers": (array, read_array),
    }
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures: dict[str, Any] = {}
    for name, (seed, target) in targets.items():
        refused = 0
        count = int(EXECUTIONS[name] * share)
        for number in range(count):
            if number % 1000 == 0:
                signal.alarm(60)  # a thousand that take longer: one of them hangs
            try:
                target(mutated(seed, rng))
            except NearestError:
                refused += 1
        figures |= {name: count, f"{name}_refused": refused}
    signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**figures, "grown_mib": round(grown / 1024)}
