"""The clusters of a segment: which of its entries share a state."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from nearest.folder import open_array
from nearest.index.clusters import NO_CLUSTER, Clusters, assigned_clusters
from nearest.index.ids import position_dtype
from nearest.store.manifest import (
    ClustersRecord,
    Manifest,
    SegmentRecord,
)
from nearest.store.new_files import NewFiles
from nearest.store.parts.corpus import Paths, valued_entries
from nearest.store.records import FileRecord

if TYPE_CHECKING:
    from nearest.store.new_segment import NewSegment
    from nearest.store.segment import Segment

_ARRAYS = {"of": "labels", "offsets": "offsets", "members": "members"}  # and fields of `Clusters`
LAYOUT = {f"cluster_{name}": f"clusters.{name}.npy" for name in _ARRAYS}
_MEMBERS_PER_MEAN = 8  # of each segment


def open_clusters(paths: Paths, manifest: Manifest, record: SegmentRecord) -> Clusters | None:
    """Map the arrays (KeyError or FolderError where one is missing or not as recorded)."""
    if manifest.clusters is None or record.members is None:
        return None
    shapes: dict[str, tuple[np.dtype[Any], tuple[int]]] = {
        "of": (np.dtype(np.int32), (record.tokens,)),
        "offsets": (np.dtype(np.int64), (manifest.clusters.clusters + 1,)),
        "members": (position_dtype(record.tokens), (record.members,)),
    }
    return Clusters(
        **{
            field: open_array(paths[f"cluster_{name}"], *shapes[name])
            for name, field in _ARRAYS.items()
        }
    )


def write_arrays(files: NewFiles, found: Clusters) -> dict[str, FileRecord]:
    """Write the arrays of a segment's clusters, and describe the files."""
    return {
        kind: files.write(name, getattr(found, _ARRAYS[kind.removeprefix("cluster_")]))
        for kind, name in LAYOUT.items()
    }


def write(new: "NewSegment", record: SegmentRecord) -> SegmentRecord:
    """Keep the clusters of merged segments; assign new entries to the nearest k-means cluster.

    Clusters of a greedy merge hold entries of one value: new entries join none.
    """
    clusters = new.plan.manifest.clusters
    if clusters is None:
        return record
    if new.plan.merged:
        labels = np.concatenate([segment.labels[segment.alive] for segment in new.plan.merged])
    else:
        labels = np.full(record.tokens, NO_CLUSTER, np.int32)
        if clusters.made_by == "k-means":
            entries = valued_entries(new.offsets)
            labels[entries] = _nearest_clusters(new, record, clusters, entries)
    found = Clusters.from_labels(labels, clusters.clusters)
    return record.with_files(write_arrays(new.files, found), members=len(found.members))


def _nearest_clusters(
    new: "NewSegment",
    record: SegmentRecord,
    clusters: ClustersRecord,
    entries: Int[np.ndarray, " entries"],
) -> Int[np.ndarray, " entries"]:
    """The cluster of each new entry whose mean, estimated from a few members, is nearest.

    Centroids are not stored: they would take as much room as the keys of as many entries, and
    would still describe documents that are removed later.
    """
    keys = new.opened(record).keys
    sums = np.zeros((clusters.clusters, keys.dim), np.float32)
    counts = np.zeros(clusters.clusters, np.int64)
    for segment in new.others():
        if segment.clusters is None:
            continue
        for some, members in segment.clusters.samples(_MEMBERS_PER_MEAN):
            if segment.merged is not None:  # some have lost the key that they shared
                keyed = segment.merged.rows[members] >= 0
                some, members = some[keyed], members[keyed]
            sums[some] += segment.keys.rows(members)
            counts[some] += 1
    filled = np.flatnonzero(counts)
    if not len(filled):
        return np.full(len(entries), NO_CLUSTER)
    means = sums[filled] / counts[filled, None]
    labels: np.ndarray = filled[assigned_clusters(keys, entries, means, new.plan.progress)]
    return labels


def served(segment: "Segment") -> Int[np.ndarray, " _"]:
    """The members of all clusters."""
    return np.empty(0, np.int64) if segment.clusters is None else segment.clusters.members


def check(segment: "Segment") -> list[str]:
    """Whether labels and members agree."""
    if segment.stored_clusters is None:
        return []
    return segment.stored_clusters.problems(valued_entries(segment.offsets))
