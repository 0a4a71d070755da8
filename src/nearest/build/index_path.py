"""The index of a segment as one of its access paths."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearest.build.new_segment import NewSegment
from nearest.index.tuning import measured_recall
from nearest.progress import Progress
from nearest.store.change import of_generation
from nearest.store.manifest import SegmentRecord
from nearest.store.parts.index import (
    INDEX,
    IndexChoice,
    fill_like,
    to_fill_like,
    write_index,
)
from nearest.store.segment import Segment

_SEED = 0
_RECALL_LOST = 0.1  # below what was measured at building; samples differ


def write(new: NewSegment, record: SegmentRecord) -> SegmentRecord:
    """Build it over the keys, among others like theirs; none where there are no keys."""
    plan = new.plan
    if plan.manifest.keys is None:
        return record
    segment = new.opened(record)
    file = plan.root / plan.folder / INDEX
    what = plan.root, file, segment.keys, segment.searched
    others = plan.manifest.segments if plan.among_others else []
    like = to_fill_like(others, plan.choice, segment.keys.dim, segment.searched_count)
    if like is None:
        index = write_index(*what, new.choice, plan.progress)
    else:
        indexes = [one.record.index for one in plan.merged]
        keep = any(index is not None and index.trained == like.trained for index in indexes)
        index = fill_like(*what, like, plan.progress, keep=keep)
    return record.with_files({}, index=index)


def index_segments(
    root: Path,
    generation: int,
    segments: Sequence[Segment],
    choice: IndexChoice,
    progress: Progress,
) -> list[SegmentRecord]:
    """Write the indexes of all segments anew: the largest one's, and those of others like it."""
    records = [segment.record for segment in segments]
    done: list[SegmentRecord] = []
    for number in sorted(range(len(segments)), key=lambda i: -segments[i].searched_count):
        segment, count = segments[number], segments[number].searched_count
        file = root / "segments" / segment.record.name / of_generation(generation, INDEX)
        what = root, file, segment.keys, segment.searched
        like = to_fill_like(done, replace(choice, nprobe=None), segment.keys.dim, count)
        if like is None:
            own = choice.among_others(segment.keys.dim, count) if done else choice
            index = write_index(*what, own, progress)
        else:
            index = fill_like(*what, like, progress, keep=False)
        records[number] = segment.record.with_files({}, index=index)
        done.append(records[number])
    return records


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
        segment.record.index.margin,
        np.random.default_rng(_SEED),
    )
    if found < expected - _RECALL_LOST:
        return [
            f"the index finds {found:.0%} of the nearest entries, {expected:.0%} when it was built"
        ]
    return []
