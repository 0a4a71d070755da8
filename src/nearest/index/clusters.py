"""Clusters of entries that share a state of the automaton of RetoMaton (arXiv:2201.12431).

k-means groups entries with near keys; greedy merge (arXiv:2109.04212) groups near entries with the
same value. Both give each entry a label; `Clusters` also lists the members of each cluster.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int, Integer

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex
from nearest.index.faiss_module import load_faiss
from nearest.index.ids import position_dtype
from nearest.index.keys import Keys
from nearest.machine import code_can_be_cached
from nearest.progress import Progress, no_progress

NO_CLUSTER = -1
_EXACT_CENTROIDS = 4_096  # an entry is compared with all of so many, with lists of more
_LISTS_PROBED = 8
_BLOCK = 16_384  # entries
_MOST_NEIGHBOURS = 254  # what one entry takes in is counted in a byte
_MERGE_BLOCK = 4_096  # entries whose neighbours are looked up together


@dataclass(frozen=True)
class Clusters:
    """Clusters of entries in compressed sparse rows.

    Attributes:
        labels: the cluster of each position (int32), -1 where it is in none.
        offsets: cluster c holds members[offsets[c] : offsets[c + 1]] (int64).
        members: entry ids, ascending within a cluster (int32, or int64 beyond 2^31 positions).
    """

    labels: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " clusters_plus_1"]
    members: Int[np.ndarray, " members"]

    @classmethod
    def from_labels(cls, labels: Int[np.ndarray, " tokens"], clusters: int) -> "Clusters":
        """Collect the members of each cluster from the labels of all positions."""
        clustered = np.flatnonzero(labels != NO_CLUSTER)
        numbers = labels[clustered]
        offsets = np.zeros(clusters + 1, np.int64)
        np.cumsum(np.bincount(numbers, minlength=clusters), out=offsets[1:])
        members = clustered[np.argsort(numbers, kind="stable")]
        members = members.astype(position_dtype(len(labels)))
        return cls(labels.astype(np.int32), offsets, members)

    def samples(
        self, most: int
    ) -> Iterator[tuple[Int[np.ndarray, " some"], Int[np.ndarray, " some"]]]:
        """Sample up to `most` members of each cluster, spread evenly over it, one at a time.

        Turn i yields the clusters with more than i members, and their i-th sampled members.
        """
        counts = np.diff(self.offsets)
        drawn = np.minimum(counts, most)
        for turn in range(most):
            some = np.flatnonzero(drawn > turn)
            place = self.offsets[some] + (2 * turn + 1) * counts[some] // (2 * drawn[some])
            yield some, self.members[place].astype(np.int64)

    def problems(self, entries: Int[np.ndarray, " m"]) -> list[str]:
        """Faults, but for values out of range, in clusters of these entries, one sentence each."""
        problems = []
        outside = np.ones(len(self.labels), dtype=bool)
        outside[entries] = False
        if (self.labels[outside] != NO_CLUSTER).any():
            problems.append("a position without value is in a cluster")
        expected = Clusters.from_labels(self.labels, len(self.offsets) - 1)
        if not (
            np.array_equal(expected.offsets, self.offsets)
            and np.array_equal(expected.members, self.members)
        ):
            problems.append("the members of clusters are not the entries that say so")
        return problems


def kmeans_clusters(
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    tokens: int,
    clusters: int,
    rng: np.random.Generator,
    *,
    sample: int,
    iterations: int,
    progress: Progress = no_progress,
) -> Clusters:
    """Cluster entries by k-means on their keys (squared L2); a cluster may be empty.

    `tokens` is the number of positions; the rest is as in `kmeans_centroids`.
    """
    numbers: dict[str, Any] = {"sample": sample, "iterations": iterations, "progress": progress}
    nearest = kmeans_centroids(keys, entries, clusters, rng, **numbers)
    labels = np.full(tokens, NO_CLUSTER, np.int32)
    labels[entries] = nearest_centroids(nearest, keys, entries, progress)
    return Clusters.from_labels(labels, clusters)


def kmeans_centroids(
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    clusters: int,
    rng: np.random.Generator,
    *,
    sample: int,
    iterations: int,
    progress: Progress = no_progress,
) -> ApproximateIndex:
    """Find centroids in a sample of entries; an index of them, for `nearest_centroids`.

    With more than 4,096, an entry is compared with those in the eight nearest inverted lists, which
    finds the nearest for all but a few entries in a thousand.

    Args:
        keys: one a position.
        entries: ascending ids of the entries to cluster.
        clusters: number of clusters.
        rng: draws the sample and the first centroids.
        sample: number of entries to train centroids on, at least one for each cluster.
        iterations: number of k-means iterations.
        progress: called as work is done.

    Raises:
        SettingError: there are more clusters than entries, or one of the numbers is too small.
    """
    if not 1 <= clusters <= len(entries):
        raise SettingError(
            f"clusters must be from 1 to the memory's {len(entries):,} entries, got {clusters:,}"
        )
    if sample < clusters:
        raise SettingError(
            f"a sample of {sample:,} entries is too small for {clusters:,} clusters: take at least "
            "one for each"
        )
    if iterations < 1:
        raise SettingError(f"iterations must be at least 1, got {iterations}")
    faiss = load_faiss()
    chosen = np.sort(rng.choice(entries, size=min(sample, len(entries)), replace=False))
    progress("centroids", 0, None)
    training = faiss.Clustering(keys.dim, clusters)
    training.niter = iterations
    training.seed = int(rng.integers(1 << 31))
    training.min_points_per_centroid = 1  # the caller has chosen the sample: no advice, no cut
    training.max_points_per_centroid = len(chosen)
    rows = keys.rows(chosen)
    nearest = _centroid_index(rows, clusters)
    training.train(rows, nearest)
    return ApproximateIndex(nearest, "l2")


def assigned_clusters(
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    centroids: Float[np.ndarray, "clusters dim"],
    progress: Progress = no_progress,
) -> Int[np.ndarray, " m"]:
    """The nearest of given centroids for each entry, found as `kmeans_clusters` finds it."""
    rows = np.ascontiguousarray(centroids)
    nearest = _centroid_index(rows, len(rows))
    nearest.add(rows)
    return nearest_centroids(ApproximateIndex(nearest, "l2"), keys, entries, progress)


def nearest_centroids(
    nearest: ApproximateIndex,
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    progress: Progress = no_progress,
) -> Int[np.ndarray, " m"]:
    """The nearest centroid of each entry (int32), by an index of the centroids."""
    labels = np.empty(len(entries), np.int32)
    for start in range(0, len(entries), _BLOCK):
        block = entries[start : start + _BLOCK]
        labels[start : start + len(block)] = nearest.search(keys.rows(block), 1).ids[:, 0]
        progress("clusters", start + len(block), len(entries))
    return labels


def _centroid_index(rows: Float[np.ndarray, "s dim"], clusters: int) -> Any:
    """An empty index, which k-means fills with the centroids at each iteration."""
    faiss = load_faiss()
    if clusters <= _EXACT_CENTROIDS:
        return faiss.IndexFlatL2(rows.shape[1])
    index = faiss.index_factory(rows.shape[1], f"IVF{round(clusters**0.5)},Flat")
    index.nprobe = _LISTS_PROBED
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    return index


class Merged(NamedTuple):
    """The result of a greedy merge.

    Attributes:
        into: the entry that each position was merged into, else itself (int64).
        weights: number of entries that each position stands for (uint8); 0 for entries that were
            merged into another, and for positions that are no entries.
    """

    into: Int[np.ndarray, " tokens"]
    weights: Integer[np.ndarray, " tokens"]

    def clusters(self) -> Clusters:
        """One cluster for each entry that others were merged into; unmerged entries are in none."""
        heads = np.flatnonzero(self.weights > 1)
        number = np.full(len(self.into), NO_CLUSTER, np.int64)
        number[heads] = np.arange(len(heads))
        return Clusters.from_labels(number[self.into], len(heads))


def check_neighbours(neighbours: int) -> None:
    """Raise SettingError if `greedy_merge` cannot count so many neighbours."""
    if not 1 <= neighbours <= _MOST_NEIGHBOURS:
        raise SettingError(f"neighbours must be from 1 to {_MOST_NEIGHBOURS}, got {neighbours}")


def greedy_merge(
    values: Int[np.ndarray, " tokens"],
    entries: Int[np.ndarray, " m"],
    neighbours: Callable[[Int[np.ndarray, " b"]], Int[np.ndarray, "b k"]],
    rng: np.random.Generator,
    progress: Progress = no_progress,
) -> Merged:
    """Merge near entries of the same value, in random order (He et al., arXiv:2109.04212).

    An entry that has not been merged takes in those neighbours that have its value and stand for
    themselves alone, and adds their weights to its own.

    Args:
        values: the value of each position (int64).
        entries: ids of the entries to merge.
        neighbours: returns the nearest entries of each given entry, nearest first, padded with -1;
            at most 254 beside the entry itself, which is skipped.
        rng: draws the order.
        progress: called as work is done.
    """
    into = np.arange(len(values))
    weights = np.zeros(len(values), np.uint8)
    weights[entries] = 1
    order = rng.permutation(entries)
    for start in range(0, len(order), _MERGE_BLOCK):
        block = order[start : start + _MERGE_BLOCK]
        block = block[weights[block] > 0]
        _merge(block, neighbours(block), values, into, weights)
        progress("greedy merge", start + len(block), len(order))
    return Merged(into, weights)


@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, cache=code_can_be_cached())
def _merge(block: Any, neighbours: Any, values: Any, into: Any, weights: Any) -> None:
    for i in range(len(block)):
        entry = block[i]
        if weights[entry] == 0:  # merged since its neighbours were searched
            continue
        for other in neighbours[i]:
            if (
                other >= 0
                and other != entry
                and weights[other] == 1
                and values[other] == values[entry]
            ):
                into[other] = entry
                weights[other] = 0
                weights[entry] += 1
