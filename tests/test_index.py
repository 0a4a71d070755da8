"""Every index against brute force, and the pitfalls of earlier code, each by name."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearest.errors import FolderError, SettingError
from nearest.folder import sha256_of
from nearest.index import building
from nearest.index.approximate import ApproximateIndex, read_index
from nearest.index.building import (
    build_index,
    can_be_joined,
    check_spec,
    fill_index,
    joined,
    sample_size,
    train_index,
)
from nearest.index.choice import explained, resolve_spec
from nearest.index.distances import key_distances
from nearest.index.exact import ExactIndex
from nearest.index.ids import random_order
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import Metric, Neighbours, sort_nearest_first, take_nearest
from nearest.index.threads import in_threads
from nearest.index.tuning import recall, tune_search
from plain_kernels import plain_key_distances

METRICS = ["l2", "ip"]


def stored(keys: np.ndarray, metric: Metric = "l2") -> FloatKeys:
    return FloatKeys(keys, metric)


def brute_force(
    keys: np.ndarray, ids: np.ndarray, queries: np.ndarray, metric: Metric
) -> np.ndarray:
    """Distances [q, m] to keys[ids] in float64."""
    rows, wide = keys[ids].astype(np.float64), queries.astype(np.float64)
    if metric == "ip":
        return -(wide @ rows.T)
    return ((wide[:, None] - rows) ** 2).sum(-1)


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    """Clustered, as hidden states are."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(20, 16)) * 3
    return (centres[rng.integers(20, size=4000)] + rng.normal(size=(4000, 16))).astype(np.float16)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Two thirds of the rows: the others must never be found."""
    return np.flatnonzero(np.arange(4000) % 3)


@pytest.fixture(scope="module")
def queries(keys: np.ndarray) -> np.ndarray:
    """Like the keys, and none of those that can be found."""
    return keys[::3][:50].astype(np.float32) + 0.01


def test_kernel_equals_reference(keys: np.ndarray, queries: np.ndarray) -> None:
    ids = np.random.default_rng(3).integers(-1, 4000, size=(50, 33))
    for metric in METRICS:
        found = key_distances(keys, queries, ids, metric)
        expected = plain_key_distances(keys, queries, ids, metric)
        assert (found[ids < 0] == np.inf).all()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_kernel_widens_every_float16_exactly() -> None:
    """Subnormals, both zeros and the largest values included; −x·1 is −x for the inner product."""
    keys = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    keys = keys[np.isfinite(keys)][:, None]
    ids = np.arange(len(keys))[None]
    found = key_distances(keys, np.ones((1, 1), np.float32), ids, "ip")
    np.testing.assert_array_equal(found[0], -keys[:, 0].astype(np.float32))


@pytest.mark.parametrize("metric", METRICS)
def test_kernel_measures_float32_as_it_is(queries: np.ndarray, metric: Metric) -> None:
    rng = np.random.default_rng(3)
    keys, ids = rng.normal(size=(100, 16)).astype(np.float32), rng.integers(-1, 102, size=(50, 9))
    found = key_distances(keys, queries, ids, metric)
    inside = (ids >= 0) & (ids < 100)
    expected = plain_key_distances(keys, queries, np.where(inside, ids, 0), metric)
    np.testing.assert_allclose(found, np.where(inside, expected, np.inf), rtol=1e-5, atol=1e-5)


def test_kernel_reads_a_read_only_map(tmp_path: Path, keys: np.ndarray) -> None:
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    ids = np.arange(12).reshape(3, 4)
    found = key_distances(mapped, keys[:3].astype(np.float32), ids, "l2")
    np.testing.assert_allclose(found, plain_key_distances(keys, keys[:3], ids, "l2"), rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [1 << 26, 16 * 4 * 100])
def test_exact_equals_brute_force(
    keys: np.ndarray,
    ids: np.ndarray,
    queries: np.ndarray,
    metric: Metric,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nearest.index.exact.BLOCK_BYTES", block)
    found = ExactIndex(stored(keys, metric), ids).search(queries, 20)
    truth = brute_force(keys, ids, queries, metric)
    np.testing.assert_allclose(found.distances, np.sort(truth)[:, :20], rtol=1e-4, atol=1e-3)
    of_found = np.take_along_axis(truth, np.searchsorted(ids, found.ids), 1)
    np.testing.assert_allclose(of_found, np.sort(truth)[:, :20], rtol=1e-4, atol=1e-3)
    assert all(len(set(row)) == 20 for row in found.ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 20, 5000])
def test_exact_finds_the_same_for_few_queries(
    keys: np.ndarray, ids: np.ndarray, queries: np.ndarray, metric: Metric, k: int
) -> None:
    index = ExactIndex(stored(keys, metric), ids)
    many, few = index.search(queries, k), index.search(queries[:3], k)
    np.testing.assert_allclose(few.distances, many.distances[:3], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(few.ids < 0, many.ids[:3] < 0)
    assert all(len(set(row[row >= 0])) == min(k, len(ids)) for row in few.ids)
    rows = stored(keys, metric).distances(queries[:3], few.ids)
    np.testing.assert_allclose(few.distances, rows, rtol=1e-5)


def test_exact_fills_up_with_no_entry(keys: np.ndarray, queries: np.ndarray) -> None:
    found = ExactIndex(stored(keys), np.array([7, 9])).search(queries, 4)
    assert set(found.ids[:, :2].ravel()) == {7, 9}
    assert (found.ids[:, 2:] == -1).all()
    assert np.isinf(found.distances[:, 2:]).all()


SPECS = [
    "Flat",
    "HNSW16",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ8x4",
    "IVF16,PQ8x4fs",
    "PCA8,IVF16,SQ8",
    "OPQ8_16,IVF16,PQ8x4",
    "IDMap,Flat",
    "IVF16,PQ8x4,RFlat",
]


# Rotations take long to train: one metric shows that their wrapper is seen through.
@pytest.mark.parametrize(
    ("spec", "metric"),
    [
        (s, metric)
        for s in SPECS
        for metric in METRICS
        if not (s.startswith("OPQ") and metric == "ip")
    ],
)
def test_any_factory_string_finds_the_true_neighbours_and_only_listed_ids(
    keys: np.ndarray,
    ids: np.ndarray,
    queries: np.ndarray,
    spec: str,
    metric: Metric,
    tmp_path: Path,
) -> None:
    """Also after writing and reading; inner products must not find the worst instead."""
    rng = np.random.default_rng(0)
    index = build_index(stored(keys, metric), ids, spec, rng)
    exact = ExactIndex(stored(keys, metric), ids)
    parameters = tune_search(index, stored(keys, metric), ids, exact, 0.95, rng)
    path = tmp_path / "index.faiss"
    ApproximateIndex(index, metric).write(path)
    with path.open("rb") as file:
        read = ApproximateIndex(read_index(file, sha256_of(path)), metric, parameters.nprobe)
    assert (read.entries, read.dim) == (len(ids), 16)
    found = read.search(queries, 100 + parameters.margin)
    assert np.isin(found.ids[found.ids >= 0], ids).all()
    assert (np.diff(np.nan_to_num(found.distances, posinf=1e30), axis=1) >= 0).all()
    distances = key_distances(keys, queries, found.ids, metric)
    ranked = sort_nearest_first(Neighbours(found.ids, distances), 100)
    assert parameters.recall is not None
    assert 0.65 < parameters.recall <= 1
    assert recall(ranked.ids, exact.search(queries, 100).ids) > parameters.recall - 0.2


@pytest.mark.parametrize("spec", ["IVF16,Flat", "PCA8,IVF16,Flat", "IDMap,IVF16,Flat"])
def test_nprobe_counts_under_every_wrapper(
    keys: np.ndarray, ids: np.ndarray, queries: np.ndarray, spec: str
) -> None:
    index = build_index(stored(keys), ids, spec, np.random.default_rng(0))
    narrow = ApproximateIndex(index, "l2", nprobe=1).search(queries, 400)
    wide = ApproximateIndex(index, "l2", nprobe=16).search(queries, 400)
    assert (wide.ids >= 0).all()
    assert (narrow.ids < 0).any()  # one list is too short for 400
    assert np.isinf(narrow.distances[narrow.ids < 0]).all()


@pytest.mark.parametrize("spec", ["IVF8,Flat", "IVF8,SQ8", "PCA8,IVF8,SQ8", "IVF8,PQ4x4fs"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("first", [0, 1000])
def test_joined_indexes_are_one(
    keys: np.ndarray, ids: np.ndarray, spec: str, metric: Metric, first: int
) -> None:
    """Parts that were filled from one trained index find what it finds when it holds everything."""
    rows = stored(keys, metric)
    whole, *parts = (train_index(rows, ids, spec, np.random.default_rng(0)) for _ in range(4))
    assert can_be_joined(whole)
    fill_index(whole, rows, ids, spec)
    for part, some in zip(parts, np.array_split(ids, 3), strict=True):
        fill_index(part, rows, some, spec)
    one = joined([(part, first) for part in parts])
    assert one.ntotal == len(ids)
    expected, found = (ApproximateIndex(i, metric, 3).search(keys[:40], 9) for i in (whole, one))
    np.testing.assert_array_equal(found.distances, expected.distances)
    for ours, theirs in zip(found.ids, expected.ids, strict=True):
        assert set((ours - first * (ours >= 0)).tolist()) == set(theirs.tolist())
    some = np.tile(ids[::50], (2, 1))
    if spec.endswith("fs"):
        with pytest.raises(SettingError, match="cannot measure chosen entries"):
            ApproximateIndex(one, metric).distances(keys[:2], some)
        return
    measured = ApproximateIndex(one, metric).distances(keys[:2], some + first)
    np.testing.assert_array_equal(
        measured, ApproximateIndex(whole, metric).distances(keys[:2], some)
    )


def test_lists_of_whole_blocks_are_joined(keys: np.ndarray, ids: np.ndarray) -> None:
    """A block is 32 codes of 2 bytes: FAISS corrupts its heap after a list of 64, or 128 …"""
    rows, spec = stored(keys), "IVF1,PQ4x4fs"
    whole, *parts = (train_index(rows, ids, spec, np.random.default_rng(0)) for _ in range(6))
    bounds = [0, 64, 128, 1000, 1024, len(ids)]
    fill_index(whole, rows, ids, spec)
    for part, start, stop in zip(parts, bounds, bounds[1:], strict=False):
        fill_index(part, rows, ids[start:stop], spec)
    one = joined([(part, 0) for part in parts])
    assert one.ntotal == len(ids)
    found, expected = (ApproximateIndex(i, "l2").search(keys[:40], 50) for i in (one, whole))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


@pytest.mark.parametrize("spec", ["Flat", "HNSW8", "PQ4x4"])
def test_other_kinds_are_not_joined(keys: np.ndarray, ids: np.ndarray, spec: str) -> None:
    assert not can_be_joined(train_index(stored(keys), ids, spec, np.random.default_rng(0)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spec", ["Flat", "HNSW8", "IVF4,Flat", "SQ8", "IVF4,SQ8"])
def test_distances_to_codes_are_those_of_a_search(
    keys: np.ndarray,
    ids: np.ndarray,
    queries: np.ndarray,
    metric: Metric,
    spec: str,
    tmp_path: Path,
) -> None:
    built = build_index(stored(keys, metric), ids, spec, np.random.default_rng(0))
    ApproximateIndex(built, metric).write(tmp_path / "index")
    with (tmp_path / "index").open("rb") as file:
        index = ApproximateIndex(read_index(file, sha256_of(tmp_path / "index")), metric, None)
    found = index.search(queries, 7)
    wanted = np.where(np.arange(7) == 3, -1, found.ids)
    expected = np.where(np.arange(7) == 3, np.inf, found.distances)
    np.testing.assert_allclose(index.distances(queries, wanted), expected, rtol=2e-3, atol=1e-2)


def test_what_gives_no_vectors_back_measures_no_entries(keys: np.ndarray) -> None:
    """As lists on a GPU; here: shards."""
    flat, shards = faiss.IndexFlatL2(16), faiss.IndexShards(16)
    flat.add(keys.astype(np.float32))
    shards.add_shard(flat)
    index, queries = ApproximateIndex(shards, "l2"), keys[:3].astype(np.float32)
    found = index.search(queries, 4)
    with pytest.raises(SettingError, match="cannot measure chosen entries: measure by keys, or"):
        index.distances(queries, found.ids)


@pytest.mark.parametrize("metric", METRICS)
def test_index_distances_are_of_one_sign(
    keys: np.ndarray, ids: np.ndarray, queries: np.ndarray, metric: Metric
) -> None:
    """Squared L2 (not its root), and minus the inner product."""
    index = build_index(stored(keys, metric), ids, "IVF4,Flat", np.random.default_rng(0))
    found = ApproximateIndex(index, metric, nprobe=4).search(queries, 5)
    truth = brute_force(keys, ids, queries, metric)
    np.testing.assert_allclose(found.distances, np.sort(truth)[:, :5], rtol=1e-3, atol=1e-2)


def test_recall_is_measured_without_the_query_itself(keys: np.ndarray, ids: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    index = build_index(stored(keys), ids, "IVF16,Flat", rng)
    exact = ExactIndex(stored(keys), ids)
    parameters = tune_search(index, stored(keys), ids, exact, 0.9, np.random.default_rng(5))
    sample = np.sort(np.random.default_rng(5).choice(ids, size=256, replace=False))
    rows = keys[sample].astype(np.float32)
    found = ApproximateIndex(index, "l2", parameters.nprobe).search(rows, 267)
    truth = brute_force(keys, ids, rows, "l2").argsort(1)[:, 1:267]
    hits = [
        len(set(a[a != own]) & set(ids[b]))
        for a, own, b in zip(found.ids, sample, truth, strict=True)
    ]
    assert parameters.recall == pytest.approx(np.mean(hits) / 266, abs=0.01)
    assert parameters.recall >= 0.9


@pytest.mark.parametrize("spec", ["HNSW16", "PCA16,HNSW16", "IVF16_HNSW8,Flat"])
def test_graphs_look_at_as_many_as_are_asked_for(
    keys: np.ndarray, ids: np.ndarray, queries: np.ndarray, spec: str
) -> None:
    """FAISS's own setting is sixteen, after which it gives back -1."""
    index = build_index(stored(keys), ids, spec, np.random.default_rng(0))
    found = ApproximateIndex(index, "l2", nprobe=16).search(queries, 1024)
    truth = ExactIndex(stored(keys), ids).search(queries, 1024)
    assert recall(found.ids, truth.ids) > 0.95


def test_an_unreachable_target_records_the_best_recall(keys: np.ndarray, ids: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    index = build_index(stored(keys), ids, "HNSW4", rng)
    exact = ExactIndex(stored(keys), ids)
    parameters = tune_search(index, stored(keys), ids, exact, 1.0, rng)
    assert parameters.recall is not None
    assert parameters.recall > 0.5


@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.floats(width=32), st.integers(-1, 5) | st.integers(-1, 2**32 - 2)),
            min_size=7,
            max_size=7,
        ),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(0, 9),
    large=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_sorted_by_distance_and_then_in_the_random_order(
    rows: list[list[tuple[float, int]]], k: int, large: bool, dtype: type
) -> None:
    """Whatever is measured: negative products, infinities, zeros of both signs, NaN last."""
    distances = np.array([[far for far, _ in row] for row in rows], dtype)
    ids = np.array([[one for _, one in row] for row in rows])
    if large:  # beyond what can be sorted as one number with a distance
        ids[0, 0] = 2**40
    found = sort_nearest_first(Neighbours(ids, distances), k)
    order = np.lexsort((random_order(ids), distances + dtype(0)), axis=1)[:, :k]
    np.testing.assert_array_equal(found.distances, np.take_along_axis(distances, order, 1))
    np.testing.assert_array_equal(
        found.ids[~np.isnan(found.distances)],
        np.take_along_axis(ids, order, 1)[~np.isnan(found.distances)],
    )
    if dtype is np.float32:
        taken = take_nearest(Neighbours(ids, distances), k)
        again = sort_nearest_first(taken, k)
        np.testing.assert_array_equal(again.distances, found.distances)
        np.testing.assert_array_equal(again.ids, found.ids)


def test_what_is_taken_stays_in_its_order() -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(400) for _ in range(80)])
    distances = rng.normal(size=ids.shape).astype(np.float32)
    taken = take_nearest(Neighbours(ids, distances), 100)
    for row in range(80):
        places = np.sort(np.argsort(distances[row])[:100])
        np.testing.assert_array_equal(taken.ids[row], ids[row, places])
        np.testing.assert_array_equal(taken.distances[row], distances[row, places])


def test_an_id_may_stand_twice() -> None:
    found = Neighbours(np.array([[0, 1, 1, 1, 0]]), np.zeros((1, 5), np.float32))
    assert random_order(0) < random_order(1)
    assert take_nearest(found, 3).ids.tolist() == [[0, 1, 0]]
    assert sort_nearest_first(found, 3).ids.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("columns", [6, 400])
def test_a_tie_for_the_last_place_is_broken_by_the_random_order(columns: int) -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(columns) for _ in range(80)])
    distances = (ids // 4).astype(np.float32)  # ids 0 to 3 are equally near, and so on
    fifth = 4 + int(random_order(np.arange(4, min(8, columns))).argmin())
    taken = take_nearest(Neighbours(ids, distances), 5)
    assert {*map(tuple, np.sort(taken.ids))} == {(0, 1, 2, 3, fifth)}
    found = sort_nearest_first(Neighbours(ids, distances), 5)
    assert {*map(tuple, np.sort(found.ids))} == {(0, 1, 2, 3, fifth)}
    np.testing.assert_array_equal(found.distances, [[0, 0, 0, 0, 1]] * 80)


def test_recall_of_known_rows() -> None:
    truth = np.array([[1, 2], [3, 4]])
    assert recall(np.array([[2, 9], [4, 3]]), truth) == 0.75
    assert recall(np.array([[-1, -1], [-1, -1]]), truth) == 0.0


@pytest.mark.parametrize(
    ("spec", "entries", "dim", "resolved"),
    [
        ("auto", 49_999, 256, "exact"),
        ("auto", 1_000_000, 256, "IVF1024,PQ128x4fs"),
        ("auto", 50_000, 768, "RR768,IVF256,PQ384x4fs"),
        ("auto", 50_000, 10, "IVF256,PQ5x4fs"),
        ("auto", 50_000, 35, "IVF256,PQ7x4fs"),
        ("auto", 50_000, 13, "IVF256,PQ1x4fs"),
        ("auto", 50_000, 17, "IVF256,SQ8"),
        ("auto", 50_000, 1, "IVF256,SQ8"),
        ("HNSW32", 10, 32, "HNSW32"),
        ("exact", 10**9, 32, "exact"),
    ],
)
def test_choice_of_index(spec: str, entries: int, dim: int, resolved: str) -> None:
    assert resolve_spec(spec, entries, dim) == resolved


@pytest.mark.parametrize(("dim", "lists"), [(32, 4096), (768, 2048), (1024, 4096), (4096, 1024)])
def test_training_takes_a_bounded_sample(dim: int, lists: int) -> None:
    rows = sample_size(dim, lists)
    assert 39 * lists <= rows <= 64 * lists  # FAISS's minimum; more than this gains nothing
    assert rows * dim * 4 <= 2**29 or rows == 39 * lists


def test_rows_are_read_a_bounded_block_at_a_time(
    keys: np.ndarray, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is trained and filled so is what is trained and filled at once."""
    read: list[int] = []

    class Noted(FloatKeys):
        def rows(self, ids: np.ndarray) -> np.ndarray:
            read.append(len(ids))
            return super().rows(ids)

    stored_keys = Noted(keys, "l2")
    whole = build_index(stored_keys, ids, "IVF8,SQ8", np.random.default_rng(0))
    monkeypatch.setattr(building, "_ADD_BYTES", 4 * keys.shape[1] * 50)
    read.clear()
    found = build_index(stored_keys, ids, "IVF8,SQ8", np.random.default_rng(0))
    assert max(read) <= 50 < len(ids)
    np.testing.assert_array_equal(faiss.serialize_index(whole), faiss.serialize_index(found))


def test_little_memory_gives_smaller_codes() -> None:
    entries, dim = 10**7, 768
    specs = [resolve_spec("auto", entries, dim, gigabytes << 30) for gigabytes in (64, 2, 1)]
    assert specs == [f"RR768,IVF4096,PQ{parts}x4fs" for parts in (384, 192, 64)]
    assert resolve_spec("auto", 10**9, dim, 1 << 30) == "RR768,IVF32768,PQ48x4fs"


def test_rotation_keeps_a_few_large_tokens_from_hiding_the_others() -> None:
    """As the first tokens that a language model reads: fast scan rounds a query's table as one."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, 264))
    keys = centres[rng.integers(0, 500, 30_000)] + 0.5 * rng.standard_normal((30_000, 264))
    keys[::1000, 7] += 100
    keys = keys.astype(np.float32)
    told_apart = {}
    for spec in ("IVF64,PQ132x4fs", "RR264,IVF64,PQ132x4fs"):
        index = faiss.index_factory(264, spec)
        index.train(keys[::3])
        index.add(keys)
        found = ApproximateIndex(index, "l2", 16).search(keys[1:50], 512)
        told_apart[spec] = np.mean([len(np.unique(row)) for row in found.distances])
    plain, rotated = told_apart.values()
    assert rotated > 10 * plain


def test_the_recall_that_is_wanted_decides() -> None:
    wanted = {
        0.9: "IVF1024,PQ128x4fs",
        0.97: "IVF1024,PQ128x4fs",
        0.99: "IVF1024,SQ8",
        1.0: "exact",
    }
    for target, spec in wanted.items():
        assert resolve_spec("auto", 10**6, 256, recall=target) == spec
    assert resolve_spec("auto", 10**7, 256, 1 << 32, recall=0.99) == "IVF4096,PQ128x4fs"
    assert "do not find 99.0% of" in explained("auto", "IVF1024,SQ8", 10**6, 256, 0.99)
    assert "a recall of 1 is" in explained("auto", "exact", 10**6, 256, 1.0)


@pytest.mark.parametrize(
    ("asked", "spec", "entries", "dim", "why"),
    [
        ("Flat", "Flat", 9, 32, "asked for"),
        ("IVF8,SQ8", "exact", 9, 32, "IVF8,SQ8 was asked for; so few entries"),
        ("auto", "exact", 9, 32, "fewer than 50,000 entries are scanned"),
        (
            "auto",
            "IVF1024,PQ128x4fs",
            10**6,
            256,
            "1024 lists for 1,000,000 entries; 4 bits for 2 dims",
        ),
        ("auto", "IVF1024,PQ16x4fs", 10**6, 256, "4 bits for 16 dims (not 2, for"),
        (
            "auto",
            "RR768,IVF1024,PQ384x4fs",
            10**6,
            768,
            "1024 lists for 1,000,000 entries; of keys that are rotated",
        ),
        ("auto", "IVF1024,SQ8", 10**6, 257, "257 dims cannot be cut into parts of up to 16"),
    ],
)
def test_a_choice_is_explained(asked: str, spec: str, entries: int, dim: int, why: str) -> None:
    assert why in explained(asked, spec, entries, dim)


@pytest.mark.parametrize("dim", range(1, 70))
def test_every_dimension_has_an_index_by_default(dim: int) -> None:
    check_spec("auto", dim, None, 60_000)


@pytest.mark.parametrize("spec", ["nonsense", "IVF16,PQ7x4", "IVF100000,Flat", ""])
def test_a_string_faiss_refuses_is_explained(keys: np.ndarray, ids: np.ndarray, spec: str) -> None:
    with pytest.raises(SettingError, match="choose another index_factory string"):
        build_index(stored(keys), ids, spec, np.random.default_rng(0))


def test_a_damaged_index_is_not_even_parsed(
    keys: np.ndarray, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.faiss"
    ApproximateIndex(build_index(stored(keys), ids, "Flat", np.random.default_rng(0)), "l2").write(
        path
    )
    checksum = sha256_of(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("parsed before it was checked"))
    with path.open("rb") as file, pytest.raises(FolderError, match="damaged"):
        read_index(file, checksum)


def test_a_full_disk_while_writing_is_an_os_error(keys: np.ndarray, ids: np.ndarray) -> None:
    index = ApproximateIndex(build_index(stored(keys), ids, "Flat", np.random.default_rng(0)), "l2")
    with pytest.raises(OSError, match="No space left"):
        index.write(Path("/dev/full"))


def test_queries_of_another_dimension_are_refused(keys: np.ndarray, ids: np.ndarray) -> None:
    index = ApproximateIndex(build_index(stored(keys), ids, "Flat", np.random.default_rng(0)), "l2")
    with pytest.raises(ValueError, match=f"queries have 3 dims, the index {keys.shape[1]}"):
        index.search(np.zeros((2, 3), np.float32), 1)


def test_sorting_keeps_pairs_together() -> None:
    found = Neighbours(np.array([[5, 6, -1, 7]]), np.array([[3.0, 1.0, np.inf, 2.0]], np.float32))
    ranked = sort_nearest_first(found, 3)
    assert ranked.ids.tolist() == [[6, 7, 5]]
    assert ranked.distances.tolist() == [[1.0, 2.0, 3.0]]


FORKED = """
import os, numpy as np
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import build_index
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
keys = np.random.default_rng(0).normal(size=(3000, 32)).astype(np.float16)
stored = FloatKeys(keys, 'l2')
ids, queries = np.arange(3000), keys[:64].astype(np.float32)
index = ApproximateIndex(build_index(stored, ids, "IVF8,Flat", np.random.default_rng(0)), "l2")
def search():
    near = index.search(queries, 9).ids
    exact = ExactIndex(stored, ids).search(queries, 9).ids
    return [near, exact, stored.distances(queries, near)]
before = search()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(np.array_equal, search(), before)) else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
def test_a_forked_process_can_search() -> None:
    """As data loaders and pre-forking servers do, after a search with threads in the parent."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKED], env=environment, timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("spec", "nprobe", "entries", "message"),
    [
        ("nonsense", None, None, "choose another index_factory string"),
        ("IVF200,Flat", None, 100, "more lists than the memory has entries"),
        ("exact", 4, None, "no lists to probe"),
        ("HNSW16", 4, None, "no lists to probe"),
        ("auto", 4, 100, "no lists to probe"),
    ],
)
def test_what_no_index_can_be_made_of_is_refused_early(
    spec: str, nprobe: int | None, entries: int | None, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        check_spec(spec, 16, nprobe, entries)
    check_spec("PCA8,IVF16,SQ8", 16, 4, 100)
    check_spec("auto", 16, None, 100)


def test_threads_share_the_rows(
    keys: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(3).integers(-1, 4000, size=(200, 33))
    queries = np.resize(queries, (200, 16))
    expected = plain_key_distances(keys, queries, ids, "l2")
    for threads in (1, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = key_distances(keys, queries, ids, "l2")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    empty = key_distances(keys, queries[:0], ids[:0], "l2")
    assert empty.shape == (0, 33)


WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None
import numpy as np, torch
from nearest.index.matches import longest_matches
from nearest.index.suffix import SuffixArray, sort_suffixes
torch.set_num_threads(2)
tokens = np.array([0, 1, 2, 1, 2, 3], np.uint16)
array = SuffixArray(tokens, sort_suffixes(tokens, np.arange(6) < 5))
found = longest_matches([array], 0, np.array([1, 2] * 64), np.arange(128), 2)
assert found.lengths[1].tolist() == [2, 2], found.lengths[1]

from nearest.errors import NearestError
from nearest.index.building import check_spec
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
keys = FloatKeys(np.random.default_rng(0).normal(size=(300, 8)).astype(np.float16), "l2")
index = ExactIndex(keys, np.arange(300))
queries = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
whole = index.search(queries, 5)
for n in range(40):
    alone = index.search(queries[n:n + 1], 5)
    assert (alone.ids == whole.ids[n]).all() and (alone.distances == whole.distances[n]).all()
assert index.search(queries[:0], 5).ids.shape == (0, 5)
check_spec("auto", 8, None)
try:
    check_spec("IVF4,Flat", 8, None)
except NearestError as error:
    assert "[cpu]" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_suffixes_and_small_memories_need_no_faiss() -> None:
    """Nor do their threads."""
    assert subprocess.run([sys.executable, "-c", WITHOUT_FAISS], timeout=120).returncode == 0


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done: list[int] = []

    def work(rows: slice) -> None:
        if rows.start == 50:
            raise MemoryError
        done.append(rows.start)

    with pytest.raises(MemoryError):
        in_threads(work, 200)
    assert sorted(done) == [0, 100, 150]  # and nobody still works on what is given up


def test_threads_that_share_work_again_do_not_wait_for_each_other() -> None:
    """Even when every thread of the pool does so at once."""
    done = np.zeros((8, 64, 200), int)

    def rows_of(i: int, j: int) -> Callable[[slice], None]:
        def work(rows: slice) -> None:
            done[i, j, rows] += 1

        return work

    def work(i: int) -> Callable[[slice], None]:
        def share_again(some: slice) -> None:
            for j in range(64)[some]:
                in_threads(rows_of(i, j), 200)

        return share_again

    callers = [Thread(target=in_threads, args=(work(i), 64), daemon=True) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert (done == 1).all()


def test_inner_products_with_long_keys_are_settled_by_the_stored_keys() -> None:
    """Keys far longer than their products with the queries, which cancel in float32."""
    rng = np.random.default_rng(0)
    queries = np.concatenate([np.ones((20, 32)), rng.normal(size=(20, 32))], 1).astype(np.float32)
    keys = np.concatenate([rng.normal(size=(3000, 32)), 1e-3 * rng.normal(size=(3000, 32))], 1)
    keys[:, :32] = (keys[:, :32] - keys[:, :32].mean(1, keepdims=True)) * 1e5
    index = ExactIndex(FloatKeys(keys.astype(np.float32), "ip"), np.arange(3000))
    found = index.search(queries, 50)
    for row, query in enumerate(queries):  # one query is measured by the stored keys alone
        np.testing.assert_array_equal(found.ids[row], index.search(query[None], 50).ids[0])
