"""The clusters of a segment as one of its access paths."""

import numpy as np
from jaxtyping import Int

from nearest.build.new_segment import NewSegment
from nearest.index.clusters import NO_CLUSTER, Clusters, assigned_clusters
from nearest.store.manifest import ClustersRecord, SegmentRecord
from nearest.store.parts.clusters import write_clusters
from nearest.store.segment import Segment, valued_entries

_MEMBERS_A_MEAN = 8  # of each segment


def write(new: NewSegment, record: SegmentRecord) -> SegmentRecord:
    """Take over those of merged segments; of new text, the nearest cluster of k-means.

    Clusters of a greedy merge hold entries of one value: new entries are in none.
    """
    clusters = new.plan.manifest.clusters
    if clusters is None:
        return record
    if new.plan.merged:
        labels = np.concatenate([segment.labels[~segment.gone] for segment in new.plan.merged])
    else:
        labels = np.full(record.tokens, NO_CLUSTER, np.int32)
        if clusters.made_by == "k-means":
            entries = valued_entries(new.offsets)
            labels[entries] = _nearest_clusters(new, record, clusters, entries)
    found = Clusters.from_labels(labels, clusters.clusters)
    files = write_clusters(new.plan.root, new.plan.folder, "", found)
    return record.with_files(files, members=len(found.members))


def _nearest_clusters(
    new: NewSegment,
    record: SegmentRecord,
    clusters: ClustersRecord,
    entries: Int[np.ndarray, " entries"],
) -> Int[np.ndarray, " entries"]:
    """The cluster of each new entry whose mean is nearest, as far as a few members tell it.

    Centroids are not stored: they would take as much room as the keys of so many entries, and
    tell of those that are removed later.
    """
    keys = new.opened(record).keys
    sums = np.zeros((clusters.clusters, keys.dim), np.float32)
    counts = np.zeros(clusters.clusters, np.int64)
    for stored in new.plan.manifest.segments:
        segment = Segment(new.plan.root, new.plan.manifest, stored)
        if segment.clusters is None:
            continue
        for some, members in segment.clusters.samples(_MEMBERS_A_MEAN):
            if segment.rows is not None:  # some have lost the key that they shared
                keyed = segment.rows[members] >= 0
                some, members = some[keyed], members[keyed]
            sums[some] += segment.keys.rows(members)
            counts[some] += 1
    filled = np.flatnonzero(counts)
    if not len(filled):
        return np.full(len(entries), NO_CLUSTER)
    means = sums[filled] / counts[filled, None]
    labels: np.ndarray = filled[assigned_clusters(keys, entries, means, new.plan.progress)]
    return labels


def reachable(segment: Segment) -> Int[np.ndarray, "_"]:
    """The members of all clusters."""
    return np.flatnonzero(segment.labels != NO_CLUSTER)


def problems(segment: Segment) -> list[str]:
    """Whether labels and members agree."""
    if segment.stored_clusters is None:
        return []
    return segment.stored_clusters.problems(segment.stored_entries)
