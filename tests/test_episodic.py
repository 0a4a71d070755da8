"""The episodic memory against a naive dictionary: lists, loops, one key at a time, in float64."""

import doctest
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearest import episodic
from nearest.episodic import EpisodicMemory, EpisodicSettings, inverse_distance_weights
from nearest.errors import FolderError, NearestError, SettingError
from nearest.index import mutable
from nearest.index.mutable import MutableIndex
from nearest.models.memorizing.memory import AttentionMemory

DIM = 3


class NaiveMemory:
    """What the paper says, written down plainly."""

    def __init__(self, chosen: EpisodicSettings) -> None:
        self.chosen = chosen
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.use: list[int] = []  # entries in order of their last use, the latest last

    def nearest(self, key: np.ndarray) -> list[tuple[float, int]]:
        gaps = [(float(((key - old) ** 2).sum()), i) for i, old in enumerate(self.keys)]
        return sorted(gaps)[: self.chosen.k]

    def used(self, entry: int) -> None:
        self.use = [i for i in self.use if i != entry] + [entry]

    def write(self, key: np.ndarray, value: np.ndarray) -> int:
        near = self.nearest(key)[:1]
        if near and near[0][0] <= self.chosen.near**2:
            entry = near[0][1]
            old = self.values[entry]
            self.values[entry] = old + self.chosen.rate * (value - old)
        elif len(self.keys) < self.chosen.capacity:
            entry = len(self.keys)
            self.keys.append(key)
            self.values.append(value)
        else:
            entry = self.use[0]
            self.keys[entry], self.values[entry] = key, value
        self.used(entry)
        return entry

    def lookup(self, key: np.ndarray, touch: bool) -> tuple[np.ndarray, list[int]]:
        found = self.nearest(key)
        kernel = [1 / (distance + self.chosen.delta) for distance, _ in found]
        total = sum(
            weight * self.values[entry] for weight, (_, entry) in zip(kernel, found, strict=True)
        )
        for _, entry in reversed(found):
            if touch:
                self.used(entry)
        return total / sum(kernel), [entry for _, entry in found]


POOL = np.random.default_rng(5).normal(size=(10, DIM))
POOL = np.concatenate([POOL, POOL[:5] + 0.02, POOL[:3] - 0.02]).astype(np.float32)
ROWS = st.lists(st.integers(0, len(POOL) - 1), max_size=9)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), ROWS),
        st.tuples(st.just("lookup"), ROWS, st.booleans()),
        st.tuples(st.just("save and load")),
    ),
    max_size=12,
)


@pytest.mark.slow
@given(
    operations=OPERATIONS,
    capacity=st.integers(1, 8),
    k=st.integers(1, 5),
    near=st.sampled_from([0.0, 0.05, 0.9]),
    rate=st.sampled_from([0.1, 1.0]),
    at_once=st.sampled_from([(1, 1), (3, 2), (9, 1), (64, 1024)]),
)
@settings(max_examples=100)
def test_equals_a_naive_dictionary_in_any_sequence(
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[Any, ...]],
    capacity: int,
    k: int,
    near: float,
    rate: float,
    at_once: tuple[int, int],
) -> None:
    chosen = EpisodicSettings(DIM, capacity, value_dim=2, k=k, near=near, rate=rate, delta=0.01)
    memory, naive = EpisodicMemory(chosen), NaiveMemory(chosen)
    path = tmp_path_factory.getbasetemp() / "episodic.safetensors"
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearest.episodic._SEARCHED_AT_ONCE", at_once[0])
        patch.setattr("nearest.episodic._HASHED_AT_ONCE", at_once[0])
        patch.setattr("nearest.episodic._EVICTIONS_AT_ONCE", at_once[1])
        for name, *arguments in operations:
            if name == "save and load":
                memory.save(path)
                memory = EpisodicMemory.load(path)
            elif name == "write":
                values = rng.normal(size=(len(arguments[0]), 2))
                found = memory.write(POOL[arguments[0]], values)
                wide = POOL[arguments[0]].astype(np.float64)
                expected = [naive.write(*pair) for pair in zip(wide, values, strict=True)]
                assert found.tolist() == expected
            elif len(memory):
                rows, touch = arguments
                queries = POOL[rows].astype(np.float64) + 0.001
                result = memory.lookup(queries, touch=touch)
                for i, query in enumerate(queries.astype(np.float32).astype(np.float64)):
                    value, entries = naive.lookup(query, touch)
                    np.testing.assert_allclose(result.values[i], value, rtol=1e-9)
                    padding = [-1] * (k - len(entries))
                    assert result.neighbours.ids[i].tolist() == entries + padding
            assert len(memory) == len(naive.keys)
            np.testing.assert_array_equal(memory.keys, np.reshape(naive.keys, (-1, DIM)))
            np.testing.assert_allclose(memory.values, np.reshape(naive.values, (-1, 2)), rtol=1e-12)


def memory_of(keys: Any, values: Any, near: float = 0.0, **options: Any) -> EpisodicMemory:
    keys = np.array(keys, dtype=np.float64)
    options = {"capacity": 100, "k": 2, "delta": 1.0, "near": near, **options}
    memory = EpisodicMemory(EpisodicSettings(keys.shape[1], **options))
    memory.write(keys, np.array(values, dtype=np.float64)[:, None])
    return memory


def test_kernel_in_closed_form() -> None:
    distances = np.array([[0.0, 3.0, np.inf], [1.0, 1.0, 1.0], [np.inf] * 3])
    expected = [[0.8, 0.2, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]]
    np.testing.assert_allclose(inverse_distance_weights(distances, 1.0), expected, rtol=1e-15)


def test_lookup_in_closed_form() -> None:
    """Squared distances 1 and 4 with δ = 1: kernels 1/2 and 1/5, weights 5/7 and 2/7."""
    memory = memory_of([[0.0, 1.0], [2.0, 0.0], [9.0, 9.0]], [7.0, 14.0, 1e6])
    found = memory.lookup(np.array([[0.0, 0.0]]))
    np.testing.assert_allclose(found.values, [[9.0]], rtol=1e-14)
    np.testing.assert_allclose(found.weights, [[5 / 7, 2 / 7]], rtol=1e-14)
    assert found.neighbours.ids.tolist() == [[0, 1]]
    assert found.neighbours.distances.tolist() == [[1.0, 4.0]]


def test_moving_average_in_closed_form() -> None:
    """n writes of v after one of 0 give v·(1 − (1 − α)ⁿ)."""
    memory = memory_of([[1.0, 2.0]], [0.0], rate=0.25)
    for n in range(1, 6):
        memory.write(np.array([[1.0, 2.0]]), np.array([[8.0]]))
        np.testing.assert_allclose(memory.values, [[8 * (1 - 0.75**n)]], rtol=1e-14)


def test_a_near_key_moves_the_value_and_not_the_key() -> None:
    memory = memory_of([[0.0, 0.0]], [0.0], near=0.505, rate=0.5)
    memory.write(np.array([[0.3, 0.4], [0.3, 0.41]]), np.array([[4.0], [100.0]]))
    np.testing.assert_array_equal(memory.keys, np.array([[0, 0], [0.3, 0.41]], np.float32))
    np.testing.assert_allclose(memory.values, [[2.0], [100.0]])


@pytest.mark.parametrize("near", [0.0, 1e-6])
def test_known_keys_are_told_from_others_far_from_the_origin(near: float) -> None:
    """Where their differences are some millionths of their norms."""
    rng = np.random.default_rng(0)
    keys = (1000 + rng.normal(size=(200, 64)) * 1e-2).astype(np.float32)
    memory = memory_of(keys, np.zeros(200), near=near, capacity=400, rate=1.0)
    entries = memory.write(keys[::-1], np.arange(200.0)[:, None])
    assert entries.tolist() == list(range(200))[::-1]
    np.testing.assert_array_equal(memory.values[:, 0], np.arange(200.0)[::-1])


def test_negative_zero_is_zero() -> None:
    memory = memory_of([[0.0, 0.0]], [1.0], rate=1.0)
    assert memory.write(np.array([[-0.0, 0.0]]), np.array([[3.0]])).tolist() == [0]
    assert memory.values.tolist() == [[3.0]]


def test_a_lookup_that_does_not_touch_leaves_the_order_of_use() -> None:
    for touch, dropped in ((True, 1.0), (False, 0.0)):
        memory = memory_of([[0.0], [1.0]], [0.0, 1.0], capacity=2, k=1)
        memory.lookup(np.array([[0.0]]), touch=touch)
        memory.write(np.array([[5.0]]), np.array([[5.0]]))
        assert dropped not in memory.values


def test_the_nearest_neighbour_counts_as_used_last() -> None:
    memory = memory_of([[0.0], [1.0], [2.0]], [0.0, 1.0, 2.0], capacity=3, k=3)
    memory.lookup(np.array([[1.1]]))  # 2 is second, 0 third
    memory.write(np.array([[7.0], [8.0]]), np.array([[7.0], [8.0]]))
    assert sorted(memory.values[:, 0].tolist()) == [1.0, 7.0, 8.0]


def test_fewer_entries_than_k_are_all_there_is() -> None:
    memory = memory_of([[0.0], [2.0]], [3.0, 3.0], k=5)
    found = memory.lookup(np.array([[1.0]]))
    assert found.neighbours.ids[0, 2:].tolist() == [-1] * 3
    assert np.isinf(found.neighbours.distances[0, 2:]).all()
    np.testing.assert_allclose(found.weights, [[0.5, 0.5, 0, 0, 0]])
    np.testing.assert_allclose(found.values, [[3.0]])


def test_nothing_looked_up_and_nothing_written() -> None:
    memory = memory_of([[0.0, 1.0]], [3.0])
    assert memory.lookup(np.empty((0, 2))).values.shape == (0, 1)
    assert memory.write(np.empty((0, 2)), np.empty((0, 1))).tolist() == []
    assert memory.values.tolist() == [[3.0]]


def test_what_is_given_and_what_is_shown_cannot_change_the_memory() -> None:
    keys, values = np.zeros((1, 2), np.float32), np.ones((1, 1))
    memory = EpisodicMemory(EpisodicSettings(2, 10))
    memory.write(keys, values)
    keys[:], values[:] = 9, 9
    assert (memory.keys.tolist(), memory.values.tolist()) == ([[0, 0]], [[1]])
    for shown in (memory.keys, memory.values):
        with pytest.raises(ValueError, match="read-only"):
            shown[0] = 5


def test_the_examples_in_the_documentation_hold() -> None:
    results = doctest.testmod(episodic)
    assert results.attempted >= 1
    assert results.failed == 0


# --- The index below ------------------------------------------------------------------------------


def brute_force(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    gaps = rows.astype(np.float64)[None] - queries[:, None]
    return (gaps**2).sum(-1).argsort(1)[:, :k]


def test_an_index_with_all_lists_probed_equals_brute_force_between_builds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows overwritten since the index was built are found as they are, and not as they were."""
    built: list[int] = []

    def counting(*arguments: Any) -> Any:
        built.append(len(arguments[1]))
        return build(*arguments)

    build = mutable.build_index
    monkeypatch.setattr(mutable, "build_index", counting)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12_000, 4)).astype(np.float32)
    index = MutableIndex(rows, "IVF8,Flat", 8)
    index.wrote(np.arange(9_000))
    queries = rng.normal(size=(20, 4)).astype(np.float32)
    for size in (9_000, 10_000, 10_001, 11_000, 12_000):
        changed = np.unique(rng.integers(0, size, 300))
        rows[changed] = rng.normal(size=(len(changed), 4))
        moved = np.unique(brute_force(rows[:size], queries, 3))  # a little: found once all the same
        rows[moved] += np.float32(0.01)
        index.wrote(moved)
        index.wrote(changed)
        index.wrote(np.arange(10_000, size))
        found = index.search(queries, size, 7)
        np.testing.assert_array_equal(found.ids, brute_force(rows[:size], queries, 7))
    assert built == [10_000]  # too few at 9,000; at 12,000, 2,000 are new and 900 changed


@pytest.mark.parametrize("queries", [1, 30])
def test_the_nearest_that_were_overwritten_do_not_crowd_out_the_others(queries: int) -> None:
    """However many of the nearest were evicted, the nearest of what is stored now are found."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12_000, 4)).astype(np.float32)
    index = MutableIndex(rows, "IVF8,Flat", 8)
    asked = rows[:queries] + np.float32(0.001)
    index.search(asked, len(rows), 5)  # builds the index
    evicted = np.unique(brute_force(rows, asked, 60))
    rows[evicted] = 1_000 + rng.normal(size=(len(evicted), 4))
    index.wrote(evicted)
    for k in (1, 5):
        found = index.search(asked, len(rows), k)
        np.testing.assert_array_equal(found.ids, brute_force(rows, asked, k))


def test_differences_are_measured_a_bounded_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    rows, queries = (rng.normal(size=(n, 4)).astype(np.float32) for n in (500, 50))
    index = MutableIndex(rows, "exact", None)
    whole = index.search(queries, 500, 7)
    monkeypatch.setattr(mutable, "_BLOCK_BYTES", 3 * 8 * 7 * 4)
    found = index.search(queries, 500, 7)
    np.testing.assert_array_equal(found.ids, whole.ids)
    np.testing.assert_array_equal(found.distances, whole.distances)
    np.testing.assert_array_equal(found.ids, brute_force(rows, queries, 7))


def test_an_index_is_built_anew_once_a_quarter_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[int] = []
    build = mutable.build_index
    monkeypatch.setattr(mutable, "build_index", lambda *a: (built.append(len(a[1])), build(*a))[1])
    rng = np.random.default_rng(0)
    chosen = EpisodicSettings(4, 20_000, index="IVF8,Flat", nprobe=8, k=1, rate=1.0)
    memory = EpisodicMemory(chosen)
    for _ in range(40):
        keys = rng.normal(size=(1000, 4)).astype(np.float32)
        memory.write(keys, np.arange(1000.0)[:, None])
        found = memory.lookup(keys[:50])
        np.testing.assert_allclose(found.values[:, 0], np.arange(50.0))
    # First when there are enough; then after more than a quarter, also of a full memory.
    assert built == [10_000, 14_000, 19_000, 20_000, 20_000, 20_000]


def test_auto_scans_few_rows_and_indexes_many(monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[str] = []
    build = mutable.build_index
    monkeypatch.setattr(mutable, "build_index", lambda *a: (specs.append(a[2]), build(*a))[1])
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50_000, 2)).astype(np.float32)
    index = MutableIndex(rows, "auto", 256)
    queries = rng.normal(size=(3, 2)).astype(np.float32)
    index.search(queries, 49_999, 1)
    assert specs == []
    found = index.search(queries, 50_000, 1)
    assert specs == ["IVF256,SQ8"]
    np.testing.assert_allclose(
        found.distances, ((rows[None] - queries[:, None]) ** 2).sum(-1).min(1)[:, None], atol=1e-3
    )


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"value_dim": 0}, "value_dim must be at least 1"),
        ({"k": 0}, "k must be at least 1"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"delta": float("nan")}, "delta must be positive"),
        ({"near": -1.0}, "near must be a distance"),
        ({"near": float("inf")}, "near must be a distance"),
        ({"rate": 0.0}, "rate must lie in"),
        ({"rate": 1.5}, "rate must lie in"),
        ({"nprobe": 0}, "nprobe must be at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        EpisodicSettings(**{"dim": 3, "capacity": 10, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"index": "nonsense"}, "FAISS cannot build the index 'nonsense'"),
        ({"index": "IVF64,Flat"}, "needs 9,984 rows to be trained, and there can be 100"),
        ({"index": "HNSW16", "nprobe": 3}, "no lists to probe"),
        ({"index": "exact", "nprobe": 3}, "no lists to probe"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        EpisodicMemory(EpisodicSettings(dim=3, capacity=100, **options))


@pytest.mark.parametrize("near", [0.0, 0.1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, 1e19])
def test_what_is_not_finite_is_refused_and_nothing_written(near: float, bad: float) -> None:
    memory = memory_of([[0.0, 1.0]], [3.0], near=near)
    keys, values = np.ones((3, 2)), np.ones((3, 1))
    keys[1, 1] = bad
    with pytest.raises(SettingError, match="row 1 of the keys is not finite"):
        memory.write(keys, values)
    with pytest.raises(SettingError, match="row 1 of the keys is not finite"):
        memory.lookup(keys)
    values[2] = bad
    if not np.isfinite(bad):
        with pytest.raises(SettingError, match="row 2 of the values is not finite"):
            memory.write(np.ones((3, 2)), values)
    assert memory.values.tolist() == [[3.0]]


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 4), (1, 3, 2), ()])
def test_keys_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    memory = memory_of([[0.0, 1.0]], [3.0])
    with pytest.raises(SettingError, match=r"and \[n, 2\] is needed"):
        memory.lookup(np.ones(shape))
    with pytest.raises(SettingError, match=r"and \[n, 2\] is needed"):
        memory.write(np.ones(shape), np.ones((3, 1)))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (3, 2), ()])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"and \[3, 1\] is needed"):
        memory_of([[0.0, 1.0]], [3.0]).write(np.ones((3, 2)), np.ones(shape))


def test_an_empty_memory_says_so() -> None:
    with pytest.raises(NearestError, match="is empty, so there is nothing to average: write"):
        EpisodicMemory(EpisodicSettings(2, 10)).lookup(np.ones((1, 2)))


# --- On disk --------------------------------------------------------------------------------------


def test_every_setting_is_kept(tmp_path: Path) -> None:
    chosen = EpisodicSettings(2, 12_000, 3, 4, 0.1 + 0.2, 1e-7, 1 / 3, "IVF4,Flat", 2)
    assert all(getattr(chosen, f.name) != f.default for f in fields(chosen))
    EpisodicMemory(chosen).save(tmp_path / "m")
    loaded = EpisodicMemory.load(str(tmp_path / "m"))
    assert loaded.settings == chosen
    assert len(loaded) == 0


def test_a_damaged_file_is_refused_wherever_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    memory_of(POOL, np.arange(len(POOL))).save(path)
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 23), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 0x01
        path.write_bytes(flipped)
        with pytest.raises(FolderError, match=r"m\.safetensors"):
            EpisodicMemory.load(path)
    for size in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FolderError, match="restore it from a copy"):
            EpisodicMemory.load(path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(FolderError, match="cannot be read"):
        EpisodicMemory.load(path)
    with pytest.raises(FolderError, match="cannot be read"):
        EpisodicMemory.load(tmp_path)
    AttentionMemory.empty(1, 1, 4, 10).save(path)
    with pytest.raises(FolderError, match=r"holds 'attention memory'.*where 'episodic memory'"):
        EpisodicMemory.load(path)
    path.write_bytes(b"\x80\x04\x95" + b"pickle" * 100)
    with pytest.raises(FolderError, match="was not written by nearest"):
        EpisodicMemory.load(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, path = memory_of([[0.0, 1.0]], [3.0]), tmp_path / "m.safetensors"
    memory.save(path)
    memory.write(np.array([[0.0, 1.0]]), np.array([[9.0]]))
    with pytest.raises(FolderError, match="is no folder"):
        memory.save(tmp_path / "none" / "m")
    with pytest.raises(FolderError, match="is a folder"):
        memory.save(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nearest.folder.os.fsync", full)
    with pytest.raises(FolderError, match="the disk is full"):
        memory.save(path)
    monkeypatch.undo()
    assert EpisodicMemory.load(path).values.tolist() == [[3.0]]
    assert [item.name for item in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    memory_of([[0.0, 1.0]], [3.0]).save(path)
    script = f"""
import os
import numpy as np
from pathlib import Path
from nearest import episodic
from nearest.episodic import EpisodicMemory
memory = EpisodicMemory.load({str(path)!r})
memory.write(np.array([[0.0, 1.0]]), np.array([[9.0]]))
Path.replace = lambda *_: os._exit(9)
memory.save({str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert EpisodicMemory.load(path).values.tolist() == [[3.0]]
