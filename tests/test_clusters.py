"""Clusters against brute force: k-means by nearest centroid, greedy merge entry by entry."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nearest.index.clusters
from nearest.errors import SettingError
from nearest.index.clusters import NO_CLUSTER, Clusters, greedy_merge, kmeans_clusters
from nearest.index.keys import FloatKeys, Keys

TOKENS, DIM = 3000, 8


@pytest.fixture(scope="module")
def groups() -> np.ndarray:
    """Which of thirty far-apart groups each position's key belongs to."""
    return np.random.default_rng(0).integers(30, size=TOKENS)


@pytest.fixture(scope="module")
def keys(groups: np.ndarray) -> Keys:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(30, DIM)) * 10
    return FloatKeys((centres[groups] + rng.normal(size=(TOKENS, DIM))).astype(np.float16), "l2")


@pytest.fixture(scope="module")
def entries() -> np.ndarray:
    return np.flatnonzero(np.arange(TOKENS) % 7)


def check_rows(found: Clusters, entries: np.ndarray, clusters: int) -> None:
    """Every entry is in exactly one cluster, which lists it; nothing else is in any."""
    assert len(found.offsets) == clusters + 1
    assert (found.labels.dtype, found.offsets.dtype, found.members.dtype) == (
        np.int32,
        np.int64,
        np.int32,
    )
    for cluster in range(clusters):
        members = found.members[found.offsets[cluster] : found.offsets[cluster + 1]]
        assert members.tolist() == np.flatnonzero(found.labels == cluster).tolist()
    assert np.flatnonzero(found.labels != NO_CLUSTER).tolist() == entries.tolist()
    assert found.problems(entries) == []


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40))
def test_members_are_those_that_say_so(labels: list[int]) -> None:
    of = np.array(labels)
    check_rows(Clusters.from_labels(of, 7), np.flatnonzero(of >= 0), 7)


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40), st.integers(1, 9))
def test_samples_are_members_spread_over_their_cluster(labels: list[int], most: int) -> None:
    of = np.array(labels)
    drawn: dict[int, list[int]] = {cluster: [] for cluster in range(7)}
    for clusters, members in Clusters.from_labels(of, 7).samples(most):
        for cluster, member in zip(clusters.tolist(), members.tolist(), strict=True):
            drawn[cluster].append(member)
    for cluster, found in drawn.items():
        members = np.flatnonzero(of == cluster)
        assert len(found) == min(most, len(members))
        if found:  # the middle of each of as many equal parts
            middles = (np.arange(len(found)) + 0.5) * len(members) / len(found)
            np.testing.assert_array_equal(found, members[np.floor(middles).astype(int)])


@pytest.mark.parametrize("clusters", [1, 2, 40, 500])
@pytest.mark.parametrize("exact", [True, False])
def test_every_entry_is_with_the_nearest_centroid(
    keys: Keys,
    entries: np.ndarray,
    clusters: int,
    exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After convergence the mean of a cluster is its centroid, and no other mean is nearer."""
    monkeypatch.setattr(nearest.index.clusters, "_EXACT_CENTROIDS", 4096 if exact else 1)
    monkeypatch.setattr(nearest.index.clusters, "_BLOCK", 100)
    told: list[tuple[str, int, int | None]] = []
    found = kmeans_clusters(
        keys,
        entries,
        TOKENS,
        clusters,
        np.random.default_rng(2),
        sample=TOKENS,
        iterations=60,
        progress=lambda *report: told.append(report),
    )
    check_rows(found, entries, clusters)
    assert told[-1] == ("clusters", len(entries), len(entries))
    rows, labels = keys.rows(entries).astype(np.float64), found.labels[entries]
    filled = np.unique(labels)
    means = np.array([rows[labels == cluster].mean(0) for cluster in filled])
    to_means = ((rows[:, None] - means) ** 2).sum(-1)
    own = np.take_along_axis(to_means, np.searchsorted(filled, labels)[:, None], 1)[:, 0]
    assert (own <= to_means.min(1) * 1.02 + 1e-3).mean() > (0.999 if exact else 0.97)


def test_far_apart_groups_are_found_from_a_sample(
    keys: Keys, entries: np.ndarray, groups: np.ndarray
) -> None:
    found = kmeans_clusters(
        keys, entries, TOKENS, 120, np.random.default_rng(0), sample=600, iterations=20
    )
    for cluster in range(120):  # more clusters than groups: each lies within one
        members = found.members[found.offsets[cluster] : found.offsets[cluster + 1]]
        assert len(set(groups[members].tolist())) <= 1


def test_the_same_seed_gives_the_same_clusters(keys: Keys, entries: np.ndarray) -> None:
    first, same, other = (
        kmeans_clusters(
            keys, entries, TOKENS, 50, np.random.default_rng(seed), sample=500, iterations=3
        ).labels
        for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize("exact", [True, False])
def test_equal_keys_leave_clusters_empty(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest.index.clusters, "_EXACT_CENTROIDS", 4096 if exact else 1)
    equal = FloatKeys(np.repeat(np.eye(3, DIM, dtype=np.float16), 20, axis=0), "l2")
    entries = np.arange(1, 60)
    found = kmeans_clusters(
        equal, entries, 60, 59, np.random.default_rng(0), sample=59, iterations=4
    )
    check_rows(found, entries, 59)
    assert (np.diff(found.offsets) == 0).sum() >= 59 - 3
    for group in range(3):
        assert len(np.unique(found.labels[entries[entries // 20 == group]])) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clusters": 0}, "clusters must be from 1 to the memory's 2,571 entries, got 0"),
        ({"clusters": 2572}, "clusters must be from 1 to the memory's 2,571 entries, got 2,572"),
        ({"sample": 9}, "a sample of 9 entries is too small for 10 clusters"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_numbers_that_make_no_clusters_are_refused(
    keys: Keys, entries: np.ndarray, changed: dict[str, int], message: str
) -> None:
    settings = {"clusters": 10, "sample": 100, "iterations": 2, **changed}
    clusters = settings.pop("clusters")
    with pytest.raises(SettingError, match=message):
        kmeans_clusters(keys, entries, TOKENS, clusters, np.random.default_rng(0), **settings)


def merged_one_by_one(
    values: np.ndarray, order: np.ndarray, neighbours: dict[int, list[int]]
) -> tuple[list[int], list[int]]:
    """Algorithm 1 of arXiv:2109.04212, with sets instead of arrays."""
    stands_for = {entry: {entry} for entry in order.tolist()}
    for entry in order.tolist():
        if entry not in stands_for:
            continue
        for other in neighbours[entry]:
            alone = stands_for.get(other) == {other}
            if other != entry and alone and values[other] == values[entry]:
                stands_for[entry] |= stands_for.pop(other)
    into = list(range(len(values)))
    for head, others in stands_for.items():
        for other in others:
            into[other] = head
    return into, [len(stands_for.get(entry, ())) for entry in range(len(values))]


@settings(max_examples=60)
@given(
    entries=st.sets(st.integers(0, 29), min_size=1),
    kinds=st.integers(1, 4),
    k=st.integers(1, 9),
    block=st.sampled_from([1, 3, 100]),
    seed=st.integers(0, 1000),
)
def test_greedy_merge_equals_the_naive_algorithm(
    entries: set[int], kinds: int, k: int, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = np.array(sorted(entries))
    values = rng.integers(kinds, size=30)
    near = {
        entry: rng.permutation(ids)[:k].tolist() + [-1] * (k - min(k, len(ids))) for entry in ids
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest.index.clusters, "_MERGE_BLOCK", block)
        found = greedy_merge(
            values,
            ids,
            lambda some: np.array([near[entry] for entry in some], np.int64).reshape(-1, k),
            np.random.default_rng(seed),
        )
    into, weights = merged_one_by_one(values, np.random.default_rng(seed).permutation(ids), near)
    assert found.into.tolist() == into
    assert found.weights.tolist() == weights
    assert int(found.weights.sum()) == len(ids)
    clusters = found.clusters()
    together = ids[(found.weights[found.into[ids]] > 1)]
    check_rows(clusters, together, len(clusters.offsets) - 1)
    for cluster, head in enumerate(np.flatnonzero(found.weights > 1)):
        members = np.flatnonzero(clusters.labels == cluster)
        assert members.tolist() == np.flatnonzero(found.into == head).tolist()


LIES: dict[str, Callable[[Clusters], Clusters]] = {
    "another cluster": lambda c: Clusters(c.labels[::-1].copy(), c.offsets, c.members),
    "another order": lambda c: Clusters(c.labels, c.offsets, c.members[::-1].copy()),
}


@pytest.mark.parametrize("lie", LIES)
def test_inconsistent_rows_are_noticed(lie: str) -> None:
    sound = Clusters.from_labels(np.array([0, 1, 2, 0, 2, 2, 1]), 3)
    assert sound.problems(np.arange(7)) == []
    (problem,) = LIES[lie](sound).problems(np.arange(7))
    assert problem.startswith("the members of clusters")
    assert sound.problems(np.arange(6)) == ["a position without value is in a cluster"]
