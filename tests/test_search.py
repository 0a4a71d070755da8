"""The searcher: ties, removed entries, several backends and threads, against brute force."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import random_documents
from folders import Build
from nearest import Memory
from nearest.index import search
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import build_index
from nearest.index.exact import ExactIndex
from nearest.index.gpu import GpuScan
from nearest.index.ids import random_order
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import Metric
from nearest.index.search import Searched, Searcher
from nearest.index.suffix import SuffixArray
from nearest.store.segment import Segment

ENTRIES, EQUAL = 3_000, 1_400  # far more than k and any margin
K = 60


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    """Many rows are equal, as the states at the beginnings of documents are."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ENTRIES, 16)).astype(np.float16)
    rows[rng.choice(ENTRIES, EQUAL, replace=False)] = rows[0]
    return rows


@pytest.fixture(scope="module")
def queries(keys: np.ndarray) -> np.ndarray:
    """Twenty: half of them nearest to the equal rows."""
    rows = keys[np.random.default_rng(1).integers(ENTRIES, size=20)].astype(np.float32)
    rows[::2] = keys[0] + np.linspace(0, 0.3, 10)[:, None]
    return rows


def truth(keys: FloatKeys, queries: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """The k nearest ids of each query; of those equally far, the first in the random order."""
    distances = keys.distances(queries, np.tile(ids, (len(queries), 1)))
    order = np.lexsort((np.tile(random_order(ids), (len(queries), 1)), distances), axis=1)
    return ids[order[:, :k]]


def scans(keys: FloatKeys, ids: np.ndarray) -> list[Searched]:
    return [Searched(ExactIndex(keys, ids), len(ids))]


def gpu_scans(keys: FloatKeys, ids: np.ndarray) -> list[Searched]:
    return [Searched(GpuScan(keys, ids, torch.device("cpu")), len(ids))]


def lists(keys: FloatKeys, ids: np.ndarray) -> list[Searched]:
    """With all lists probed, so that nothing is missing but by codes."""
    index = build_index(keys, np.arange(ENTRIES), "IVF4,Flat", np.random.default_rng(0))
    return [Searched(ApproximateIndex(index, keys.metric, 4), len(ids), margin=16)]


def rough_lists(keys: FloatKeys, ids: np.ndarray) -> list[Searched]:
    index = build_index(keys, np.arange(ENTRIES), "IVF4,PQ8x4fs", np.random.default_rng(0))
    return [Searched(ApproximateIndex(index, keys.metric, 4), len(ids), margin=2_000)]


def both(keys: FloatKeys, ids: np.ndarray) -> list[Searched]:
    """Half in lists, half scanned."""
    half = ENTRIES // 2
    index = build_index(keys, np.arange(half), "IVF4,Flat", np.random.default_rng(0))
    listed, scanned = ids[ids < half], ids[ids >= half]
    return [
        Searched(ApproximateIndex(index, keys.metric, 4), len(listed), 16, ((0, half),)),
        Searched(ExactIndex(keys, scanned), len(scanned), 0, ((half, ENTRIES),)),
    ]


@pytest.mark.parametrize("backends", [scans, gpu_scans, lists, rough_lists, both])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("removed", [0.0, 0.4])
@pytest.mark.parametrize("ordered", [True, False])
def test_the_nearest_are_the_same_for_one_query_and_for_many(
    keys: np.ndarray,
    queries: np.ndarray,
    backends: Any,
    metric: Metric,
    removed: float,
    ordered: bool,
) -> None:
    alive = np.random.default_rng(2).random(ENTRIES) >= removed
    stored, ids = FloatKeys(keys, metric), np.flatnonzero(alive)
    searcher = Searcher(backends(stored, ids), stored, None if alive.all() else alive)
    expected = truth(stored, queries, ids, K)
    many = searcher.search(queries, K, ordered=ordered)
    if ordered:
        np.testing.assert_array_equal(many.ids, expected)
    np.testing.assert_array_equal(np.sort(many.ids), np.sort(expected))
    np.testing.assert_allclose(many.distances, stored.distances(queries, many.ids), rtol=1e-5)
    for row, query in enumerate(queries[:4]):
        one = searcher.search(query[None], K, ordered=ordered)
        np.testing.assert_array_equal(np.sort(one.ids[0]), np.sort(expected[row]))


@pytest.mark.parametrize("backends", [scans, lists, both])
def test_no_part_of_the_corpus_is_favoured(keys: np.ndarray, backends: Any) -> None:
    """Of equal entries, as many are taken from the second half as from the first."""
    stored, ids = FloatKeys(keys, "l2"), np.arange(ENTRIES)
    found = Searcher(backends(stored, ids), stored).search(keys[:1].astype(np.float32), 400).ids
    assert 0.4 < (found < ENTRIES // 2).mean() < 0.6


def test_the_nearest_that_were_removed_do_not_crowd_out_the_others(keys: np.ndarray) -> None:
    """However many: more are fetched until there are enough."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(ENTRIES, 16)).astype(np.float16)
    stored, query = FloatKeys(rows, "l2"), rows[:1].astype(np.float32)
    alive = np.ones(ENTRIES, dtype=bool)
    alive[truth(stored, query, np.arange(ENTRIES), 2_000)[0]] = False
    searcher = Searcher(lists(stored, np.flatnonzero(alive)), stored, alive)
    expected = truth(stored, query, np.flatnonzero(alive), K)
    np.testing.assert_array_equal(searcher.search(query, K).ids, expected)
    assert searcher.search(query, ENTRIES).ids.shape == (1, 1_000)


def test_ties_without_end_are_followed_so_far(
    keys: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MOST_TIED", 200)
    stored, ids, asked = FloatKeys(keys, "l2"), np.arange(ENTRIES), []
    searched = lists(stored, ids)
    real = searched[0].backend.search

    def noted(queries: np.ndarray, k: int) -> Any:
        asked.append(k)
        return real(queries, k)

    monkeypatch.setattr(searched[0].backend, "search", noted)
    found = Searcher(searched, stored).search(keys[:1].astype(np.float32), K)
    assert (found.distances == 0).all()
    assert asked == [92, 320]


def test_by_the_index_its_own_distances_count(keys: np.ndarray, queries: np.ndarray) -> None:
    stored, ids = FloatKeys(keys, "l2"), np.arange(ENTRIES)
    (searched,) = rough_lists(stored, ids)
    found = Searcher([searched], stored).search(queries, K, "index")
    expected = searched.backend.search(queries, K)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_each_index_measures_its_own(keys: np.ndarray, queries: np.ndarray) -> None:
    stored, ids = FloatKeys(keys, "l2"), np.arange(ENTRIES)
    searcher = Searcher(both(stored, ids), stored)
    some = np.random.default_rng(0).integers(-1, ENTRIES, size=(len(queries), 30))
    expected = stored.distances(queries, some)
    np.testing.assert_allclose(searcher.distances(queries, some), expected, rtol=1e-3, atol=1e-3)


def test_nothing_is_found_where_there_is_nothing(keys: np.ndarray, queries: np.ndarray) -> None:
    assert Searcher([], FloatKeys(keys, "l2")).search(queries, 3).ids.shape == (20, 0)


class Unlocked:
    """`functools.cached_property` as Python 3.12 has it: threads may compute it at once."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self._name not in vars(instance):
            vars(instance)[self._name] = self._function(instance)
        return vars(instance)[self._name]


def test_threads_may_make_the_first_search_together(
    build_memory: Build, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any Python; the index is read once, and each reader has an offset of its own."""
    path: Path = build_memory(tiny_model, list(random_documents()), index="IVF4,SQ8").path
    owners = [*Memory.__mro__, Segment, SuffixArray]
    patched = 0
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if type(value).__name__ == "cached_property":
                unlocked = Unlocked(value.func)
                unlocked.__set_name__(owner, name)
                monkeypatch.setattr(owner, name, unlocked)
                patched += 1
    assert patched > 3
    queries = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    expected = Memory.open(path).search(queries, 9).ids
    threads = 4
    for _ in range(6):
        memory, together = Memory.open(path), Barrier(threads)

        def first(_: int, memory: Memory = memory, together: Barrier = together) -> np.ndarray:
            together.wait()
            return memory.search(queries, 9).ids

        with ThreadPoolExecutor(threads) as pool:
            for found in pool.map(first, range(threads)):
                np.testing.assert_array_equal(found, expected)


def test_an_index_is_read_by_several_at_once(
    build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    """By segment, as `verify` does beside a search."""
    (segment,) = build_memory(tiny_model, list(random_documents()), index="IVF4,SQ8").segments
    with ThreadPoolExecutor(4) as pool:
        assert {index.ntotal for index in pool.map(lambda _: segment.read_index(), range(24))} == {
            segment.searched_count
        }


def test_threads_may_measure_chosen_entries_together(keys: np.ndarray) -> None:
    """The table that lists need for it is made once."""
    stored, rows = FloatKeys(keys, "l2"), keys[:4].astype(np.float32)
    some = np.tile(np.arange(0, ENTRIES, 7), (4, 1))
    for _ in range(4):
        (searched,) = lists(stored, np.arange(ENTRIES))
        together = Barrier(4)

        def measure(
            _: int, backend: Any = searched.backend, together: Barrier = together
        ) -> np.ndarray:
            together.wait()
            return backend.distances(rows, some)

        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(measure, range(4)):
                np.testing.assert_allclose(
                    found, stored.distances(rows, some), rtol=1e-3, atol=1e-4
                )
