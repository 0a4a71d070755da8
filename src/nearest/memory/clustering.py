"""Give a memory clusters of its entries, as a new generation."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Int

from nearest.index.clusters import Clusters, check_neighbours, greedy_merge, kmeans_clusters
from nearest.index.neighbours import NO_ENTRY
from nearest.memory.cluster_files import write_clusters
from nearest.memory.generation import changing
from nearest.memory.manifest import write_manifest
from nearest.memory.memory import Memory
from nearest.progress import Progress, no_progress

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
        if isinstance(how, KMeans):
            made_by, clusters = "k-means", _by_kmeans(memory, how, progress)
        else:
            made_by, clusters = "greedy merge", _by_merging(memory, how, progress)
        record = write_clusters(path, manifest, clusters, made_by)
        write_manifest(
            path,
            msgspec.structs.replace(manifest, generation=manifest.generation + 1, clusters=record),
        )


def _by_kmeans(memory: Memory, how: KMeans, progress: Progress) -> Clusters:
    sample = _SAMPLE_A_CLUSTER * how.clusters if how.sample is None else how.sample
    return kmeans_clusters(
        memory.keys,
        memory.valued_entries(),
        memory.tokens,
        how.clusters,
        np.random.default_rng(_SEED),
        sample=sample,
        iterations=how.iterations,
        progress=progress,
    )


def _by_merging(memory: Memory, how: GreedyMerge, progress: Progress) -> Clusters:
    entries = memory.valued_entries()
    values = np.full(memory.tokens, NO_ENTRY)
    values[entries] = memory.values(entries)

    def neighbours(some: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b k"]:
        return memory.near_entries(some, how.neighbours + 1).ids

    rng = np.random.default_rng(_SEED)
    return greedy_merge(values, entries, neighbours, rng, progress).clusters()
