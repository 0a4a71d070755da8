# ruff: noqa: F811 - fixtures of another file
"""Workers that are killed, stopped or out of room, and drivers that end: the same bytes, or a word.

`make test-cluster` runs every case.
"""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import snapshot
from forked import Forks, kill, later
from nearest import Document, Memory
from nearest.build import workers
from nearest.build.build import BuildOptions
from nearest.build.join import join
from nearest.encode import encoder
from nearest.errors import FolderError, NearestError
from nearest.store import journal as unfinished
from nearest.store.claims import held_by
from nearest.store.verify import verify
from segments import DOCUMENTS, OPTIONS, Model, model, parts_of, whole  # noqa: F401 - fixtures


def slow(seconds: float) -> Callable[[], None]:
    """Let every forward pass of a worker take so long, and note each on the disk."""

    def patch() -> None:
        encode = encoder.encode_keys

        def slowly(*args: Any) -> Any:
            time.sleep(seconds)
            return encode(*args)

        encoder.encode_keys = slowly
        unfinished._SECONDS = 0

    return patch


def wait_for(met: Callable[[], Any]) -> None:
    while not met():
        time.sleep(0.005)


def build(
    model: Model, path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Memory:
    monkeypatch.setattr(workers, "local_workers", forks)
    fields = {"workers": 2, "tune": False, **OPTIONS, **options}
    return Memory.build(*model, fields.pop("documents", DOCUMENTS), path, **fields)


SEEDS = [pytest.param(seed, marks=[pytest.mark.long] if seed >= 1 else []) for seed in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_is_killed(
    seed: int, model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    forks = Forks(model, slow(0.01))
    path = tmp_path / "m"

    def strike() -> None:
        wait_for(lambda: list(path.glob("build/*.claim")))
        time.sleep(rng.uniform(0, 0.6))
        kill(rng.choice(forks.pids))

    timer = later(0, strike)
    memory = build(model, path, forks, monkeypatch)
    timer.join()
    assert len(forks.pids) <= 3
    assert snapshot(memory.path) == snapshot(whole)
    assert verify(memory.path) == []


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2))])
def test_a_worker_is_stopped_and_goes_on(
    seed: int, model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than its claim is good for, so that two do the same work."""
    forks = Forks(model, slow(0.02), stale=0.4)
    rng = random.Random(seed)
    path = tmp_path / "m"

    def stop() -> None:
        wait_for(lambda: list(path.glob("build/*.claim")))
        time.sleep(rng.uniform(0.1, 0.3))
        os.kill(forks.pids[0], signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(forks.pids[0], signal.SIGCONT)

    timer = later(0, stop)
    memory = build(model, path, forks, monkeypatch)
    timer.join()
    assert snapshot(memory.path) == snapshot(whole)


@pytest.mark.slow
def test_a_node_is_gone_for_good(
    model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says that its worker ended: its claim stays, with what it wrote, until it is old."""
    forks, path = Forks(model, slow(0.02), stale=0.6), tmp_path / "m"
    lost: list[str] = []

    def lose() -> bool:
        """Stop a worker that makes keys, for good, and let its claim be of another host."""
        for file in path.glob("build/*.keys.claim"):
            pid = forks.pids[0]
            os.kill(pid, signal.SIGSTOP)  # what it would write is lost with its node
            owner = held_by(file.with_name(file.name.removesuffix(".claim"))) or ""
            if f"-{pid}-" in owner:
                gone = owner.replace(socket.gethostname(), "another-host")
                file.write_text(gone)
                for left in path.glob(f"build/*.files.{owner}"):
                    left.rename(left.with_name(left.name.replace(owner, gone)))
                lost.append(gone)
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    timer = later(0, lambda: wait_for(lose))
    memory = build(model, path, forks, monkeypatch)
    timer.join()
    assert len(lost) == 1
    assert snapshot(memory.path) == snapshot(whole)
    assert verify(memory.path) == []


def test_a_document_that_ends_its_process(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named after the second time, and the others' work is kept."""
    poison = model[1]("\x7f", add_special_tokens=False)["input_ids"][0]
    bad = Document("bad one", "harmless, then \x7f, then more")
    documents = [*DOCUMENTS[:4], bad, *DOCUMENTS[4:]]
    encode = encoder.encode_keys

    def mortal() -> None:
        def deadly(read: Any, layer: Any, inputs: Any, *rest: Any) -> Any:
            if (inputs == poison).any():
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(read, layer, inputs, *rest)

        encoder.encode_keys = deadly

    forks, path = Forks(model, mortal), tmp_path / "m"
    options = {"documents": documents, "batch_size": 4}
    with pytest.raises(NearestError, match="that reads document 'bad one' ends each time"):
        build(model, path, forks, monkeypatch, **options)
    assert len(forks.pids) >= 3
    assert not (path / "manifest.json").exists()
    assert list(path.glob("build/*.keys.done.json"))
    memory = Memory.build(*model, documents, path, tune=False, **{**OPTIONS, "batch_size": 4})
    assert memory.documents == len(documents)
    again = Memory.build(
        *model, documents, tmp_path / "n", tune=False, **{**OPTIONS, "batch_size": 4}
    )
    assert snapshot(memory.path) == snapshot(again.path)


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_worker_without_room(
    which: str, model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, nothing published, and the build goes on when there is room."""

    def small() -> None:
        try:
            (tmp_path / "first").touch(exist_ok=which == "all")
        except FileExistsError:  # by the one that is small
            return slow(0.05)()
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))

    path = tmp_path / "m"
    with pytest.raises(FolderError, match=r"cannot write to .*m: a file would exceed the size"):
        build(model, path, Forks(model, small), monkeypatch)
    assert not (path / "manifest.json").exists()
    memory = build(model, path, Forks(model), monkeypatch, workers=3)
    assert snapshot(memory.path) == snapshot(whole)


def test_a_part_is_cut_short(model: Model, whole: Path, tmp_path: Path) -> None:
    options = BuildOptions(**OPTIONS)
    paths = parts_of(tmp_path, model, 2)
    for file in sorted(paths[1].rglob("*.npy")):
        cut = Path(shutil.copytree(paths[1], tmp_path / "cut"))
        place = cut / file.relative_to(paths[1])
        os.truncate(place, place.stat().st_size // 2)
        with pytest.raises(FolderError, match=f"{place.name} has "):
            join([paths[0], cut], tmp_path / "m", options)
        assert not (tmp_path / "m").exists()
        shutil.rmtree(cut)
    join(paths, tmp_path / "m", options)
    assert snapshot(tmp_path / "m") == snapshot(whole)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0.0, 0.2, 1.0])
def test_the_driver_is_killed(
    seconds: float, model: Model, model_folder: str, whole: Path, tmp_path: Path
) -> None:
    """Its workers end with it; another number of workers goes on."""
    path = tmp_path / "m"
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import random_documents\n"
        "from nearest import Memory\n"
        "from nearest.encode.loading import load_model_and_tokenizer as load\n"
        f"Memory.build(*load({model_folder!r}), random_documents(), {str(path)!r},"
        f" workers=2, tune=False, **{OPTIONS!r})\n"
    )
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script]) as driver:
        while not list(path.glob("build/*.claim")) and driver.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        driver.kill()
    time.sleep(1)
    if not (path / "manifest.json").exists():
        Memory.build(*model, DOCUMENTS, path, tune=False, **OPTIONS)
    assert snapshot(path) == snapshot(whole)
