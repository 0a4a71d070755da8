"""Manifests, JSON lines and array headers that a coverage-guided fuzzer (atheris) makes up.

They are refused or read, and nothing else: no other error, nothing that hangs or grows.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from memories import furnish

EXECUTIONS = {"manifests": 300_000, "lines": 500_000, "headers": 250_000}
MEMORY_MIB, SECONDS_EACH = 2048, 20
PIECES = [b"{", b"}", b"[", b"]", b'"', b"null", b"1e999", b"-1", b"\\ud800", b"\xff", b"NaN"]
PIECES += [b"9" * 40, b"..", b"\0", b"True", b"(", b"'", b"<f8", b"|O", b"[" * 40]


def fuzz(folder: Path, share: float) -> dict[str, Any]:
    """Each target as often as EXECUTIONS says, from a whole file as the seed."""
    furnish(folder / "memory")
    line = json.dumps({"id": "a", "text": "the text ä", "title": [1, {"b": None}]}).encode()
    np.save(folder / "seed.npy", np.arange(12, dtype=np.float16).reshape(3, 4))
    seeds = {
        "manifests": (folder / "memory/manifest.json").read_bytes(),
        "lines": line,
        "headers": (folder / "seed.npy").read_bytes(),
    }
    escaped = ("".join(rf"\x{byte:02x}" for byte in piece) for piece in PIECES)
    (folder / "pieces").write_text("\n".join(f'"{word}"' for word in escaped))
    figures: dict[str, Any] = {}
    for name, seed in seeds.items():
        corpus = folder / name
        corpus.mkdir()
        (corpus / "seed").write_bytes(seed)
        count = max(100, int(EXECUTIONS[name] * share))
        figures |= _fuzzed(name, corpus, folder / "pieces", count)
    return figures


def _fuzzed(name: str, corpus: Path, pieces: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("fuzz_target.py")), name, str(corpus)]
    command += [f"-dict={pieces}", f"-runs={count}", "-seed=1", "-max_len=8192"]
    command += [f"-timeout={SECONDS_EACH}", f"-rss_limit_mb={MEMORY_MIB}"]
    ended = subprocess.run(command, cwd=corpus, capture_output=True, text=True, errors="replace")
    done = re.search(r"Done (\d+) runs", ended.stderr)
    if ended.returncode or done is None:
        raise AssertionError(f"{name}: {ended.stderr[-3000:]}")
    peak = re.findall(r"rss: (\d+)Mb", ended.stderr)
    inputs = len(list(corpus.iterdir()))
    return {
        name: int(done[1]),
        f"{name}_kept_for_coverage": inputs,
        f"{name}_peak_mib": int(peak[-1]),
    }
