"""Which entries share a state: clusters of keys, as RetoMaton follows them (arXiv:2201.12431).

k-means joins entries whose keys are near; greedy merge (arXiv:2109.04212) joins near entries of the
same value. Both label entries; `Clusters` holds the labels so that members are found at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int, Integer

from nearest.errors import SettingError
from nearest.index.faiss_module import load_faiss
from nearest.index.ids import position_dtype
from nearest.index.keys import Keys
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
        of: the cluster of each position (int32), -1 where it is in none.
        offsets: cluster c holds members[offsets[c] : offsets[c + 1]] (int64).
        members: entry ids, ascending within a cluster (int32, or int64 beyond 2^31 positions).
    """

    of: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " clusters_plus_1"]
    members: Int[np.ndarray, " members"]

    @classmethod
    def from_labels(cls, of: Int[np.ndarray, " tokens"], clusters: int) -> "Clusters":
        """Collect the members of `clusters` clusters from each position's label."""
        clustered = np.flatnonzero(of != NO_CLUSTER)
        labels = of[clustered]
        offsets = np.zeros(clusters + 1, np.int64)
        np.cumsum(np.bincount(labels, minlength=clusters), out=offsets[1:])
        members = clustered[np.argsort(labels, kind="stable")]
        return cls(of.astype(np.int32), offsets, members.astype(position_dtype(len(of))))

    def samples(
        self, most: int
    ) -> Iterator[tuple[Int[np.ndarray, " some"], Int[np.ndarray, " some"]]]:
        """Clusters, and one member of each that no other turn gives, spread evenly over it.

        There are `most` turns; a cluster of fewer members has a part in as many of them.
        """
        counts = np.diff(self.offsets)
        drawn = np.minimum(counts, most)
        for turn in range(most):
            some = np.flatnonzero(drawn > turn)
            place = self.offsets[some] + (2 * turn + 1) * counts[some] // (2 * drawn[some])
            yield some, self.members[place].astype(np.int64)

    def problems(self, entries: Int[np.ndarray, " m"]) -> list[str]:
        """What is wrong with clusters of these entries, one sentence each."""
        count = len(self.offsets) - 1
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            return ["cluster offsets do not rise from 0"]
        if self.offsets[-1] != len(self.members):
            return ["cluster offsets do not end with the members"]
        if ((self.of < NO_CLUSTER) | (self.of >= count)).any():
            return ["an entry is in a cluster that does not exist"]
        problems = []
        outside = np.ones(len(self.of), dtype=bool)
        outside[entries] = False
        if (self.of[outside] != NO_CLUSTER).any():
            problems.append("a position without value is in a cluster")
        expected = Clusters.from_labels(self.of, count)
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
    """Clusters of entries whose keys are nearest to the same centroid, by squared L2.

    Centroids are found by k-means on a sample; then every entry is assigned, block by block. Of
    more than 4,096 centroids only those in the eight nearest inverted lists are compared, which
    finds the nearest for all but a few entries in a thousand. A cluster may end up empty.

    Args:
        keys: one a position.
        entries: ascending ids of those to cluster.
        tokens: number of positions.
        clusters: number of clusters.
        rng: for the sample and the first centroids.
        sample: number of entries to find centroids with, at least one a cluster.
        iterations: of k-means.
        progress: told what has been done.

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
    of = np.full(tokens, NO_CLUSTER, np.int32)
    of[entries] = _assigned(nearest, keys, entries, progress)
    return Clusters.from_labels(of, clusters)


def assigned_clusters(
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    centroids: Float[np.ndarray, "clusters dim"],
    progress: Progress = no_progress,
) -> Int[np.ndarray, " m"]:
    """The cluster of each entry by the centroids of others, found as `kmeans_clusters` finds it."""
    rows = np.ascontiguousarray(centroids)
    nearest = _centroid_index(rows, len(rows))
    nearest.add(rows)
    return _assigned(nearest, keys, entries, progress)


def _assigned(
    nearest: Any, keys: Keys, entries: Int[np.ndarray, " m"], progress: Progress
) -> Int[np.ndarray, " m"]:
    of = np.empty(len(entries), np.int32)
    for start in range(0, len(entries), _BLOCK):
        block = entries[start : start + _BLOCK]
        of[start : start + len(block)] = nearest.search(keys.rows(block), 1)[1][:, 0]
        progress("clusters", start + len(block), len(entries))
    return of


def _centroid_index(rows: Float[np.ndarray, "s dim"], clusters: int) -> Any:
    """An empty index for centroids of these keys, which k-means fills at each iteration."""
    faiss = load_faiss()
    if clusters <= _EXACT_CENTROIDS:
        return faiss.IndexFlatL2(rows.shape[1])
    index = faiss.index_factory(rows.shape[1], f"IVF{round(clusters**0.5)},Flat")
    index.nprobe = _LISTS_PROBED
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    return index


class Merged(NamedTuple):
    """What a greedy merge leaves.

    Attributes:
        into: the entry that stands for each position (int64): itself, or the one it was merged
            into.
        weights: number of entries that each position stands for (uint8): 0 for those merged into
            another, and where there is no value.
    """

    into: Int[np.ndarray, " tokens"]
    weights: Integer[np.ndarray, " tokens"]

    def clusters(self) -> Clusters:
        """Entries that were merged together; those that stand for themselves are in none."""
        heads = np.flatnonzero(self.weights > 1)
        number = np.full(len(self.into), NO_CLUSTER, np.int64)
        number[heads] = np.arange(len(heads))
        return Clusters.from_labels(number[self.into], len(heads))


def check_neighbours(neighbours: int) -> None:
    """Refuse a number of neighbours that `greedy_merge` cannot count (SettingError)."""
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

    An entry that has not been merged takes in those of its neighbours that have its value and stand
    for themselves alone; what they counted is added to its weight.

    Args:
        values: the value of each position (int64).
        entries: ids of those to merge.
        neighbours: nearest entries of each of some entries, nearest first, -1 where there are
            fewer; an entry itself among them is passed over, and at most 254 others.
        rng: for the order.
        progress: told what has been done.
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
@numba.njit(nogil=True, cache=True)
def _merge(block: Any, neighbours: Any, values: Any, into: Any, weights: Any) -> None:
    for i in range(len(block)):
        entry = block[i]
        if weights[entry] == 0:  # merged since its neighbours were looked up
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
