# ruff: noqa: F811 - fixtures of another file
"""What Ray is asked, by a stand-in that runs tasks in threads; tests/cluster has the real one."""

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import snapshot
from nearest import Document, Memory
from nearest.build.ray_workers import _room, ray_workers
from nearest.build.workers import Spec
from nearest.encode import loading
from nearest.errors import FolderError, NearestError, SettingError
from segments import DOCUMENTS, OPTIONS, Model, load_one_at_a_time, model, whole  # noqa: F401


class TaskError(Exception):
    """As Ray tells of an error that was raised in a task."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a task failed")
        self.cause = cause


class Ray(ModuleType):
    """As much of `ray` as is used; `calls` says what was asked."""

    def __init__(self, cpus: int = 8, answers: bool = True) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.calls: list[tuple[str, Any]] = []
        self.free = cpus  # of them, as long as nobody asks
        self._cpus, self._answers, self._up = cpus, answers, False
        self._pool = ThreadPoolExecutor(8)

    def is_initialized(self) -> bool:
        return self._up

    def init(self, **options: Any) -> None:
        if not self._answers:
            raise ConnectionError("nobody is there\nand more")
        self._up = True
        self.calls.append(("init", options))

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 1000.0}}
        return [{"Alive": True, "Resources": {"CPU": float(self._cpus)}}, gone]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._cpus)}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(self.free)} if self.free else {}

    def remote(self, **options: Any) -> Any:
        self.calls.append(("remote", options))
        return lambda work: _Task(lambda *args: self._pool.submit(_raised, work, *args))

    def cancel(self, task: "_Task", *, force: bool) -> None:
        self.calls.append(("cancel", force))

    def shutdown(self) -> None:
        self._up = False
        self.calls.append(("shutdown", None))


class _Task:
    def __init__(self, submit: Any) -> None:
        self._submit, self._future = submit, Future[None]()

    def remote(self, *args: Any) -> "_Task":
        started = _Task(None)
        started._future = self._submit(*args)
        return started

    def future(self) -> "Future[None]":
        return self._future


def _raised(work: Any, *args: Any) -> None:
    try:
        work(*args)
    except Exception as error:
        raise TaskError(error) from error


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    load_one_at_a_time(monkeypatch)


def test_workers_on_a_cluster_make_the_same_bytes(
    model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := Ray())
    memory = Memory.build(*model, DOCUMENTS, tmp_path / "m", tune=False, ray="auto", **OPTIONS)
    assert snapshot(memory.path) == snapshot(whole)
    threads = torch.get_num_threads()
    asked = dict(ray.calls)
    assert asked["init"]["address"] == "auto"
    assert "object_store_memory" not in asked["init"]  # of a cluster that is there
    assert asked["remote"] == {"num_cpus": threads, "num_gpus": 0, "max_retries": 0}
    assert [name for name, _ in ray.calls].count("cancel") == 8 // threads  # as many as have room
    assert ray.calls[-1] == ("shutdown", None)

    before = len(ray.calls)
    ray.init(address="mine")  # somebody uses it already
    path = tmp_path / "n"
    Memory.build(*model, DOCUMENTS, path, tune=False, ray="local", workers=1, **OPTIONS)
    assert snapshot(path) == snapshot(whole)
    assert [name for name, _ in ray.calls[before:]] == ["init", "remote", "cancel"]
    assert ray.is_initialized()


def test_what_is_said_where_there_is_none(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread() -> Iterator[Document]:
        raise AssertionError("the cluster is tried before a document is read")
        yield

    def build(address: str = "auto") -> None:
        Memory.build(*model, unread(), tmp_path / "m", ray=address, **OPTIONS)

    monkeypatch.setitem(sys.modules, "ray", Ray(answers=False))
    with pytest.raises(SettingError, match=r"at 'auto' \(nobody is there\): start one"):
        build()
    with pytest.raises(SettingError, match=r"at '127.0.0.1:9' \(.*refused\): start one"):
        build("127.0.0.1:9")
    with pytest.raises(SettingError, match=r"at 'head:port' \(invalid literal.*\): start one"):
        build("head:port")
    monkeypatch.setitem(sys.modules, "ray", Ray(cpus=0))
    with pytest.raises(SettingError, match=r"no node of this cluster has \d+ CPU, which"):
        build()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NearestError, match=r"pip install '\.\[ray\]'"):
        build()
    assert not (tmp_path / "m").exists()


def test_it_is_said_what_workers_wait_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(cpus=6))
    spec = Spec(threads=2)
    for before, now, told in ((6, 0, False), (0, 6, False), (1, 1, True)):
        ray.free = before
        with ray_workers(tmp_path, spec, "auto") as (_, room, waiting):
            ray.free = now
            assert room == 3
            assert bool(said := waiting()) == told
    assert said is not None
    assert "of the 6 CPUs of the Ray cluster 1 are free, and a worker takes 2" in said


def test_a_gpu_that_no_node_has_is_what_is_missed() -> None:
    node = {"Alive": True, "Resources": {"CPU": 8.0}}
    for nodes, threads, message in (
        ([node], 4, "no node of this cluster has a GPU"),
        ([node, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}], 4, "has a GPU"),
        ([node, {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}], 4, "4 CPU and 1 GPU"),
    ):
        with pytest.raises(SettingError, match=message):
            _room(nodes, Spec(threads=threads, gpus=1))


def test_errors_of_workers_are_told(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", Ray())
    for error, told, message in (
        (FolderError("no room on that node"), FolderError, "no room on that node"),
        (
            MemoryError("too large"),
            NearestError,
            "end before they have begun: MemoryError: too large",
        ),
    ):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(loading, "load_model_and_tokenizer", fails)
        with pytest.raises(told, match=message):
            Memory.build(*model, DOCUMENTS, tmp_path / "m", ray="auto", **OPTIONS)
        assert not (tmp_path / "m" / "manifest.json").exists()
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
