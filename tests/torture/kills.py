"""Writers killed at random moments, in children of this process and through the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memories import CHANGES, DOCUMENTS, LATER, MODEL, answers, build, furnish
from nearest import Memory
from nearest.errors import FolderError
from nearest.store.verify import verify

MOMENTS, COMMANDS = 450, 24


def in_child(call: Callable[[Path], Any], path: Path, seconds: float | None) -> tuple[float, bool]:
    """Run a call in a fork, killed after so many seconds; how long it took, and whether it died."""
    started = time.perf_counter()
    child = os.fork()
    if not child:
        code = 1
        try:
            call(path)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    return time.perf_counter() - started, os.WIFSIGNALED(status)


def kills(folder: Path, share: float) -> dict[str, Any]:
    """At every moment the old generation or the new one, and the change can be made again."""
    rng = np.random.default_rng(0)
    started = folder / "started"
    furnish(started)
    old = answers(started)
    counts = {"moments": 0, "killed": 0, "left_old": 0, "left_new": 0}
    for name, change in {"build": build, **CHANGES}.items():
        times = []
        for whole in (folder / f"{name}-first", folder / name):
            if name != "build":
                shutil.copytree(started, whole)
            times.append(in_child(change, whole, None)[0])
        took, new = min(times), answers(whole)
        for moment in range(max(2, int(share * MOMENTS / (len(CHANGES) + 1)) + 1)):
            path = folder / f"{name}-{moment}"
            if name != "build":
                shutil.copytree(started, path)
            _, killed = in_child(change, path, float(rng.uniform(0, took)))
            counts["moments"] += 1
            counts["killed"] += killed
            try:
                assert verify(path) == []
                left = answers(path)
            except FolderError:  # there is no memory yet
                assert name == "build"
                assert not (path / "manifest.json").exists()
                left = old
            assert left in (old, new)
            counts["left_new" if left == new else "left_old"] += 1
            if left == old:
                change(path)
                assert answers(path) == new
                assert verify(path) == []
            shutil.rmtree(path)
    return counts


def commands(folder: Path, share: float) -> dict[str, Any]:
    """The same, of `nearest add`."""
    rng = np.random.default_rng(1)
    model, text, started = folder / "model", folder / "later.jsonl", folder / "started"
    MODEL[0].save_pretrained(model)
    MODEL[1].save_pretrained(model)
    text.write_text("\n".join(json.dumps({"id": d.id, "text": d.text}) for d in LATER))
    Memory.build(*MODEL, DOCUMENTS[:6], started, tune=False)
    nearest = [Path(sys.executable).with_name("nearest"), "add"]
    options = ["--model", model, "--json"]

    def run(path: Path, seconds: float | None) -> tuple[float, bool]:
        began = time.perf_counter()
        process = subprocess.Popen(
            [*nearest, path, text, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return time.perf_counter() - began, process.returncode == -signal.SIGKILL

    whole = Path(shutil.copytree(started, folder / "whole"))
    took, _ = run(whole, None)
    ids = [["doc-0"], ["doc-0", "later"]]
    counts = {"moments": 0, "killed": 0, "left_old": 0, "left_new": 0}
    for moment in range(max(2, int(share * COMMANDS))):
        path = Path(shutil.copytree(started, folder / f"c{moment}"))
        _, killed = run(path, float(rng.uniform(0.5, 1.05)) * took)  # half of it is imports
        counts["moments"] += 1
        counts["killed"] += killed
        assert verify(path) == []
        memory = Memory.open(path)
        found = [memory.document(n).id for n in range(memory.documents)]
        new = found[-1] == ids[1][1]
        counts["left_new" if new else "left_old"] += 1
        if not new:
            memory.add(*MODEL, LATER)
            assert answers(path)[0] == answers(whole)[0]
    return counts
