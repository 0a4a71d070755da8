"""Give a memory clusters of its entries, as a new generation."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearest.index.clusters import Clusters, check_neighbours, greedy_merge, kmeans_clusters
from nearest.index.neighbours import NO_ENTRY
from nearest.memory import Memory
from nearest.progress import Progress, no_progress
from nearest.store.change import changing, of_generation
from nearest.store.manifest import ClustersRecord, publish_next
from nearest.store.parts.clusters import write_clusters

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
    with changing(path) as manifest:
        memory = Memory.open(path)
        prefix = of_generation(manifest.generation + 1, "")
        if isinstance(how, KMeans):
            clusters = _by_kmeans(memory, how, progress)
        else:
            clusters = _by_merging(memory, how, progress)
        count = len(clusters.offsets) - 1
        record = ClustersRecord("k-means" if isinstance(how, KMeans) else "greedy merge", count)
        segments = []
        bounds = np.cumsum([0, *(segment.tokens for segment in manifest.segments)])
        for old, (first, stop) in zip(manifest.segments, pairwise(bounds), strict=True):
            own = Clusters.from_labels(clusters.of[first:stop], count)
            files = write_clusters(path, f"segments/{old.name}", prefix, own)
            segments.append(old.with_files(files, members=len(own.members)))
        publish_next(path, manifest, segments=segments, clusters=record)


def _by_kmeans(memory: Memory, how: KMeans, progress: Progress) -> Clusters:
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


def _by_merging(memory: Memory, how: GreedyMerge, progress: Progress) -> Clusters:
    entries = memory.keyed_entries()
    values = np.full(memory.positions, NO_ENTRY)
    values[entries] = memory.values(entries)

    def neighbours(some: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b k"]:
        return memory.near_entries(some, how.neighbours + 1).ids

    rng = np.random.default_rng(_SEED)
    return greedy_merge(values, entries, neighbours, rng, progress).clusters()
