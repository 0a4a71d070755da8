"""The clusters of a segment as one of its access paths."""

import numpy as np
from jaxtyping import Int

from nearest.index.clusters import NO_CLUSTER, Clusters, assigned_clusters
from nearest.memory.cluster_files import open_centroids, write_clusters
from nearest.memory.manifest import SegmentRecord
from nearest.memory.new_segment import NewSegment
from nearest.memory.segment import Segment


def write(new: NewSegment, record: SegmentRecord) -> SegmentRecord:
    """Take over those of merged segments; of new text, by the centroids of k-means.

    Clusters of a greedy merge have no centroids: new entries are then in none.
    """
    clusters = new.plan.manifest.clusters
    if clusters is None:
        return record
    if new.plan.merged:
        labels = np.concatenate([segment.labels[~segment.gone] for segment in new.plan.merged])
    else:
        labels = np.full(record.tokens, NO_CLUSTER, np.int32)
        centroids = open_centroids(new.plan.root, new.plan.manifest)
        if centroids is not None:
            keys = new.opened(record).keys
            labels[new.entries] = assigned_clusters(keys, new.entries, centroids, new.plan.progress)
    found = Clusters.from_labels(labels, clusters.clusters)
    files = write_clusters(new.plan.root, new.plan.folder, "", found)
    return record.with_files(files, members=len(found.members))


def reachable(segment: Segment) -> Int[np.ndarray, "_"]:
    """The members of all clusters."""
    return np.flatnonzero(segment.labels != NO_CLUSTER)


def problems(segment: Segment) -> list[str]:
    """Whether labels and members agree."""
    if segment.stored_clusters is None:
        return []
    return segment.stored_clusters.problems(segment.stored_entries)
