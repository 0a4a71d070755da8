"""A memory whose segments actors hold, by a stand-in for Ray; tests/cluster has the real one."""

import asyncio
import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from folders import Build
from nearest import Document, Memory, evaluate
from nearest.cli.app import open_memory
from nearest.errors import FolderError, RemoteError, SettingError
from nearest.index import gpu
from nearest.remote.servers import Patience
from nearest.remote.sharded import ShardedMemory
from test_ray_workers import Ray

HASTY = Patience(answer=60.0, tries=2, pause=0.01, failures=2, rest=0.05)
TEXTS = make_documents(8, 30)


class RayError(Exception):
    """As Ray tells of an actor that does not answer."""


class Actors(Ray):
    """Ray with actors, which answer in one thread; those in `lost` do not."""

    def __init__(self, cpus: int = 64) -> None:
        super().__init__(cpus)
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.lost: set[str] = set()
        self.alive: set[str] = set()
        self._loop, self._one = asyncio.new_event_loop(), asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def remote(self, **options: Any) -> Any:
        self.calls.append(("remote", options))
        return lambda kind: SimpleNamespace(remote=lambda *args: self._begun(kind, *args))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self._cpus), "GPU": 2.0}}]

    def _begun(self, kind: Any, path: str, shard: str, search_on: str) -> Any:
        self.alive.add(shard)
        actor = kind(path, shard, search_on)

        async def answer(*request: Any) -> Any:
            if shard in self.lost:
                raise RayError(f"actor {shard} died\nand more")
            async with self._one:  # pydantic makes one application of a process at a time
                return await actor.respond(*request)

        def respond(*request: Any) -> "Future[Any]":
            return asyncio.run_coroutine_threadsafe(answer(*request), self._loop)

        return SimpleNamespace(respond=SimpleNamespace(remote=respond), shard=shard)

    def get(self, asked: "Future[Any]", timeout: float) -> Any:
        return asked.result(timeout)

    def kill(self, actor: Any) -> None:
        self.alive.remove(actor.shard)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Actors]:
    monkeypatch.setitem(sys.modules, "ray", stand_in := Actors())
    yield stand_in
    stand_in.end()


@pytest.fixture(scope="module")
def memory(
    build_memory: Build, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Memory:
    """Three segments; texts stand in several, so that keys are equal, and one is gone."""
    memory = build_memory(tiny_model, TEXTS[:4])
    for n, some in enumerate((TEXTS[4:], TEXTS[:3])):
        again = [Document(f"{n}-{one.id}", one.text) for one in some]
        memory = memory.add(tiny_model, tiny_tokenizer, again)
    return memory.remove(["doc-1"])


def test_actors_find_what_one_process_finds(memory: Memory, ray: Actors) -> None:
    opened = Memory.open(memory.path, shards="ray://auto", patience=HASTY)
    assert isinstance(opened, ShardedMemory)
    asked = dict(ray.calls)
    assert asked["init"]["address"] == "auto"
    assert asked["remote"]["num_cpus"] == torch.get_num_threads()
    assert (asked["remote"]["num_gpus"], asked["remote"]["max_restarts"]) == (0, -1)
    assert ray.alive == {"1/3", "2/3", "3/3"}  # one a segment
    queries = memory.keys.rows(memory.keyed_entries()[::9])
    expected, found = memory.search(queries, 9), opened.search(queries, 9)
    assert (np.diff(expected.distances, axis=1) == 0).sum() > 50  # ties
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(opened.values(found.ids), memory.values(expected.ids))
    assert opened.document(5).text == memory.document(5).text
    assert opened.number_of("doc-1") is None
    with pytest.raises(SettingError, match="needs its folder"):
        opened.compact()
    del opened
    gc.collect()
    assert ray.alive == set()
    assert ray.is_initialized()  # other memories may be open


def test_actors_search_on_gpus(
    memory: Memory, ray: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_device", lambda: torch.device("cpu"))
    scans: list[Any] = []
    scan = gpu.GpuScan._scan
    monkeypatch.setattr(gpu.GpuScan, "_scan", lambda *args: (scans.append(args), scan(*args))[1])
    opened = Memory.open(memory.path, "gpu", shards="ray://auto", patience=HASTY)
    asked = dict(ray.calls)
    assert (asked["remote"]["num_gpus"], ray.alive) == (1, {"1/2", "2/2"})  # one a GPU
    queries = memory.keys.rows(memory.keyed_entries()[::9])
    expected, found = memory.search(queries, 9), opened.search(queries, 9)
    assert scans
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


@pytest.mark.slow
def test_texts_are_scored_as_with_one(
    memory: Memory, ray: Actors, tiny_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    opened = Memory.open(memory.path, shards="ray://auto", patience=HASTY)
    texts = make_documents(1, 5, seed=5)
    (own,), (over,) = (
        evaluate(tiny_model, some, texts, ["knn"], tokenizer=tiny_tokenizer)
        for some in (memory, opened)
    )
    assert over.nll == pytest.approx(own.nll, rel=1e-9)


def test_a_lost_actor_is_waited_for_and_named(memory: Memory, ray: Actors) -> None:
    queries = memory.keys.rows(np.arange(3))
    options: dict[str, Any] = {"shards": "ray://local", "actors": 2, "patience": HASTY}
    opened = Memory.open(memory.path, wait=0.0, **options)
    partly = Memory.open(memory.path, partial=True, **options)
    ray.lost = {"2/2"}
    named = r"shard 2/2 \(ray://local\) does not answer .*RayError: actor 2/2 died\): try again"
    with pytest.raises(RemoteError, match=named):
        opened.search(queries, 5)
    with pytest.warns(UserWarning, match="answers are partial.*shard 2/2"):
        assert partly.search(queries, 5).ids.max() < memory.bounds[2]
    opened._shards._wait = 60.0
    threading.Timer(0.1, ray.lost.clear).start()
    np.testing.assert_array_equal(opened.search(queries, 5).ids, memory.search(queries, 5).ids)
    ray.shutdown()
    opened._shards._wait = 0.0
    with pytest.raises(RemoteError, match="has left the cluster"):
        opened.search(queries, 5)
    del opened, partly
    gc.collect()
    assert ray.alive == {"1/2", "2/2"}  # nobody was asked to end them: they ended with the cluster


def test_snapshots_are_not_mixed(
    build_memory: Build, ray: Actors, tiny_model: PreTrainedModel, tiny_tokenizer: Any
) -> None:
    memory = build_memory(tiny_model, TEXTS[:3]).add(tiny_model, tiny_tokenizer, TEXTS[3:5])
    opened = Memory.open(memory.path, shards="ray://auto", patience=HASTY)
    after = memory.add(tiny_model, tiny_tokenizer, TEXTS[5:])
    queries = after.keys.rows(after.keyed_entries()[::9])
    with pytest.raises(FolderError, match="has changed"):
        opened.search(queries, 2)
    fresh = opened.refresh()
    np.testing.assert_array_equal(fresh.search(queries, 6).ids, after.search(queries, 6).ids)
    assert ray.alive == {"1/2", "2/2"}  # the same actors


def test_a_command_names_folder_and_cluster(memory: Memory, ray: Actors) -> None:
    ray.init(address="mine")
    opened = open_memory(Path(f"ray://auto/{memory.path}"), patience=HASTY)
    assert isinstance(opened, ShardedMemory)
    assert (opened.name, opened.entries) == ("test", memory.entries)
    assert open_memory(opened.path, patience=HASTY).entries == memory.entries


def test_what_cannot_be_is_said(memory: Memory, ray: Actors, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="a list of addresses, one of each shard, or ray://"):
        Memory.open(memory.path, shards="http://127.0.0.1:1")
    with pytest.raises(FolderError, match="not a memory"):
        Memory.open(tmp_path, shards="ray://auto")
    with pytest.raises(SettingError, match="'tpu' is unknown: choose cpu or gpu"):
        Memory.open(memory.path, "tpu", shards="ray://auto", patience=HASTY)
    for actors in (0, 65):
        with pytest.raises(SettingError, match="has room for 1 to"):
            Memory.open(memory.path, shards="ray://auto", actors=actors)
    with pytest.raises(FolderError, match="/ is not a memory"):
        open_memory(Path("ray://auto"))
