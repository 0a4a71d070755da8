"""Searches over the segments of a memory: those that can be are one index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import random_documents
from folders import Build, copied, files, live_files
from nearest import Document, Memory
from nearest.build import add as additions
from nearest.build.index import rebuild_index
from nearest.index import choice
from nearest.index.neighbours import sort_nearest_first
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.settings import Settings
from nearest.store.manifest import IndexRecord, SegmentRecord
from nearest.store.parts import index as index_files
from nearest.store.parts.index import IndexChoice, to_fill_like
from nearest.store.records import FileRecord
from nearest.store.verify import verify

DOCUMENTS = list(random_documents())


@pytest.fixture(scope="module")
def lists(build_memory: Build, tiny_model: PreTrainedModel) -> Path:
    return build_memory(tiny_model, DOCUMENTS[:5], index="IVF4,SQ8", recall=1.0).path


@pytest.fixture
def add(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    return lambda memory, documents: memory.add(tiny_model, tiny_tokenizer, documents)


def filled_from(memory: Memory) -> list[str | None]:
    return [s.index.filled_from for s in memory.manifest.segments if s.index is not None]


def test_what_is_added_is_indexed_like_the_rest_and_searched_as_one(
    lists: Path, tmp_path: Path, add: Any
) -> None:
    folder = copied(lists, tmp_path)
    memory = add(add(Memory.open(folder), DOCUMENTS[5:8]), DOCUMENTS[8:])
    assert memory.manifest.keys is not None
    assert len(set(filled_from(memory))) == 1
    assert len(memory.segments) == 3
    assert len(memory.searcher.searched) == 1
    smaller = memory.remove(["doc-2", "doc-6"])
    queries = np.random.default_rng(1).normal(scale=3, size=(5, 32)).astype(np.float32)
    left = smaller.valued_entries()
    everything = smaller.search(queries, memory.entries, "index").ids
    for found in everything:  # four of four lists are probed
        np.testing.assert_array_equal(np.sort(found), left)
    rebuild_index(folder, IndexChoice("IVF3,Flat", nprobe=3))
    memory = Memory.open(folder)
    assert len(set(filled_from(memory))) == 1
    trained = [s.index.trained for s in memory.manifest.segments if s.index is not None]
    assert sum(file is not None for file in trained) == 1
    assert verify(folder) == []
    assert files(folder) == live_files(folder)
    rebuild_index(folder, IndexChoice("HNSW8"))
    memory = Memory.open(folder)
    assert filled_from(memory) == [None] * 3
    assert verify(folder) == []


def test_segments_that_are_scanned_become_one_with_an_index_when_there_are_many(
    build_memory: Build, tiny_model: Any, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = build_memory(tiny_model, DOCUMENTS[:5])
    folder, entries = memory.path, memory.entries
    for module in (additions, index_files, choice):
        monkeypatch.setattr(module, "EXACT_BELOW", entries + 40)
    memory = add(memory, [Document("few", "the law")])
    assert filled_from(memory) == [None, None]
    memory = add(memory, DOCUMENTS[5:8])
    (trained,) = filled_from(memory)
    assert trained is not None
    memory = add(memory, DOCUMENTS[8:])
    assert filled_from(memory) == [trained, trained]
    assert verify(folder) == []
    queries = np.random.default_rng(1).normal(scale=3, size=(5, 32)).astype(np.float32)
    found = memory.search(queries, 5, rerank=10**6).distances
    entries = np.tile(memory.valued_entries(), (5, 1))
    truth = np.sort(memory.key_distances(queries, entries), axis=1)[:, :5]
    assert np.isclose(found, truth, rtol=1e-4).mean() > 0.8


def test_which_trained_index_new_entries_go_into() -> None:
    file = FileRecord("trained.faiss", 1, "0" * 64)

    def record(spec: str, entries: int, trained: FileRecord | None = file) -> SegmentRecord:
        index = IndexRecord(spec, file, trained, "1" * 64, entries, 4, 100, 0.96, 0.95)
        return SegmentRecord("000001", 9, 1, 8, 1, {}, index, None, None, 0)

    small, large = record("IVF256,SQ8", 60_000), record("IVF1024,SQ8", 10**6)
    auto = IndexChoice()
    assert to_fill_like([], auto, 32, 10) is None
    assert to_fill_like([record("IVF256,SQ8", 9, None)], auto, 32, 10) is None
    assert to_fill_like([small, large], auto, 32, 10) == large.index
    assert to_fill_like([small], auto, 32, 200_000) == small.index
    assert to_fill_like([small], auto, 32, 10**6) is None  # a thousand lists are worth training
    assert to_fill_like([small], IndexChoice("IVF256,SQ8"), 32, 10**6) == small.index
    assert to_fill_like([small], IndexChoice("IVF256,Flat"), 32, 10) is None
    assert to_fill_like([small], IndexChoice(nprobe=3), 32, 10) is None


@pytest.mark.parametrize("distances", ["keys", "index"])
@pytest.mark.parametrize("removed", [[], ["doc-2", "doc-6"]])
def test_without_an_order_the_same_is_found(
    lists: Path, tmp_path: Path, add: Any, distances: str, removed: list[str]
) -> None:
    memory = add(Memory.open(copied(lists, tmp_path)), DOCUMENTS[5:])
    if removed:
        memory = memory.remove(removed)
    queries = np.random.default_rng(2).normal(scale=3, size=(40, 32)).astype(np.float32)
    for k in (1, 7, memory.entries + 5):
        nearest = memory.search(queries, k, distances)
        found = memory.search(queries, k, distances, ordered=False)
        again = sort_nearest_first(found, k)
        np.testing.assert_array_equal(again.distances, sort_nearest_first(nearest, k).distances)
        np.testing.assert_array_equal(again.ids, sort_nearest_first(nearest, k).ids)


def test_a_lookup_asks_for_an_order_where_it_matters(lists: Path) -> None:
    memory, asked = Memory.open(lists), []

    def search(*args: Any, ordered: bool) -> Any:
        asked.append(ordered)
        return memory.search(*args, ordered=ordered)

    keys = np.zeros((1, 32), np.float32)
    queries = Queries(keys, np.array([0]), np.zeros(1, np.int64))
    for lookup in (Lookup.of(memory, m, Settings()) for m in ("knn", "retomaton")):
        lookup._search = search
        lookup.candidates(queries)
        lookup.candidates(queries._replace(own=np.array([3])))
    assert asked == [False, True, True, True]
