"""Searches on a GPU, with FAISS's part of it played by copies on the CPU."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from transformers import PreTrainedModel

from conftest import random_documents
from folders import Build
from nearest import Memory
from nearest.errors import SettingError
from nearest.index import approximate
from nearest.memory import search

DOCUMENTS = list(random_documents())[:4]
QUERIES = np.random.default_rng(0).normal(scale=3, size=(5, 32)).astype(np.float32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A FAISS that has a GPU; collects the indexes that are copied there."""
    copied: list[Any] = []

    def to_all_gpus(index: Any) -> Any:
        copied.append(index)
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_all_gpus)
    return copied


@pytest.mark.parametrize("index", ["exact", "IVF4,SQ8"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_same_is_found_there(
    build_memory: Build, tiny_model: PreTrainedModel, gpu: list[Any], index: str, metric: str
) -> None:
    path = build_memory(tiny_model, DOCUMENTS, index=index, metric=metric).path
    found = Memory.open(path, search_on="gpu").search(QUERIES, 9)
    assert len(gpu) == 1
    expected = Memory.open(path).search(QUERIES, 9)
    assert len(gpu) == 1
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-5)


@pytest.mark.parametrize("index", ["IVF4,PQ8x4fs", "HNSW8"])
@pytest.mark.parametrize("remove", [[], ["doc-1"]])
def test_what_has_no_form_there_is_scanned_there(
    build_memory: Build, tiny_model: PreTrainedModel, gpu: list[Any], index: str, remove: list[str]
) -> None:
    path = build_memory(tiny_model, DOCUMENTS, index=index).path
    exact = build_memory(tiny_model, DOCUMENTS).path
    memory, reference = Memory.open(path, search_on="gpu"), Memory.open(exact)
    if remove:
        memory, reference = memory.remove(remove), reference.remove(remove)
    found, expected = memory.search(QUERIES, 9), reference.search(QUERIES, 9)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-5)
    assert [type(one) for one in gpu] == [faiss.IndexFlat]
    by_index = memory.index_distances(QUERIES, found.ids)
    np.testing.assert_allclose(by_index, found.distances, rtol=1e-5)


@pytest.mark.parametrize("index", ["exact", "IVF4,SQ8"])
def test_there_are_at_most_so_many_neighbours(
    build_memory: Build,
    tiny_model: PreTrainedModel,
    gpu: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    index: str,
) -> None:
    """The margin is cut to what can be found, and removed entries do not ask for more."""
    monkeypatch.setattr(approximate, "MOST_ON_GPU", 20)
    monkeypatch.setattr(search, "MOST_ON_GPU", 20)
    path = build_memory(tiny_model, DOCUMENTS, index=index, nprobe=4 if index != "exact" else None)
    memory = Memory.open(path.path, search_on="gpu").remove([DOCUMENTS[3].id])
    reference = Memory.open(path.path)
    for k in (5, 12):
        found = memory.search(QUERIES, k, candidates=100)
        assert found.ids.shape == (5, k)
        clear = found.ids >= 0
        assert clear[:, :5].all()
        expected = reference.search(QUERIES, k, candidates=100)
        np.testing.assert_array_equal(found.ids[clear], expected.ids[clear])
    with pytest.raises(
        SettingError, match="30 neighbours were asked for, and on a GPU FAISS finds"
    ):
        memory.search(QUERIES, 30)


def test_a_refreshed_memory_stays_there(
    build_memory: Build, tiny_model: PreTrainedModel, gpu: list[Any]
) -> None:
    path = build_memory(tiny_model, DOCUMENTS).path
    memory = Memory.open(path, search_on="gpu").remove([DOCUMENTS[1].id])
    assert memory.search_on == "gpu"
    left = Memory.open(path).search(QUERIES, 5).ids
    np.testing.assert_array_equal(memory.search(QUERIES, 5).ids, left)
    assert len(gpu) == 1


def test_what_cannot_be_is_said(
    build_memory: Build,
    tiny_model: PreTrainedModel,
    gpu: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = build_memory(tiny_model, DOCUMENTS, index="IVF4,SQ8").path

    def refused(_: Any) -> Any:
        raise RuntimeError("Error in cloner: 'false' failed: This index type is not implemented")

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refused)
    with pytest.raises(SettingError, match=r"not implemented\): build another one \(`nearest ind"):
        Memory.open(path, search_on="gpu").search(QUERIES, 5)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(SettingError, match="finds no GPU here"):
        Memory.open(path, search_on="gpu")
    with pytest.raises(SettingError, match="'tpu' is unknown: choose cpu or gpu"):
        Memory.open(path, search_on="tpu")


def test_a_faiss_for_cpus_says_what_to_install(
    build_memory: Build, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = build_memory(tiny_model, DOCUMENTS).path
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(SettingError, match=r"pip install 'nearest\[gpu\]'"):
        Memory.open(path, search_on="gpu")
