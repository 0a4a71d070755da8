"""Give a memory clusters of its entries, as a new snapshot."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearest.index.clusters import Clusters, check_neighbours, greedy_merge, kmeans_clusters
from nearest.index.neighbours import NO_ENTRY
from nearest.progress import Progress, no_progress
from nearest.store.change import changing
from nearest.store.manifest import ClustersRecord
from nearest.store.parts.clusters import write_arrays
from nearest.store.searched import SearchedSnapshot

_SEED = 0
_SAMPLE_A_CLUSTER = 32


@dataclass(frozen=True)
class KMeans:
    """So many clusters of near keys; `sample` entries find the centroids, 32 a cluster if None."""

    clusters: int
    sample: int | None = None
    iterations: int = 10


@dataclass(frozen=True)
class GreedyMerge:
    """Clusters of near entries with the same value, among so many neighbours of each."""

    neighbours: int = 9

    def __post_init__(self) -> None:
        check_neighbours(self.neighbours)


def cluster_memory(path: Path, how: KMeans | GreedyMerge, progress: Progress = no_progress) -> None:
    """Find clusters of all entries and store them, in place of those there may be.

    Raises:
        SettingError: the numbers make no clusters, or the memory has no keys.
        FolderError: the folder is no memory, or cannot be written.
    """
    with changing(path) as change:
        memory = SearchedSnapshot(change.snapshot)
        if isinstance(how, KMeans):
            found = _by_kmeans(memory, how, progress)
        else:
            found = _by_merging(memory, how, progress)
        count, bounds = len(found.offsets) - 1, memory.bounds
        segments = []
        for segment, (first, stop) in zip(change.segments, pairwise(bounds), strict=True):
            own = Clusters.from_labels(found.labels[first:stop], count)
            files = write_arrays(change.files(segment.record.name), own)
            segments.append(segment.record.with_files(files, members=len(own.members)))
        change.publish(
            segments=segments,
            clusters=ClustersRecord(
                "k-means" if isinstance(how, KMeans) else "greedy merge", count
            ),
        )


def _by_kmeans(memory: SearchedSnapshot, how: KMeans, progress: Progress) -> Clusters:
    sample = _SAMPLE_A_CLUSTER * how.clusters if how.sample is None else how.sample
    return kmeans_clusters(
        memory.keys,
        memory.keyed_entries(),
        memory.positions,
        how.clusters,
        np.random.default_rng(_SEED),
        sample=sample,
        iterations=how.iterations,
        progress=progress,
    )


def _by_merging(memory: SearchedSnapshot, how: GreedyMerge, progress: Progress) -> Clusters:
    entries = memory.keyed_entries()
    values = np.full(memory.positions, NO_ENTRY)
    values[entries] = memory.values(entries)

    def neighbours(some: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b k"]:
        return memory.near_entries(some, how.neighbours + 1).ids

    rng = np.random.default_rng(_SEED)
    return greedy_merge(values, entries, neighbours, rng, progress).clusters()
