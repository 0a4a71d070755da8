"""Clusters in the memory folder, and what memories of every key format answer."""

import copy
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import (
    FULL,
    call_fails,
    edit_manifest,
    in_two_segments,
    make_documents,
    snapshot,
)
from folders import Build, copied, files, flipped, kill_writers, live_files, place_of, replaced
from nearest import Memory
from nearest.build.build import store_settings
from nearest.build.cluster import GreedyMerge, KMeans, cluster_memory
from nearest.build.index import rebuild_index
from nearest.errors import FolderError, ModelError, SettingError
from nearest.folder import ArrayFile, writer_lock
from nearest.index.clusters import kmeans_clusters
from nearest.store.parts.index import IndexChoice
from nearest.store.verify import verify

DIM = 32
DOCUMENTS = make_documents(14, 30)
FORMATS = ["fp16", "int8"]
ARRAYS = ("of", "offsets", "members")
SEGMENT = "segments/000001"


@pytest.fixture(scope="module", params=FORMATS)
def memory(request: pytest.FixtureRequest, build_memory: Build, tiny_model: Any) -> Memory:
    return build_memory(tiny_model, DOCUMENTS, keys=request.param)


@pytest.fixture(scope="module")
def clustered(build_memory: Build, tiny_model: PreTrainedModel) -> Path:
    memory = build_memory(tiny_model, DOCUMENTS, keys="int8")
    cluster_memory(memory.path, KMeans(40))
    return memory.path


@pytest.fixture
def folder(clustered: Path, tmp_path: Path) -> Path:
    """A copy, to be changed, of a memory with clusters in its second generation."""
    return copied(clustered, tmp_path)


@pytest.fixture(scope="module")
def textual(build_memory: Build, tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, DOCUMENTS, keys="none")


# --- key distances --------------------------------------------------------------------------------


def all_rows(memory: Memory) -> np.ndarray:
    return memory.keys.rows(np.arange(memory.tokens)).astype(np.float64)


def test_distances_are_to_the_stored_keys(memory: Memory, rng: np.random.Generator) -> None:
    queries = rng.normal(scale=3, size=(6, DIM)).astype(np.float32)
    ids = rng.integers(-1, memory.tokens, size=(6, 50))
    expected = ((all_rows(memory)[ids] - queries[:, None]) ** 2).sum(-1)
    expected[ids < 0] = np.inf
    np.testing.assert_allclose(memory.key_distances(queries, ids), expected, rtol=1e-4)
    one = memory.key_distances(queries[2:3], ids[2:3])
    np.testing.assert_allclose(one, expected[2:3], rtol=1e-4)


@pytest.mark.parametrize("keys", FORMATS)
def test_two_segments_measure_and_cluster_as_one(
    keys: str, build_memory: Build, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    whole = build_memory(tiny_model, DOCUMENTS, keys=keys)
    parts = [build_memory(tiny_model, part, keys=keys) for part in (DOCUMENTS[:5], DOCUMENTS[5:])]
    joined = in_two_segments(parts, tmp_path / "joined.memory")
    np.testing.assert_array_equal(joined.valued_entries(), whole.valued_entries())
    rng = np.random.default_rng(0)
    queries = rng.normal(scale=3, size=(6, DIM)).astype(np.float32)
    ids = rng.integers(-1, whole.tokens, size=(6, 50))
    expected = ((all_rows(joined)[ids] - queries[:, None]) ** 2).sum(-1)
    expected[ids < 0] = np.inf
    np.testing.assert_allclose(joined.key_distances(queries, ids), expected, rtol=1e-4)
    found = joined.search(queries, 9)
    np.testing.assert_array_equal(found.distances, joined.key_distances(queries, found.ids))
    for how in (KMeans(30), GreedyMerge()):
        cluster_memory(joined.path, how)
        assert verify(joined.path) == []
        clusters = Memory.open(joined.path).clusters
        assert clusters is not None
        spans = [
            len({member < parts[0].tokens for member in clusters.members[start:stop]})
            for start, stop in itertools.pairwise(clusters.offsets)
        ]
        assert max(spans) == 2  # of some clusters, members are in both segments


def test_queries_of_another_dimension_are_refused(memory: Memory) -> None:
    with pytest.raises(SettingError, match="queries have 5 dims, the keys 32"):
        memory.key_distances(np.zeros((1, 5), np.float32), np.zeros((1, 1), np.int64))


def test_search_measures_by_the_stored_keys(memory: Memory) -> None:
    queries = np.random.default_rng(3).normal(scale=3, size=(5, DIM)).astype(np.float32)
    found = memory.search(queries, 7)
    expected = ((queries[:, None] - all_rows(memory)[memory.valued_entries()]) ** 2).sum(-1)
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :7], rtol=1e-4)
    np.testing.assert_array_equal(found.distances, memory.key_distances(queries, found.ids))


# --- no keys --------------------------------------------------------------------------------------


def test_a_memory_without_keys_holds_the_text_and_its_order(
    textual: Memory, memory: Memory
) -> None:
    assert verify(textual.path) == []
    assert textual.manifest.keys is None
    segment = textual.segments[0]
    assert segment.record.index is None
    assert {Path(name).name for name in files(textual.path)} == {
        "manifest.json",
        "tokens.npy",
        "offsets.npy",
        "documents.jsonl.zst",
        "frames.npy",
        "ids.npy",
        "suffix.npy",
    }
    np.testing.assert_array_equal(segment.suffixes, memory.segments[0].suffixes)
    np.testing.assert_array_equal(textual.valued_entries(), memory.valued_entries())
    ids = textual.valued_entries()
    np.testing.assert_array_equal(textual.values(ids), memory.values(ids))
    assert textual.document(3) == memory.document(3)


QUERY = np.zeros((1, DIM), np.float32)
NEEDS_KEYS: dict[str, Callable[[Memory], Any]] = {
    "search": lambda memory: memory.search(QUERY, 3),
    "search by index": lambda memory: memory.search(QUERY, 3, "index"),
    "key distances": lambda memory: memory.key_distances(QUERY, np.zeros((1, 1), np.int64)),
    "keys": lambda memory: memory.keys,
    "the keys' record": lambda memory: memory.keys_record,
    "index": lambda memory: rebuild_index(memory.path, IndexChoice("exact")),
    "k-means": lambda memory: cluster_memory(memory.path, KMeans(3)),
    "greedy merge": lambda memory: cluster_memory(memory.path, GreedyMerge()),
}


@pytest.mark.parametrize("need", NEEDS_KEYS)
def test_what_needs_keys_says_so(textual: Memory, need: str) -> None:
    before = snapshot(textual.path)
    with pytest.raises(SettingError, match=r"has no keys.*: build it with a model and --keys"):
        NEEDS_KEYS[need](textual)
    assert snapshot(textual.path) == before


def test_building_without_keys_runs_no_model(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiny_model, "forward", lambda **_: pytest.fail("the model was run"))
    Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS, tmp_path / "m", keys="none")
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize(
    "options",
    [
        {"index": "Flat"},
        {"nprobe": 3},
        {"recall": 0.9},
        {"metric": "ip"},
        {"window": 8, "stride": 4},
        {"key_layer": "last_hidden"},
        {"batch_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_keys_are_refused_where_there_are_none(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
) -> None:
    message = f"{next(iter(options))} says how keys are made or searched"
    with pytest.raises(SettingError, match=message):
        Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS, tmp_path / "m", keys="none", **options)
    with pytest.raises(SettingError, match="key format 'fp8' is unknown"):
        Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS, tmp_path / "m", keys="fp8")
    assert snapshot(tmp_path) == {}


# --- clusters as a generation ---------------------------------------------------------------------


def test_clusters_are_those_of_the_keys(folder: Path) -> None:
    memory = Memory.open(folder)
    expected = kmeans_clusters(
        memory.keys,
        memory.valued_entries(),
        memory.tokens,
        40,
        np.random.default_rng(0),
        sample=32 * 40,
        iterations=10,
    )
    found = memory.clusters
    assert found is not None
    for name in ARRAYS:
        field = "labels" if name == "of" else name
        array = getattr(found, field)
        np.testing.assert_array_equal(array, getattr(expected, field))
        assert not array.flags.owndata
    record = memory.manifest.clusters
    assert record is not None
    assert (record.made_by, record.clusters) == ("k-means", 40)
    assert memory.segments[0].record.members == memory.entries
    assert files(folder) >= {f"{SEGMENT}/g000002.clusters.{name}.npy" for name in ARRAYS}


def test_suffixes_and_clusters_take_few_bytes(folder: Path) -> None:
    memory = Memory.open(folder)
    suffixes = memory.segments[0].record.files["suffixes"].size
    record = memory.segments[0].record
    headers = 4 * 128
    stored = suffixes + sum(record.files[f"cluster_{name}"].size for name in ARRAYS) - headers
    assert stored <= 12 * memory.tokens + 8 * 41


def merged_by_hand(memory: Memory, neighbours: int) -> set[frozenset[int]]:
    """Greedy merge over all pairs of keys, as sets of entries that were merged together."""
    entries = memory.valued_entries()
    rows = all_rows(memory)[entries]
    near = ((rows[:, None] - rows) ** 2).sum(-1).argsort(axis=1, kind="stable")
    values = memory.values(entries)
    taken: dict[int, set[int]] = {i: {i} for i in range(len(entries))}
    for entry in np.random.default_rng(0).permutation(entries).tolist():
        i = int(np.searchsorted(entries, entry))
        if i not in taken:
            continue
        for j in near[i, : neighbours + 1].tolist():
            if j != i and taken.get(j) == {j} and values[i] == values[j]:
                taken[i] |= taken.pop(j)
    return {frozenset(entries[sorted(t)].tolist()) for t in taken.values() if len(t) > 1}


def test_greedy_merge_equals_a_merge_by_hand(
    build_memory: Build, tiny_model: PreTrainedModel
) -> None:
    texts = ["the court shall hear the case", "the council shall hear it", "a mayor shall not"]
    memory = build_memory(tiny_model, texts)
    cluster_memory(memory.path, GreedyMerge(3))
    clusters = Memory.open(memory.path).clusters
    assert clusters is not None
    found = {
        frozenset(clusters.members[start:stop].tolist())
        for start, stop in itertools.pairwise(clusters.offsets)
    }
    expected = merged_by_hand(memory, 3)
    assert expected
    assert found == expected


def test_clusters_outlive_other_changes_and_are_replaced_by_new_ones(folder: Path) -> None:
    reader = Memory.open(folder)
    before = reader.clusters
    assert before is not None
    rebuild_index(folder, IndexChoice("Flat"))
    store_settings(folder, "knn", {"lam": 0.5})
    kept = Memory.open(folder).clusters
    assert kept is not None
    np.testing.assert_array_equal(kept.members, before.members)
    cluster_memory(folder, GreedyMerge())
    memory = Memory.open(folder)
    assert (memory.manifest.version, memory.settings("knn")) == (5, {"lam": 0.5})
    assert {name for name in files(folder) if "clusters" in name} == {
        f"{SEGMENT}/g000005.clusters.{name}.npy" for name in ARRAYS
    }
    assert verify(folder) == []
    np.testing.assert_array_equal(
        before.labels[:5], kept.labels[:5]
    )  # the old reader keeps its own


def test_a_memory_without_clusters_says_none(memory: Memory) -> None:
    assert memory.clusters is None


def test_clusters_of_some_segments_alone_are_refused(
    build_memory: Build, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    parts = [build_memory(tiny_model, part) for part in (DOCUMENTS[:5], DOCUMENTS[5:])]
    cluster_memory(parts[0].path, KMeans(5))
    with pytest.raises(FolderError, match="a segment has no clusters where others have"):
        in_two_segments(parts, tmp_path / "joined.memory")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: KMeans(0), "clusters must be from 1 to"),
        (lambda: KMeans(10**6), "clusters must be from 1 to the memory's .* entries, got 1,000,00"),
        (lambda: KMeans(20, sample=19), "too small for 20 clusters"),
        (lambda: KMeans(20, iterations=0), "iterations must be at least 1"),
        (lambda: GreedyMerge(0), "neighbours must be from 1 to 254"),
        (lambda: GreedyMerge(255), "neighbours must be from 1 to 254"),
    ],
)
def test_numbers_that_make_no_clusters_change_nothing(
    folder: Path, how: Callable[[], Any], message: str
) -> None:
    before = snapshot(folder)
    with pytest.raises(SettingError, match=message):
        cluster_memory(folder, how())
    assert snapshot(folder) == before


# --- damage and interruptions ---------------------------------------------------------------------


def cluster_file(folder: Path, name: str) -> Path:
    return folder / SEGMENT / f"g000002.clusters.{name}.npy"


@pytest.mark.parametrize("name", ARRAYS)
def test_verify_finds_every_flipped_byte(folder: Path, rng: np.random.Generator, name: str) -> None:
    file = cluster_file(folder, name)
    for _ in flipped(file, rng, 12):
        assert verify(folder) == [f"{SEGMENT}/{file.name} differs from its checksum"]
    file.unlink()
    for call in (Memory.open, verify):
        with pytest.raises(FolderError, match=f"{file.name} is missing"):
            call(folder)


def _swap(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed[[1, -1]] = changed[[-1, 1]]
    return changed


LIES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "members in another order": ("members", _swap, "the members of clusters are not"),
    "an unknown cluster": ("of", lambda of: np.where(of == 3, 40, of), "lie outside -1 to 39"),
    "an end of a document": ("of", lambda of: np.maximum(of, 0), "a position without value"),
    "an entry elsewhere": ("of", lambda of: np.where(of == 3, 4, of), "the members of clusters"),
    "offsets fall": ("offsets", _swap, "do not rise"),
    "offsets start late": ("offsets", lambda o: o + 1, "do not rise"),
    "offsets end early": ("offsets", lambda o: np.append(o[:-1], o[-1] - 1), "do not rise"),
}


@pytest.mark.parametrize("lie", LIES)
def test_verify_checks_that_clusters_are_consistent(folder: Path, lie: str) -> None:
    name, change, message = LIES[lie]
    file = cluster_file(folder, name)
    replaced(folder, f"{SEGMENT}/{file.name}", change(np.load(file)))
    assert message in "; ".join(verify(folder))


@pytest.mark.parametrize(
    ("scale", "message"),
    [(np.nan, "a scale between rows 0"), (-1.0, "a scale between"), (0.0, "a scale between")],
)
def test_verify_checks_the_scales(folder: Path, scale: float, message: str) -> None:
    scales = np.load(folder / "segments/000001/scales.npy")
    scales[7] = scale
    replaced(folder, "segments/000001/scales.npy", scales)
    assert message in "; ".join(verify(folder))


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no file of members": (
        lambda m: m["segments"][0]["files"].pop("cluster_members"),
        "names no 'cluster_members'",
    ),
    "more clusters": (lambda m: m["clusters"].update(clusters=41), "the manifest says int64 (42,)"),
    "fewer members": (lambda m: m["segments"][0].update(members=5), "the manifest says int32 (5,)"),
    "unknown field": (lambda m: m["clusters"].update(url="x"), "is not a valid manifest"),
    "path above": (
        lambda m: m["segments"][0]["files"]["cluster_of"].update(path="../of.npy"),
        "outside the folder: do not use it",
    ),
    "no scales": (lambda m: m["segments"][0]["files"].pop("scales"), "names no 'scales' file"),
    "another format": (lambda m: m["keys"].update(format="fp16"), "the manifest says float16"),
    "no suffix array": (lambda m: m["segments"][0]["files"].pop("suffixes"), "names no 'suffixes'"),
    "keys without index": (lambda m: m["segments"][0].update(index=None), "keys without index"),
    "index without keys": (lambda m: m.update(keys=None), "an index without keys"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, attack: str) -> None:
    change, message = ATTACKS[attack]
    edit_manifest(folder, change)
    for call in (Memory.open, verify):
        with pytest.raises(FolderError) as caught:
            call(folder)
        assert message in str(caught.value)


def test_leftovers_are_removed_and_nothing_else(folder: Path) -> None:
    live = files(folder)
    (folder / SEGMENT / "g000009.clusters.of.npy").write_bytes(b"an interrupted writer's")
    (folder / "g000001.knn.gate.safetensors").write_bytes(b"an interrupted writer's")
    (folder / "clusters.npy").write_bytes(b"a user's")
    (folder / "g000009.projection.npy").mkdir()
    store_settings(folder, "knn", {})
    assert files(folder) == {*live, "clusters.npy"}


def test_a_link_among_the_clusters_is_not_followed(folder: Path, tmp_path: Path) -> None:
    file = cluster_file(folder, "of")
    shutil.move(file, tmp_path / "outside.npy")
    file.symlink_to(tmp_path / "outside.npy")
    with pytest.raises(FolderError, match="links count as such"):
        Memory.open(folder)


def test_two_writers_are_one_too_many(folder: Path) -> None:
    with writer_lock(folder), pytest.raises(FolderError, match="is being written by another"):
        cluster_memory(folder, KMeans(5))


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (ArrayFile, "_pwrite", 1),
        (ArrayFile, "_pwrite", 3),
        (os, "posix_fallocate", 2),
        *((os, "fsync", count) for count in range(1, 7)),
        (Path, "replace", 1),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_failed_clustering_leaves_everything_as_it_was(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    count: int,
    error: BaseException,
) -> None:
    before = snapshot(folder)
    call_fails(monkeypatch, owner, name, count, error)
    with pytest.raises(FolderError if error is FULL else KeyboardInterrupt):
        cluster_memory(folder, KMeans(5))
    monkeypatch.undo()
    assert snapshot(folder) == before


@pytest.mark.parametrize("keys", ["int8", "none"])
@pytest.mark.parametrize(("owner", "name"), [(ArrayFile, "_pwrite"), (os, "fsync")])
def test_a_build_that_fails_at_any_file_leaves_nothing_and_can_be_repeated(
    keys: str,
    owner: Any,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = tmp_path / "new.memory"
    for count in range(1, 6):
        call_fails(monkeypatch, owner, name, count, FULL)
        with pytest.raises(FolderError, match="the disk is full: free some space"):
            Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS[:3], path, keys=keys)
        monkeypatch.undo()
        assert snapshot(tmp_path) == {}
    (path / "segments/000001").mkdir(parents=True)
    for file in ("suffix.npy", "keys.npy", "scales.npy"):  # as a kill would leave them
        (path / "segments/000001" / file).write_bytes(b"stale")
    Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS[:3], path, keys=keys)
    assert verify(path) == []
    assert files(path) == live_files(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_keys_that_int8_cannot_hold_stop_the_build(
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    value: float,
) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.ln_2.bias").fill_(value)
    with pytest.raises(ModelError, match="which int8 keys cannot hold: check the model's weights"):
        Memory.build(model, tiny_tokenizer, DOCUMENTS[:3], tmp_path / "m", keys="int8")
    assert snapshot(tmp_path) == {}


def test_a_killed_clustering_leaves_a_whole_generation(clustered: Path, tmp_path: Path) -> None:
    moments = [
        *(("cluster", "fsync", count) for count in range(1, 8)),
        *(("cluster", "pwrite", count) for count in (1, 3)),
        ("cluster", "posix_fallocate", 2),
        ("cluster", "replace", 1),
        ("cluster", "unlink", 1),
    ]
    for moment in moments:
        shutil.copytree(clustered, place_of(tmp_path, moment))
    kill_writers({"cluster": lambda path: cluster_memory(path, KMeans(5))}, tmp_path, moments)
    for moment in moments:
        path = place_of(tmp_path, moment)
        assert verify(path) == []
        memory = Memory.open(path)
        published = moment[1:] in [("fsync", 7), ("unlink", 1)]
        record = memory.manifest.clusters
        assert record is not None
        assert (memory.manifest.version, record.clusters) == ((3, 5) if published else (2, 40))
        cluster_memory(path, KMeans(6))
        assert files(path) == live_files(path)
        assert verify(path) == []
