"""The index of a segment as one of its access paths."""

import numpy as np
from jaxtyping import Int

from nearest.index.approximate import measured_recall
from nearest.memory.index_files import write_index
from nearest.memory.manifest import SegmentRecord
from nearest.memory.new_segment import NewSegment
from nearest.memory.segment import Segment

_SEED = 0
_RECALL_LOST = 0.1  # below what was measured at building; samples differ


def write(new: NewSegment, record: SegmentRecord) -> SegmentRecord:
    """Build it over the keys; none where there are no keys."""
    if new.plan.manifest.keys is None:
        return record
    segment = new.opened(record)
    file = new.plan.root / new.plan.folder / "index.faiss"
    index = write_index(
        new.plan.root, file, segment.keys, segment.searched, new.choice, new.plan.progress
    )
    return record.with_files({}, index=index)


def reachable(segment: Segment) -> Int[np.ndarray, "_"]:
    """What a search for everything finds."""
    if segment.record.index is None or not segment.searched_count:
        return np.empty(0, np.int64)
    query = segment.keys.rows(segment.searched[:1])
    ids = segment.search_by_index(query, segment.searched_count).ids
    return ids[ids >= 0]


def problems(segment: Segment) -> list[str]:
    """Whether it can be read, holds what it should, and still finds what it did when built."""
    if segment.record.index is None:
        return []
    index = segment.index  # a FolderError when it cannot be read, or holds something else
    expected = segment.record.index.recall
    if segment.record.index.file is None or expected is None:
        return []
    found = measured_recall(
        index,
        segment.keys,
        segment.searched,
        segment.exact_index(),
        segment.record.index.candidates,
        np.random.default_rng(_SEED),
    )
    if found < expected - _RECALL_LOST:
        return [
            f"the index finds {found:.0%} of the nearest entries, {expected:.0%} when it was built"
        ]
    return []
