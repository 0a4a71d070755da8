"""Searches on a GPU, whose part is played by the CPU; on a real one: test_cuda.py."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import random_documents
from folders import Build
from nearest import Memory
from nearest.errors import SettingError
from nearest.index import approximate, gpu
from nearest.index.gpu import GpuScan
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import Metric, Neighbours, sort_nearest_first

DOCUMENTS = list(random_documents())[:4]
QUERIES = np.random.default_rng(0).normal(scale=3, size=(5, 32)).astype(np.float32)
SCANNED = ["exact", "IVF4,SQ8", "IVF4,PQ8x4fs", "HNSW8"]  # which FAISS does not search there


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A torch and a FAISS that have a GPU; collects the indexes that FAISS copies there."""
    indexes: list[Any] = []

    def to_all_gpus(index: Any, co: Any) -> Any:
        assert co.useFloat16
        indexes.append(index)
        return faiss.clone_index(index)

    class Options:
        useFloat16 = False  # noqa: N815

    monkeypatch.setattr(gpu, "gpu_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", Options, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_all_gpus)
    return indexes


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_scan_equals_brute_force(
    metric: Metric, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_SCORES", 700)  # three queries at once
    monkeypatch.setattr(gpu, "_READ", 33)
    keys, queries = (rng.normal(size=(n, 16)).astype(np.float32) for n in (300, 20))
    ids = np.sort(rng.choice(300, 200, replace=False))
    scan = GpuScan(FloatKeys(keys, metric), ids, torch.device("cpu"))
    wide, asked = keys[ids].astype(float), queries[:, None].astype(float)
    exact = ((asked - wide) ** 2).sum(-1) if metric == "l2" else -(asked * wide).sum(-1)
    for k in (1, 7, 200):
        found = scan.search(queries, k)
        np.testing.assert_array_equal(found.ids, ids[exact.argsort(1)[:, :k]])
        np.testing.assert_allclose(found.distances, np.sort(exact, 1)[:, :k], rtol=1e-4, atol=1e-4)
    found = scan.search(queries, 210)
    assert (found.ids[:, 200:] == -1).all()
    assert np.isposinf(found.distances[:, 200:]).all()
    np.testing.assert_allclose(
        scan.distances(queries, ids[None, :9].repeat(20, 0)), exact[:, :9], rtol=1e-4
    )


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_scan_is_exact_where_torch_may_round_products(
    metric: Metric, precision: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with TF32: the keys differ by less than their products are rounded."""
    centre = rng.normal(size=64)
    keys, queries = (
        (centre + 0.001 * rng.normal(size=(n, 64))).astype(np.float32) for n in (3000, 20)
    )
    bits = {"high": 13, "medium": 16}[precision]  # of the 23 of a float32, dropped
    scan = GpuScan(FloatKeys(keys, metric), np.arange(3000), torch.device("cpu"))
    scan._rows = torch.from_numpy((keys.view(np.uint32) >> bits << bits).view(np.float32))
    everything = np.arange(3000)[None].repeat(20, 0)
    measured = Neighbours(everything, scan.distances(queries, everything))
    truth = sort_nearest_first(measured, 8)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    np.testing.assert_array_equal(scan.search(queries, 8).ids, truth.ids)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert (scan.search(queries, 8).ids != truth.ids).any()  # the rounding does matter here


@pytest.mark.parametrize("index", SCANNED)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_what_has_no_form_there_is_scanned(
    build_memory: Build, tiny_model: PreTrainedModel, copied: list[Any], index: str, metric: str
) -> None:
    path = build_memory(tiny_model, DOCUMENTS, index=index, metric=metric).path
    exact = build_memory(tiny_model, DOCUMENTS, metric=metric).path
    memory, reference = Memory.open(path, search_on="gpu"), Memory.open(exact)
    for gone in ([], ["doc-1"]):
        if gone:
            memory, reference = memory.remove(gone), reference.remove(gone)
        found, expected = memory.search(QUERIES, 9), reference.search(QUERIES, 9)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-5)
        by_index = memory.index_distances(QUERIES, found.ids)
        np.testing.assert_allclose(by_index, found.distances, rtol=1e-5)
    assert not copied


def test_in_lists_there_are_at_most_so_many_neighbours(
    build_memory: Build,
    tiny_model: PreTrainedModel,
    copied: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The margin is cut to what can be found, and removed entries do not ask for more."""
    monkeypatch.setattr(approximate, "MOST_IN_LISTS", 20)
    path = build_memory(tiny_model, DOCUMENTS, index="IVF4,Flat", nprobe=4).path
    memory = Memory.open(path, search_on="gpu").remove([DOCUMENTS[3].id])
    reference = Memory.open(path)
    for k in (5, 12):
        found = memory.search(QUERIES, k, rerank=100)
        assert found.ids.shape == (5, k)
        clear = found.ids >= 0
        assert clear[:, :5].all()
        expected = reference.search(QUERIES, k)
        np.testing.assert_array_equal(found.ids[clear], expected.ids[clear])
    with pytest.raises(
        SettingError, match="30 neighbours were asked for, and on a GPU FAISS finds"
    ):
        memory.search(QUERIES, 30)


def test_a_refreshed_memory_stays_there(
    build_memory: Build, tiny_model: PreTrainedModel, copied: list[Any]
) -> None:
    path = build_memory(tiny_model, DOCUMENTS).path
    memory = Memory.open(path, search_on="gpu").remove([DOCUMENTS[1].id])
    assert memory.search_on == "gpu"


def test_what_cannot_be_is_said(
    build_memory: Build,
    tiny_model: PreTrainedModel,
    copied: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path: Path = build_memory(tiny_model, DOCUMENTS, index="IVF4,Flat").path

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Error in cloner: 'false' failed: out of memory")

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refused)
    with pytest.raises(SettingError, match=r"on a GPU \(out of memory\): build the default one"):
        Memory.open(path, search_on="gpu").search(QUERIES, 5)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)  # then lists are scanned, too
    memory = Memory.open(path, search_on="gpu")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        with pytest.raises(SettingError, match="keys of 32 dims"):
            memory.search(QUERIES, 5)
    with pytest.raises(SettingError, match="'tpu' is unknown: choose cpu or gpu"):
        Memory.open(path, search_on="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU here")
def test_without_a_gpu_there_is_none_to_search_on(
    build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    path: Path = build_memory(tiny_model, DOCUMENTS).path
    with pytest.raises(SettingError, match="torch finds no GPU to search on"):
        Memory.open(path, search_on="gpu")
