"""How workers are started and replaced, with workers that do next to nothing."""

import itertools
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from nearest.build import process, workers
from nearest.build.files import Files, beside_others, by_one, here
from nearest.build.ray_workers import _meant
from nearest.build.workers import (
    Crew,
    Spec,
    WorkerEndedError,
    WorkerFailedError,
    drive,
    local_workers,
    telling,
    told,
)
from nearest.errors import CorpusError, NearestError
from nearest.store.claims import Watch, owner_here


class Idle(Spec, frozen=True, kw_only=True):
    """Of a worker that is never run here."""


def four(tmp_path: Path) -> Files:
    return Files([tmp_path / f"{number}" for number in range(4)], str, "make")


def ended(error: BaseException | None) -> "Future[None]":
    future: Future[None] = Future()
    future.set_result(None) if error is None else future.set_exception(error)
    return future


# --- what drives them -----------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [True, False])
def test_workers_that_end_between_tasks_are_replaced_while_others_finish_some(
    finish: bool, tmp_path: Path
) -> None:
    work, started = four(tmp_path), []

    def start(token: str) -> "Future[None]":
        started.append(token)
        if finish and len(started) % 3 == 0:
            work.paths[len(started) // 3 - 1].touch()
            return ended(None)
        return ended(WorkerEndedError("its node is gone"))

    if finish:
        drive(work, Crew(start, 1))
        assert len(started) == 12
    else:
        with pytest.raises(NearestError, match="end before they have begun: its node is gone"):
            drive(work, Crew(start, 1))
        assert len(started) == 3


def test_deaths_end_nothing_while_others_are_at_work(tmp_path: Path) -> None:
    """One holds a claim, while those beside it end one after the other."""
    work, started = four(tmp_path), []
    at_work: Future[None] = Future()

    def start(token: str) -> "Future[None]":
        started.append(token)
        if len(started) == 1:
            assert Watch(owner_here(token)).take(work.paths[0]) is not None
            return at_work
        if len(started) == 8:
            for path in work.paths:
                path.touch()
            at_work.set_result(None)
            return ended(None)
        return ended(WorkerEndedError("its node is gone"))

    drive(work, Crew(start, 2))
    assert len(started) == 8


def test_workers_that_see_another_folder_are_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "STALE", -1.0)
    with pytest.raises(NearestError, match="end well, and yet 4 tasks are not done"):
        drive(four(tmp_path), Crew(lambda _: ended(None), 2))


def test_it_is_said_what_workers_wait_for_that_do_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SILENCE", -1.0)
    work, waiting, asked = four(tmp_path), Future[None](), []

    def why() -> str | None:
        asked.append(len(asked))
        if len(asked) == 2:  # they begin as soon as it is said
            waiting.set_result(None)
            for path in work.paths:
                path.touch()
        return "for a free CPU" if len(asked) == 2 else None

    with pytest.warns(UserWarning, match="for a free CPU"):
        drive(work, Crew(lambda _: waiting, 1, why))
    assert len(asked) == 2


def test_nothing_is_said_of_waiting_where_a_task_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SILENCE", -1.0)
    work, held = four(tmp_path), Watch(owner_here("one"))
    assert held.take(work.paths[3]) is not None
    waiting, reports = Future[None](), itertools.count()

    def report() -> None:
        if next(reports) == 3:
            waiting.set_result(None)
            for path in work.paths:
                path.touch()

    monkeypatch.setattr(work, "report", report)

    def why() -> str:
        raise AssertionError("one has begun")

    drive(work, Crew(lambda _: waiting, 1, why))


def test_a_folder_that_goes_with_the_work_ends_it(tmp_path: Path) -> None:
    """As where another part has joined all blocks and taken them away."""
    folder = tmp_path / "blocks"
    folder.mkdir()
    work = Files([folder / "0", folder / "1"], str, "make")

    def make(number: int, place: Path) -> None:
        folder.rename(tmp_path / "gone")
        place.write_bytes(b"")

    assert work.left() == [0, 1]
    assert not beside_others(Watch(owner_here()))(work, make)
    assert work.left() == []


# --- their errors ---------------------------------------------------------------------------------


def test_an_error_of_the_program_is_told_with_its_kind(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process, and by a cluster; what is said of a task then has no advice about memory."""

    def odd(*_: Any) -> None:
        raise ValueError("odd\nand more")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(Idle, "work", odd)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(process, "_end_with_parent", lambda: None)
    monkeypatch.setattr("sys.argv", ["", f"{__name__}:Idle", str(tmp_path), "w0", "{}"])
    with pytest.raises(SystemExit):
        process.main()
    said, beside = capfdbinary.readouterr()
    assert b"Traceback" in beside
    task_error = Exception("a task failed")
    task_error.cause = ValueError("odd\nand more")  # type: ignore[attr-defined]
    for error in (told(said), _meant(task_error)):
        assert error is not None
        assert str(error) == "ValueError: odd"
        message = str(four(tmp_path).hopeless(3, error))
        assert message == "the process that reads 3 fails each time (ValueError: odd)"
    for plain in (KeyError("x"), AssertionError()):
        assert str(told(telling(plain))).startswith(type(plain).__name__)
    large = told(telling(MemoryError("too large")))
    assert large is not None
    assert "(MemoryError: too large): leave that out, or give it more memory" in str(
        four(tmp_path).hopeless(3, large)
    )
    assert isinstance(told(telling(CorpusError("no"))), CorpusError)


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.slow  # a process that loads torch
def test_modules_are_not_looked_for_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    with (
        local_workers(tmp_path, Idle(), 1) as start,
        pytest.raises(WorkerFailedError, match=__name__),
    ):
        start("w0").result()  # there is no such module for it


def test_a_worker_that_is_being_started_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[subprocess.Popen[bytes]] = []

    class Slow(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            time.sleep(0.3)
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    with local_workers(tmp_path, Idle(), 1, ["sh", "-c", "sleep 60"]) as start:
        future = start("w0")
        while not future.running():
            time.sleep(0.001)
    assert made[0].returncode == -9


# --- what one of several does ---------------------------------------------------------------------


def test_one_goes_on_and_the_others_wait_for_it(tmp_path: Path) -> None:
    path, order = tmp_path / "blocks/whole", []
    path.parent.mkdir()

    def first() -> None:
        assert Watch(owner_here()).take(path) is None  # nobody else does it meanwhile
        order.append("first")

    by_one(path, first)
    by_one(path, lambda: order.append("second"))
    path.parent.rename(tmp_path / "gone")
    by_one(path, lambda: order.append("never"))
    assert order == ["first", "second"]


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_made_is_not_looked_for_again(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Files([tmp_path / f"{number}" for number in range(200)], str, "make")
    looked: list[Path] = []
    exists: Callable[[Path], bool] = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: bool(looked.append(path)) or exists(path))
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("the folder is not read"))
    maker = beside_others(Watch(owner_here())) if shared else here
    assert maker(work, lambda _, place: place.touch()) != shared
    assert work.left() == []
    assert len(looked) < 8 * 200
