"""Builds whose workers a Ray cluster runs: the same bytes, whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import random_documents, snapshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'nearest[ray]'"),
]
COMMAND = (sys.executable, "-m", "nearest", "build")
OPTIONS = ("--index", "IVF4,SQ8", "--batch-size", "1", "--segment-tokens", "600", "--no-tune")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        json.dumps({"id": f"{n}-{one.id}", "text": one.text})
        for n in range(40)
        for one in random_documents()
    ]
    path.write_text("\n".join(rows))
    return path


def begun(*words: str | Path) -> "subprocess.Popen[bytes]":
    """A build with one thread a process; Ray's files go where their names stay short."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": "/tmp"}
    environment["RAY_worker_niceness"] = "0"  # as patient as other tests, and no more
    return subprocess.Popen(
        [*COMMAND, *map(str, words), *OPTIONS], env=environment, stderr=subprocess.PIPE
    )


def ended(build: "subprocess.Popen[bytes]") -> None:
    _, said = build.communicate(timeout=600)
    assert build.returncode == 0, said.decode()


def worker(out: Path, build: "subprocess.Popen[bytes]") -> int:
    """The process of a worker that has claimed something."""
    until = time.monotonic() + 300
    while time.monotonic() < until and build.poll() is None:
        for claim in out.glob("build/*.keys.claim"):
            try:
                return int(claim.read_text().split("-")[-2])
            except (OSError, IndexError):  # given up, or not written yet
                continue
        time.sleep(0.01)
    raise AssertionError(f"no worker has claimed anything; the build ended: {build.poll()}")


@pytest.fixture(scope="module")
def whole(model_folder: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("whole") / "m"
    ended(begun(model_folder, corpus, "--out", path))
    return path


def test_the_same_bytes_and_after_a_worker_is_killed(
    model_folder: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    build = begun(model_folder, corpus, "--out", path, "--ray", "local", "--workers", "2")
    os.kill(worker(path, build), signal.SIGKILL)
    ended(build)
    assert snapshot(path) == snapshot(whole)


def test_a_build_goes_on_when_its_driver_was_killed(
    model_folder: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    build = begun(model_folder, corpus, "--out", path, "--ray", "local")
    worker(path, build)
    build.kill()
    build.communicate()
    assert not (path / "manifest.json").exists()
    ended(begun(model_folder, corpus, "--out", path, "--ray", "local", "--workers", "1"))
    assert snapshot(path) == snapshot(whole)


def test_what_cannot_be_is_said(model_folder: str, corpus: Path, tmp_path: Path) -> None:
    build = begun(model_folder, corpus, "--out", tmp_path / "m", "--ray", "127.0.0.1:9")
    _, said = build.communicate(timeout=300)
    assert build.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:9'" in " ".join(said.decode().split())
    assert not (tmp_path / "m" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
