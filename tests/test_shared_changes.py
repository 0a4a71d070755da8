# ruff: noqa: F811 - fixtures of another file
"""Clusters and indexes that workers make, a segment each: the bytes of one process."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import snapshot
from folders import files, live_files
from forked import Forks
from nearest import Memory
from nearest.build import cluster, segments, workers
from nearest.build.cluster import ClusterSpec
from nearest.cli import app
from nearest.errors import FolderError, NearestError, SettingError
from nearest.store.verify import verify
from segments import Model, model, threads, whole  # noqa: F401 - fixtures

CHANGES: dict[str, Callable[..., Memory]] = {
    "k-means": lambda memory, **how: memory.cluster(12, **how),
    "lists": lambda memory, **how: memory.reindex("IVF3,SQ8", **how),
    "exact": lambda memory, **how: memory.reindex("exact", **how),
}


@pytest.fixture(params=["as built", "removed", "merged"])
def memory(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> Memory:
    memory = Memory.open(shutil.copytree(whole, tmp_path / "m"))
    if request.param == "as built":
        return memory
    memory = memory.remove([memory.document(3).id])
    return memory if request.param == "removed" else memory.compress(merge=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [1, 2])
def test_workers_write_the_same_bytes(
    change: str, count: int, memory: Memory, tmp_path: Path
) -> None:
    other = Memory.open(shutil.copytree(memory.path, tmp_path / "other"))
    told: list[tuple[str, int, int | None]] = []
    shared = CHANGES[change](memory, workers=count, progress=lambda *step: told.append(step))
    CHANGES[change](other)
    assert snapshot(shared.path) == snapshot(other.path)
    assert verify(shared.path) == []
    assert files(shared.path) == live_files(shared.path)
    beside = len(memory.segments) - (change != "k-means")
    assert told[-1] == ("segments", beside, beside)


@pytest.mark.usefixtures("threads")
def test_the_commands(whole: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("1", "2")]
    for path, sharing in zip(paths, ([], ["--workers", "2"]), strict=True):
        for words in (["cluster", path, "--clusters", "5"], ["index", path, "--index", "IVF3,SQ8"]):
            done = CliRunner().invoke(app, [*map(str, words), *sharing, "--json"])
            assert done.exit_code == 0, done.output
    assert snapshot(paths[0]) == snapshot(paths[1])


def test_what_one_process_does_is_said(whole: Path, tmp_path: Path) -> None:
    memory = Memory.open(shutil.copytree(whole, tmp_path / "m"))
    before = snapshot(memory.path)
    with pytest.raises(SettingError, match="one process does: leave workers and ray out"):
        memory.cluster(greedy_merge=True, workers=2)
    for options in ({}, {"clusters": 3, "greedy_merge": True}):
        with pytest.raises(SettingError, match="either a number of clusters"):
            memory.cluster(**options)
    assert snapshot(memory.path) == before


@pytest.mark.usefixtures("threads")
def test_a_worker_that_fails_is_told_and_nothing_is_left(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory.open(shutil.copytree(whole, tmp_path / "m"))
    before = snapshot(memory.path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "_write_nearest", full)
        with pytest.raises(FolderError, match="the disk is full"):
            memory.cluster(5, workers=2)
    assert snapshot(memory.path) == before
    # Of a writer that was killed, and of a worker that sees another snapshot.
    left = memory.path / "build" / "000000.change.abc" / "000001"
    left.mkdir(parents=True)
    (left / "record.json").touch()
    spec = ClusterSpec(version=memory.manifest.version + 1)
    with pytest.raises(FolderError, match="is another snapshot than the one that is changed"):
        spec.work(left.parent, "w")
    memory.cluster(5, workers=1)
    assert files(memory.path) == live_files(memory.path)


@pytest.mark.parametrize("change", ["k-means", "lists"])
def test_a_worker_is_killed(
    change: str, model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its second segment; another does that and what is left."""
    paths = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("1", "2")]

    def mortal() -> None:
        kind = segments.NewFiles

        def deadly(*words: Any) -> Any:
            begun = len(list(tmp_path.glob("begun *")))
            (tmp_path / f"begun {begun}").touch()
            if begun == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return kind(*words)

        segments.NewFiles = deadly  # type: ignore[misc, assignment]

    monkeypatch.setattr(workers, "local_workers", forks := Forks(model, mortal))
    CHANGES[change](Memory.open(paths[0]), workers=1)
    assert len(forks.pids) == 2
    CHANGES[change](Memory.open(paths[1]))
    assert snapshot(paths[0]) == snapshot(paths[1])


def test_a_segment_that_ends_its_process(
    model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory.open(shutil.copytree(whole, tmp_path / "m"))
    before = snapshot(memory.path)

    def mortal() -> None:
        def deadly(*_: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        segments.NewFiles = deadly  # type: ignore[misc, assignment]

    monkeypatch.setattr(workers, "local_workers", Forks(model, mortal))
    with pytest.raises(NearestError, match="that reads segment 000001 ends each time"):
        memory.cluster(5, workers=1)
    assert snapshot(memory.path) == before
    assert json.loads((memory.path / "manifest.json").read_bytes())["clusters"] is None
