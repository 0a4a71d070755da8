"""Compressed keys: projections, product quantisation and merged entries against plain numpy."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import (
    FULL,
    call_fails,
    edit_manifest,
    in_two_segments,
    make_documents,
    random_documents,
    snapshot,
)
from folders import Build, copied, files, flipped, kill_writers, live_files, place_of, replaced
from nearest import Memory, evaluate
from nearest.build.cluster import GreedyMerge, cluster_memory
from nearest.build.compress import Compression, compress_memory
from nearest.build.index import rebuild_index
from nearest.errors import FolderError, SettingError
from nearest.folder import ArrayFile
from nearest.index.approximate import ApproximateIndex
from nearest.index.clusters import Clusters
from nearest.index.keys import FloatKeys, MergedKeys
from nearest.index.neighbours import Metric
from nearest.index.product import ProductFormat, product_parts, train_codebooks
from nearest.index.projection import Projection
from nearest.retrieval.automaton import extend
from nearest.store.parts.index import IndexChoice
from nearest.store.verify import verify
from plain_kernels import plain_extend

DIM = 32
METRICS = ["l2", "ip"]
SEGMENT = "segments/000001"
DOCUMENTS = make_documents(12, 30)


def distances_between(rows: np.ndarray, queries: np.ndarray, metric: Metric) -> np.ndarray:
    """Distances [q, n] in float64."""
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    if metric == "ip":
        return -(queries @ rows.T)
    found = [((query - rows) ** 2).sum(-1) for query in queries]
    return np.array(found).reshape(len(queries), len(rows))


# --- principal components -------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("out", [1, 5, 11])
def test_a_projection_is_onto_the_first_singular_vectors(metric: Metric, out: int) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(300, 12)) * np.arange(1, 13) + 40).astype(np.float32)
    queries = (rng.normal(size=(20, 12)) + 40).astype(np.float32)
    projection = Projection.fit(rows, out, metric)
    assert (projection.dim, projection.matrix.dtype) == (out, np.float32)
    centred = rows - (rows.mean(0) if metric == "l2" else 0)
    basis = np.linalg.svd(centred.astype(np.float64), full_matrices=False)[2][:out]
    kept, asked = rows @ basis.T @ basis, queries @ basis.T @ basis
    np.testing.assert_allclose(
        distances_between(projection.apply(rows), projection.apply(queries), metric),
        distances_between(kept, asked, metric),
        rtol=1e-3,
        atol=1e-2,
    )
    if metric == "l2":  # nothing of the mean is left to be stored
        np.testing.assert_allclose(projection.apply(rows).mean(0), 0, atol=1e-3)


def test_one_projection_after_another_is_one_map() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(loc=5, size=(100, 10)).astype(np.float32)
    first = Projection.fit(rows, 6, "l2")
    second = Projection.fit(first.apply(rows) ** 2, 3, "l2")
    np.testing.assert_allclose(
        second.after(first).apply(rows), second.apply(first.apply(rows)), rtol=1e-4, atol=1e-4
    )
    assert second.after(None) is second


@pytest.mark.parametrize("out", [0, -1, 10, 11])
def test_a_projection_must_leave_fewer_dimensions(out: int) -> None:
    with pytest.raises(SettingError, match="pca must be from 1 to 9, the keys' dims less 1, got"):
        Projection.fit(np.eye(10, dtype=np.float32), out, "l2")


# --- product quantisation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def product() -> tuple[ProductFormat, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(700, 12)).astype(np.float32)
    return ProductFormat(train_codebooks(rows, 4, np.random.default_rng(1))), rows


def test_codes_are_the_nearest_centroids(product: tuple[ProductFormat, np.ndarray]) -> None:
    form, rows = product
    assert (form.name, form.codebooks.shape) == ("pq4", (4, 256, 3))
    codes = form.encode(rows)["keys"]
    decoded = np.empty_like(rows)
    for part in range(4):
        columns = slice(3 * part, 3 * part + 3)
        to_centroids = distances_between(form.codebooks[part], rows[:, columns], "l2")
        own = np.take_along_axis(to_centroids, codes[:, part, None].astype(int), 1)[:, 0]
        np.testing.assert_allclose(own, to_centroids.min(1), rtol=1e-4, atol=1e-6)
        decoded[:, columns] = form.codebooks[part][codes[:, part]]
    keys = form.open({"keys": codes}, "l2")
    np.testing.assert_array_equal(keys.rows(np.arange(700)), decoded)
    assert ((decoded - rows) ** 2).sum() < 0.2 * (rows**2).sum()
    assert keys.problems() == []
    form.codebooks[2, 3, 1] = np.nan
    assert keys.problems() == ["a centroid of keys is not finite"]
    form.codebooks[2, 3, 1] = 0


@given(
    parts=st.integers(1, 70),
    part_dim=st.integers(1, 5),
    queries=st.integers(0, 4),
    k=st.integers(0, 20),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_the_product_kernel_equals_numpy(
    parts: int, part_dim: int, queries: int, k: int, metric: Metric, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codebooks = rng.normal(size=(parts, 256, part_dim)).astype(np.float32)
    codes = rng.integers(0, 256, size=(30, parts), dtype=np.uint8)
    keys = ProductFormat(codebooks).open({"keys": codes}, metric)
    asked = rng.normal(size=(queries, parts * part_dim)).astype(np.float32)
    ids = rng.integers(-1, 30, size=(queries, k))
    everything = distances_between(keys.rows(np.arange(30)), asked, metric)
    expected = np.where(ids < 0, np.inf, np.take_along_axis(everything, ids.clip(0), 1))
    found = keys.distances(asked, ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_fewer_rows_than_centroids_are_stored_exactly() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    form = ProductFormat(train_codebooks(rows, 2, np.random.default_rng(0)))
    keys = form.open(form.encode(rows), "l2")
    np.testing.assert_allclose(keys.rows(np.arange(9)), rows, atol=1e-6)


@pytest.mark.parametrize("parts", [5, 13, 24])
def test_parts_must_divide_the_dimension(parts: int) -> None:
    with pytest.raises(SettingError, match=f"cannot be cut into {parts} equal parts: choose pqM"):
        train_codebooks(np.zeros((300, 12), np.float32), parts, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pq64", 64),
        ("pq1", 1),
        *(
            (name, None)
            for name in ("pq", "pq0", "pq-4", "pq4 ", "fp16", "4", "pq٤", "PQ4", "pq4x4")
        ),
    ],
)
def test_names_of_product_formats(name: str, parts: int | None) -> None:
    assert product_parts(name) == parts


# --- shared keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_entries_may_share_a_key(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(size=(5, 8)).astype(np.float16)
    row_of = np.array([0, 1, 0, -1, 2, 4, 3, 3], np.int32)
    keys = MergedKeys(FloatKeys(own, metric), row_of)
    assert (keys.dim, keys.metric, keys.problems()) == (8, metric, [])
    ids = np.array([[0, 2, -1, 7], [6, 6, 5, 4], [-1, -1, -1, -1]])
    queries = rng.normal(size=(3, 8)).astype(np.float32)
    expected = distances_between(own, queries, metric)
    expected = np.where(ids < 0, np.inf, np.take_along_axis(expected, row_of[ids].clip(0), 1))
    np.testing.assert_allclose(keys.distances(queries, ids), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(keys.rows(ids[1]), own[[3, 3, 4, 2]].astype(np.float32))


# --- a memory, compressed -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=METRICS)
def original(request: pytest.FixtureRequest, build_memory: Build, tiny_model: Any) -> Memory:
    return build_memory(tiny_model, DOCUMENTS, metric=request.param)


@pytest.fixture(scope="module")
def indexed(build_memory: Build, tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, DOCUMENTS, index="IVF4,SQ8")


def original_rows(memory: Memory) -> np.ndarray:
    return np.load(memory.path / SEGMENT / "keys.npy").astype(np.float32)


COMPRESSIONS = {
    "int8": Compression(keys="int8"),
    "pq": Compression(keys="pq8"),
    "pca": Compression(pca=24),
    "pca and int8": Compression(keys="int8", pca=24),
    "pca and pq": Compression(keys="pq12", pca=24),
    "merge": Compression(merge=True),
    "merge among few": Compression(merge=True, neighbours=2),
    "all": Compression(keys="pq8", pca=16, merge=True),
}


def kept_by_hand(memory: Memory, rows: np.ndarray, neighbours: int) -> dict[int, set[int]]:
    """Each entry that greedy merge leaves, with those it stands for, over all pairs of keys."""
    entries = memory.valued_entries()
    metric = memory.keys_record.metric
    near = distances_between(rows[entries], rows[entries], metric).argsort(1, kind="stable")
    values = memory.values(entries)
    kept = {i: {i} for i in range(len(entries))}
    for entry in np.random.default_rng(0).permutation(entries).tolist():
        i = int(np.searchsorted(entries, entry))
        if i not in kept:
            continue
        for j in near[i, : neighbours + 1].tolist():
            if j != i and kept.get(j) == {j} and values[i] == values[j]:
                kept[i] |= kept.pop(j)
    return {int(entries[i]): set(entries[sorted(others)].tolist()) for i, others in kept.items()}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_searches_are_over_what_is_stored(original: Memory, tmp_path: Path, kind: str) -> None:
    """Every distance is that of the decoded keys to the query, both through the stored map."""
    how, metric = COMPRESSIONS[kind], original.keys_record.metric
    path = copied(original.path, tmp_path)
    told: list[tuple[str, int, int | None]] = []
    compress_memory(path, how, lambda *report: told.append(report))
    assert ("keys", told[-1][1], told[-1][1]) in told
    assert verify(path) == []
    memory = Memory.open(path)
    record, segment = memory.keys_record, memory.segments[0]
    rows, queries = original_rows(original), original_rows(original)[[3, 70, 400]] + 0.1
    asked = queries
    if how.pca is not None:
        map_file = np.load(path / "g000002.projection.npy")
        assert map_file.shape == (how.pca, DIM + 1)
        rows = rows @ map_file[:, :-1].T + map_file[:, -1]
        asked = queries @ map_file[:, :-1].T + map_file[:, -1]
    assert record.stored_dim == rows.shape[1]
    assert record.format == (how.keys or "fp16")
    entries = memory.valued_entries()
    decoded = memory.keys.rows(entries)
    gap = np.abs(decoded - rows[entries]).max()
    kept = entries
    if how.merge:
        kept = segment.searched
        assert len(kept) == segment.record.kept < len(entries)
        assert set(memory.search(queries, 10**6).ids.ravel().tolist()) == set(kept.tolist())
        gap = np.abs(memory.keys.rows(kept) - rows[kept]).max()
    largest = np.abs(rows).max()
    assert gap <= largest * {"fp16": 1e-3, "int8": 0.01}.get(record.format, 0.9)
    everything = distances_between(memory.keys.rows(kept), asked, metric)
    scale = np.abs(everything).max()
    found = memory.search(queries, 9)
    np.testing.assert_allclose(
        found.distances, np.sort(everything, axis=1)[:, :9], rtol=1e-4, atol=1e-5 * scale
    )
    ids = np.random.default_rng(0).choice(entries, size=(3, 50))
    expected = distances_between(decoded, asked, metric)
    expected = np.take_along_axis(expected, np.searchsorted(entries, ids), 1)
    np.testing.assert_allclose(
        memory.key_distances(queries, ids), expected, rtol=1e-4, atol=1e-5 * scale
    )


def test_merged_entries_are_counted(
    build_memory: Build, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """With keys no two of which are equally near, so that neighbours are beyond doubt."""
    original = build_memory(tiny_model, random_documents()[:2])
    rows = original_rows(original)
    expected = kept_by_hand(original, rows, 9)
    path = copied(original.path, tmp_path)
    compress_memory(path, Compression(merge=True))
    memory = Memory.open(path)
    segment = memory.segments[0]
    assert segment.searched.tolist() == sorted(expected)
    assert len(expected) < memory.entries
    ids = memory.valued_entries()
    counts = np.exp(memory.log_weights(ids))
    shared = memory.keys.rows(ids)
    for head, others in expected.items():
        at = np.searchsorted(ids, sorted(others))
        assert (shared[at] == rows[head]).all()
        expected_counts = [len(others) if other == head else 1 for other in sorted(others)]
        np.testing.assert_allclose(counts[at], expected_counts, rtol=1e-6)
    with_none = np.array([[-1, segment.searched[0]]])
    assert memory.log_weights(with_none)[0, 0] == 0
    np.testing.assert_array_equal(original.log_weights(with_none), 0)
    assert len(np.load(path / SEGMENT / "g000002.keys.npy")) == len(expected)
    with pytest.raises(SettingError, match="a text's own cannot be left out"):
        memory.first_entries([memory.document_tokens(0)])


def test_weights_stand_for_the_entries_that_were_merged(
    build_memory: Build, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """exp(−d/T + log weight), summed by value, is what the entries gave one by one at that key."""
    original = build_memory(tiny_model, DOCUMENTS)
    path = copied(original.path, tmp_path)
    compress_memory(path, Compression(merge=True))
    memory = Memory.open(path)
    query = original_rows(original)[[100]] + 0.3
    found = memory.search(query, memory.entries)
    merged = np.zeros(300)
    scores = -found.distances / 20 + memory.log_weights(found.ids)
    np.add.at(merged, memory.values(found.ids)[0], np.exp(scores.astype(np.float64))[0])
    ids = memory.valued_entries()[None]
    single = np.zeros(300)
    scores = -memory.key_distances(query, ids).astype(np.float64) / 20
    np.add.at(single, memory.values(ids)[0], np.exp(scores)[0])
    np.testing.assert_allclose(merged, single, rtol=1e-4)


def test_compressing_further_composes(original: Memory, tmp_path: Path) -> None:
    path = copied(original.path, tmp_path)
    for how in (Compression(pca=24), Compression(merge=True, pca=12), Compression(keys="int8")):
        compress_memory(path, how)
        assert verify(path) == []
    memory = Memory.open(path)
    assert (memory.keys_record.stored_dim, memory.keys_record.format) == (12, "int8")
    assert (memory.keys_record.dim, memory.manifest.version) == (DIM, 4)
    kept = memory.segments[0].searched
    whole = np.load(path / "g000003.projection.npy")
    expected = original_rows(original)[kept] @ whole[:, :-1].T + whole[:, -1]
    np.testing.assert_allclose(
        memory.keys.rows(kept), expected, atol=0.01 * float(np.abs(expected).max())
    )
    live = {name for name in files(path) if "g0" in name}
    assert live == {
        "g000003.projection.npy",
        *(f"{SEGMENT}/g000003.{kind}.npy" for kind in ("rows", "weights")),
        *(f"{SEGMENT}/g000004.{kind}.npy" for kind in ("keys", "scales")),
    }
    with pytest.raises(SettingError, match="have been merged already"):
        compress_memory(path, Compression(merge=True))
    cluster_memory(path, GreedyMerge())
    rebuild_index(path, IndexChoice("Flat"))
    assert verify(path) == []
    found = Memory.open(path).search(original_rows(original)[[5]], 3)
    assert set(found.ids[0].tolist()) <= set(kept.tolist())


def test_the_index_is_built_anew_as_it_was_or_as_asked(indexed: Memory, tmp_path: Path) -> None:
    path = copied(indexed.path, tmp_path)
    compress_memory(path, Compression(pca=8, recall=0.9))
    record = Memory.open(path).segments[0].record.index
    assert record is not None
    assert (record.spec, record.recall_target) == ("IVF4,SQ8", 0.9)
    compress_memory(path, Compression(keys="int8", index="Flat"))
    record = Memory.open(path).segments[0].record.index
    assert record is not None
    assert (record.spec, record.recall_target) == ("Flat", 0.9)
    assert verify(path) == []


def test_old_readers_go_on_and_clusters_stay(indexed: Memory, tmp_path: Path) -> None:
    path = copied(indexed.path, tmp_path)
    cluster_memory(path, GreedyMerge())
    reader = Memory.open(path)
    queries = original_rows(indexed)[[5, 9]]
    compress_memory(path, Compression(keys="pq8", merge=True))
    np.testing.assert_array_equal(
        reader.search(queries, 5).distances, indexed.search(queries, 5).distances
    )
    clusters, before = Memory.open(path).clusters, reader.clusters
    assert clusters is not None
    assert before is not None
    np.testing.assert_array_equal(clusters.members, before.members)


@pytest.mark.parametrize("index", ["exact", "IVF4,Flat"])
def test_entries_that_left_the_index_are_measured_by_those_they_were_merged_into(
    original: Memory, tmp_path: Path, index: str
) -> None:
    path = copied(original.path, tmp_path)
    compress_memory(path, Compression(merge=True, index=index))
    memory = Memory.open(path)
    ids = np.concatenate([memory.valued_entries(), [-1]])[None]
    query = original_rows(original)[[7]] + 0.2
    np.testing.assert_allclose(
        memory.index_distances(query, ids), memory.key_distances(query, ids), rtol=1e-3, atol=1e-2
    )


def test_two_segments_are_compressed_alike(
    build_memory: Build, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    parts = [build_memory(tiny_model, part) for part in (DOCUMENTS[:5], DOCUMENTS[5:])]
    path = in_two_segments(parts, tmp_path / "joined.memory").path
    compress_memory(path, Compression(keys="pq8", pca=16, merge=True))
    assert verify(path) == []
    memory = Memory.open(path)
    entries = memory.valued_entries()
    weights = np.concatenate([segment.merged.weights for segment in memory.segments])
    np.testing.assert_allclose(
        memory.log_weights(entries), np.log(np.maximum(weights[entries], 1.0)), rtol=1e-6
    )
    queries = original_rows(parts[1])[[4, 8]]
    found = memory.search(queries, 6)
    assert (weights[found.ids] > 0).all()
    np.testing.assert_array_equal(found.distances, memory.key_distances(queries, found.ids))


def test_predictions_hardly_change_when_little_is_lost(
    original: Memory,
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Callers give the model's own states, whatever is stored."""
    path = copied(original.path, tmp_path)
    compress_memory(path, Compression(keys="int8", pca=30))
    options = {"tokenizer": tiny_tokenizer, "lam": 0.5, "temperature": 30.0, "k": 64}
    text = make_documents(3, 30, seed=5)
    before, after = (
        evaluate(tiny_model, memory, text, "knn", **options).nll
        for memory in (original, Memory.open(path))
    )
    assert after == pytest.approx(before, rel=0.02)
    assert after != before


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is to be compressed: say how"),
        ({"index": "Flat"}, "nothing is to be compressed: say how"),
        ({"keys": "fp8"}, "key format 'fp8' is unknown"),
        ({"keys": "pq0"}, "key format 'pq0' is unknown"),
        ({"keys": "none"}, "key format 'none' is unknown"),
        ({"keys": "int8", "neighbours": 9}, "neighbours are for merging"),
        ({"merge": True, "neighbours": 0}, "neighbours must be from 1 to 254"),
        ({"keys": "pq5"}, "keys of 32 dims cannot be cut into 5 equal parts"),
        ({"keys": "pq5", "pca": 16}, "keys of 16 dims cannot be cut into 5 equal parts"),
        ({"pca": 32}, "pca must be from 1 to 31"),
        ({"pca": 0}, "pca must be from 1 to 31"),
        ({"pca": 10, "index": "PQ4"}, "FAISS cannot build the index 'PQ4' over keys of 10 dims"),
        ({"merge": True, "index": "IVF5000,Flat"}, "more lists than the memory has entries"),
        ({"keys": "int8", "recall": 2.0}, "the recall target must lie in"),
        ({"keys": "int8", "recall": 0.0}, "the recall target must lie in"),
        ({"keys": "int8", "index": ""}, "FAISS cannot build the index ''"),
    ],
)
def test_settings_that_do_not_fit_change_nothing(
    indexed: Memory, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = copied(indexed.path, tmp_path)
    before = snapshot(path)
    with pytest.raises(SettingError, match=message):
        compress_memory(path, Compression(**options))
    assert snapshot(path) == before


def test_a_memory_without_keys_cannot_be_compressed(
    build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    memory = build_memory(tiny_model, DOCUMENTS, keys="none")
    for how in (Compression(keys="int8"), Compression(pca=4), Compression(merge=True)):
        with pytest.raises(SettingError, match="has no keys"):
            compress_memory(memory.path, how)


# --- damage and interruptions ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(indexed: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory that has every kind of file that compressing writes."""
    path = copied(indexed.path, tmp_path_factory.mktemp("compressed"))
    compress_memory(path, COMPRESSIONS["all"])
    return path


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    return copied(compressed, tmp_path)


PLACES = {
    "projection": "g000002.projection.npy",
    "codebooks": "g000002.codebooks.npy",
    "keys": f"{SEGMENT}/g000002.keys.npy",
    "rows": f"{SEGMENT}/g000002.rows.npy",
    "weights": f"{SEGMENT}/g000002.weights.npy",
}


@pytest.mark.parametrize("kind", PLACES)
def test_verify_finds_flipped_bytes_and_missing_files(
    folder: Path, rng: np.random.Generator, kind: str
) -> None:
    file = folder / PLACES[kind]
    for _ in flipped(file, rng, 8):
        assert verify(folder) == [f"{PLACES[kind]} differs from its checksum"]
    file.unlink()
    for call in (Memory.open, verify):
        with pytest.raises(FolderError, match=f"{file.name} is missing"):
            call(folder)


def _changed(at: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return change


LIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "a weight too many": ("weights", lambda w: w + (w > 1), "do not count"),
    "one entry less": ("weights", lambda w: w * (w < 3), "do not count"),
    "another row": ("rows", _changed(4, 600), "do not count"),
    "a row outside": ("rows", _changed(4, 10**6), "lie outside -1 to"),
    "no row": ("rows", _changed(4, -1), "do not count"),
    "a centroid is NaN": ("codebooks", _changed((1, 2, 0), np.nan), "a centroid of keys is not"),
    "a map is infinite": ("projection", _changed((1, 2), np.inf), "the projection is not finite"),
}


@pytest.mark.parametrize("lie", LIES)
def test_verify_checks_what_the_files_say(folder: Path, lie: str) -> None:
    kind, change, message = LIES[lie]
    replaced(folder, PLACES[kind], change(np.load(folder / PLACES[kind])))
    assert message in "; ".join(verify(folder))


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no codebooks": (lambda m: m["keys"].update(codebooks=None), "without codebooks"),
    "codebooks of none": (lambda m: m["keys"].update(format="int8"), "codebooks without them"),
    "other parts": (lambda m: m["keys"].update(format="pq5"), "keys of 16 dims in 5 parts"),
    "fewer parts": (lambda m: m["keys"].update(format="pq4"), "the manifest says float32 (4, 256"),
    "other dims": (lambda m: m["keys"]["projection"].update(dim=8), "says float32 (8, "),
    "no projection": (lambda m: m["keys"].update(projection=None), "the manifest says float32"),
    "nothing merged": (lambda m: m["segments"][0].update(kept=None), "the manifest says uint8"),
    "fewer kept": (lambda m: m["segments"][0].update(kept=5), "the manifest says uint8 (5, 8)"),
    "no weights": (lambda m: m["segments"][0]["files"].pop("weights"), "names no 'weights' file"),
    "path above": (lambda m: m["keys"]["codebooks"].update(path="../x.npy"), "outside the folder"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, attack: str) -> None:
    change, message = ATTACKS[attack]
    edit_manifest(folder, change)
    for call in (Memory.open, verify):
        with pytest.raises(FolderError) as caught:
            call(folder)
        assert message in str(caught.value)


FAILING: list[tuple[Any, str, int]] = [
    *((ArrayFile, "_pwrite", count) for count in (1, 4, 9)),
    (os, "posix_fallocate", 3),
    *((os, "fsync", count) for count in range(1, 11)),
    *((ApproximateIndex, "write", count) for count in (1, 2)),
    (Path, "replace", 1),
]


@pytest.mark.parametrize(
    ("owner", "name", "count"), FAILING, ids=lambda item: getattr(item, "__name__", str(item))
)
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_failed_compression_leaves_everything_as_it_was(
    indexed: Memory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    count: int,
    error: BaseException,
) -> None:
    path = copied(indexed.path, tmp_path)
    before = snapshot(path)
    call_fails(monkeypatch, owner, name, count, error)
    with pytest.raises(FolderError if error is FULL else KeyboardInterrupt):
        compress_memory(path, COMPRESSIONS["all"])
    monkeypatch.undo()
    assert snapshot(path) == before


@pytest.mark.slow
def test_a_killed_compression_leaves_a_whole_generation(indexed: Memory, tmp_path: Path) -> None:
    moments = [
        *(("compress", "fsync", count) for count in (1, 3, 6, 8, 9, 10, 11)),
        ("compress", "pwrite", 5),
        ("compress", "posix_fallocate", 4),
        ("compress", "replace", 1),
        ("compress", "unlink", 1),
    ]
    for moment in moments:
        shutil.copytree(indexed.path, place_of(tmp_path, moment))
    how = Compression(keys="pq8", pca=16, merge=True)
    kill_writers({"compress": lambda path: compress_memory(path, how)}, tmp_path, moments)
    for moment in moments:
        path = place_of(tmp_path, moment)
        assert verify(path) == []
        published = moment[1:] in [("fsync", 11), ("unlink", 1)]
        manifest = Memory.open(path).manifest
        assert manifest.keys is not None
        assert (manifest.version, manifest.keys.format) == (
            (2, "pq8") if published else (1, "fp16")
        )
        compress_memory(path, Compression(keys="int8"))
        assert verify(path) == []
        assert files(path) == live_files(path)


# --- clusters of merged entries, as pointers follow them ------------------------------------------


@given(
    labels=st.lists(st.integers(-1, 3), min_size=12, max_size=12),
    rows=st.lists(st.lists(st.integers(0, 11), max_size=5, unique=True), min_size=1, max_size=4),
    most=st.integers(1, 14),
)
def test_a_pointer_in_no_cluster_brings_no_others(
    labels: list[int], rows: list[list[int]], most: int
) -> None:
    clusters = Clusters.from_labels(np.array(labels), 4)
    pointers = np.array([row + [-1] * (5 - len(row)) for row in rows])
    found = extend(pointers, clusters, most)
    expected = plain_extend(pointers, clusters, most)
    assert [row[row >= 0].tolist() for row in found] == expected
    for row, extended in zip(rows, expected, strict=True):
        own = {labels[entry] for entry in row[:most]} - {-1}
        members = {entry for entry in range(12) if labels[entry] in own}
        assert set(extended) <= set(row) | members
        if most == 14:
            assert members <= set(extended) or len(extended) == most
