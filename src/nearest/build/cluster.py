"""Give a memory clusters of its entries, as a new snapshot."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Int

from nearest.build.segments import SegmentSpec, Write, write_each
from nearest.build.workers import reached, threads_of
from nearest.errors import SettingError
from nearest.folder import sha256_of
from nearest.index.approximate import ApproximateIndex, read_index
from nearest.index.clusters import (
    NO_CLUSTER,
    Clusters,
    check_neighbours,
    greedy_merge,
    kmeans_centroids,
    nearest_centroids,
)
from nearest.index.neighbours import NO_ENTRY
from nearest.progress import Progress, no_progress
from nearest.store.change import changing
from nearest.store.manifest import ClustersRecord, SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.parts.clusters import write_arrays
from nearest.store.searched import SearchedSnapshot
from nearest.store.segment import Segment

_CENTROIDS = "centroids.faiss"
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


def how_to_cluster(
    clusters: int | None, sample: int | None, iterations: int, neighbours: int | None
) -> KMeans | GreedyMerge:
    """By k-means with a number of clusters, or by merging with a number of neighbours.

    Raises:
        SettingError: there are both, or neither.
    """
    if clusters is not None and neighbours is None:
        return KMeans(clusters, sample, iterations)
    if clusters is None and neighbours is not None:
        return GreedyMerge(neighbours)
    raise SettingError("give either a number of clusters for k-means, or greedy_merge=True")


class ClusterSpec(SegmentSpec, frozen=True, kw_only=True):
    """What a worker is told that finds the nearest centroid of each entry.

    Attributes:
        clusters: how many.
        centroids: SHA-256 of their file.
    """

    clusters: int = 0
    centroids: str = ""

    def writer(self, folder: Path) -> Write:
        """Writes the clusters of a segment."""
        with (folder / _CENTROIDS).open("rb") as file:
            nearest = ApproximateIndex(read_index(file, self.centroids), "l2")
        return partial(_write_nearest, nearest, self.clusters, no_progress)


def cluster_memory(
    path: Path,
    how: KMeans | GreedyMerge,
    progress: Progress = no_progress,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Find clusters of all entries and store them, in place of those there may be.

    With workers, as in `BuildOptions`, these find the nearest centroids, a segment each.

    Raises:
        SettingError: the numbers make no clusters, the memory has no keys, or workers are to merge.
        FolderError: the folder is no memory, or cannot be written.
    """
    if isinstance(how, GreedyMerge) and not (workers is None and ray is None):
        raise SettingError(
            "a greedy merge takes one entry after another, which one process does: leave workers "
            "and ray out"
        )
    spec = ClusterSpec(threads=threads_of(workers, ray))
    with reached(spec, ray), changing(path) as change:
        memory = SearchedSnapshot(change.snapshot)
        if isinstance(how, GreedyMerge):
            found = _by_merging(memory, how, progress)
            count = len(found.offsets) - 1
            segments = [
                _write(change.files(segment.record.name), segment, found.labels[first:stop], count)
                for segment, (first, stop) in zip(
                    change.segments, pairwise(memory.bounds), strict=True
                )
            ]
        else:
            nearest, count = _centroids(memory, how, progress), how.clusters
            write = partial(_write_nearest, nearest, count, progress)
            told = partial(_told, spec, nearest, count)
            segments = write_each(change, change.segments, write, told, workers, ray, progress)
        change.publish(
            segments=segments,
            clusters=ClustersRecord(
                "k-means" if isinstance(how, KMeans) else "greedy merge", count
            ),
        )


def _centroids(memory: SearchedSnapshot, how: KMeans, progress: Progress) -> ApproximateIndex:
    sample = _SAMPLE_A_CLUSTER * how.clusters if how.sample is None else how.sample
    return kmeans_centroids(
        memory.keys,
        memory.keyed_entries(),
        how.clusters,
        np.random.default_rng(_SEED),
        sample=sample,
        iterations=how.iterations,
        progress=progress,
    )


def _told(spec: ClusterSpec, nearest: ApproximateIndex, count: int, folder: Path) -> ClusterSpec:
    """What workers are told, who read the centroids in a folder."""
    nearest.write(folder / _CENTROIDS)
    digest = sha256_of(folder / _CENTROIDS)
    return msgspec.structs.replace(spec, clusters=count, centroids=digest)


def _write_nearest(
    nearest: ApproximateIndex, count: int, progress: Progress, files: NewFiles, segment: Segment
) -> SegmentRecord:
    """The clusters of a segment whose entries are each in the nearest one."""
    labels = np.full(segment.record.tokens, NO_CLUSTER, np.int32)
    labels[segment.keyed] = nearest_centroids(nearest, segment.keys, segment.keyed, progress)
    return _write(files, segment, labels, count)


def _write(
    files: NewFiles, segment: Segment, labels: Int[np.ndarray, " n"], count: int
) -> SegmentRecord:
    own = Clusters.from_labels(labels, count)
    return segment.record.with_files(write_arrays(files, own), members=len(own.members))


def _by_merging(memory: SearchedSnapshot, how: GreedyMerge, progress: Progress) -> Clusters:
    entries = memory.keyed_entries()
    values = np.full(memory.positions, NO_ENTRY)
    values[entries] = memory.values(entries)

    def neighbours(some: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b k"]:
        return memory.near_entries(some, how.neighbours + 1).ids

    rng = np.random.default_rng(_SEED)
    return greedy_merge(values, entries, neighbours, rng, progress).clusters()
