"""Make few segments of all: without what was removed, and as quick to search as a new memory."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from nearest.build.costs import hashing, indexing, sorting
from nearest.errors import FolderError, SettingError
from nearest.index.building import check_spec
from nearest.index.choice import AUTO
from nearest.progress import Progress, no_progress
from nearest.store.change import Change, changing
from nearest.store.manifest import Manifest, SegmentRecord
from nearest.store.new_segment import SegmentPlan, merge_segments, tokens_a_segment
from nearest.store.opening import open_snapshot
from nearest.store.parts.index import IndexChoice
from nearest.store.segment import Segment
from nearest.store.snapshot import Snapshot

_SAMPLE = 65_536  # tokens by which the time is estimated


@dataclass(frozen=True)
class CompactionPlan:
    """What compacting will do and take.

    Attributes:
        segments: that are there.
        segments_after: that will be; one, or as many as a build would about make.
        removed: documents whose bytes will be erased.
        bytes_needed: on the disk, beside what is there, until the old files are gone; a larger
            index than there was comes on top.
        bytes_free: of the disk.
        seconds: estimated from sorting a sample, building a small index and checksums.
    """

    segments: int
    segments_after: int
    removed: int
    bytes_needed: int
    bytes_free: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def plan_compaction(path: Path) -> CompactionPlan:
    """Say what compacting a memory would take, and do nothing.

    Raises:
        FolderError: the folder is no memory.
    """
    memory = open_snapshot(path)
    keys, groups = memory.manifest.keys, _groups(memory)
    size, sizes = _bytes_needed(groups), [sum(map(_tokens_left, group)) for group in groups]
    tokens = sum(count for count, group in zip(sizes, groups, strict=True) if _to_do(group))
    largest, seconds = max(sizes, default=0), hashing() * size
    if tokens:
        seconds += sorting(memory.segments[0].tokens[:_SAMPLE], largest) * tokens / largest
        if keys is not None:
            recall = IndexChoice.of(memory.manifest).recall
            cost = indexing(largest, keys.stored_dim, keys.index, recall)
            seconds += cost.seconds * tokens / largest
    return CompactionPlan(
        len(memory.segments),
        len(groups),
        sum(len(segment.removed) for segment in memory.segments),
        size,
        shutil.disk_usage(path).free,
        round(seconds, 1),
    )


def compact_memory(path: Path, progress: Progress = no_progress) -> bool:
    """Write anew what is left, in segments no larger than a build's; then delete the old files.

    Readers that have the memory open go on with the old snapshot. What is copied is what was
    stored; suffix arrays and indexes are made anew. A segment that has lost nothing and has no room
    for a neighbour stays as it is.

    Returns:
        Whether there was anything to do.

    Raises:
        FolderError: the folder is no memory, cannot be written, or its disk has too little room.
    """
    memory = open_snapshot(path)
    groups = _groups(memory)
    if len(groups) == len(memory.segments) and not any(map(_to_do, groups)):
        return False
    needed, free = _bytes_needed(groups), shutil.disk_usage(path).free
    if needed > free:
        raise FolderError(
            f"compacting {path} needs {needed:,} bytes until the old files are gone, "
            f"and its disk has {free:,} free: make room, then run again"
        )
    with changing(path) as change:
        groups = _groups(change.snapshot)
        change.publish(segments=_written(change, groups, progress))
    return True


def _groups(memory: Snapshot) -> list[list[Segment]]:
    """Runs of segments of which each is to be one, as long as it is none larger than a build's."""
    largest, groups, tokens = tokens_a_segment(memory.manifest), list[list[Segment]](), 0
    for segment in memory.segments:
        if not segment.entry_count:
            continue
        own = _tokens_left(segment)
        if groups and tokens + own <= largest:
            groups[-1].append(segment)
            tokens += own
        else:
            groups.append([segment])
            tokens = own
    return groups


def _to_do(group: Sequence[Segment]) -> bool:
    """Whether a run has more than one segment, or one that something was removed from."""
    return len(group) > 1 or len(group[0].removed) > 0


def _bytes_needed(groups: Sequence[Sequence[Segment]]) -> int:
    """On the disk, for what is left of segments that are written anew."""
    size = 0
    for segment in itertools.chain(*filter(_to_do, groups)):
        record = segment.record
        files = [*record.files.values(), *(record.index.file_records() if record.index else ())]
        size += sum(file.size for file in files) * _tokens_left(segment) // record.tokens
    return size


def _written(
    change: Change, groups: Sequence[Sequence[Segment]], progress: Progress
) -> list[SegmentRecord]:
    """Each run as one segment, the largest first: the others' indexes are filled like its index.

    Where segments stay as they are, all are filled like theirs.
    """
    manifest = change.manifest
    choice, sizes = IndexChoice.of(manifest), [sum(map(_tokens_left, group)) for group in groups]
    records = [None if _to_do(group) else group[0].record for group in groups]
    known = list(manifest.segments) if any(records) else []
    for number in sorted(range(len(groups)), key=lambda i: -sizes[i]):
        if records[number] is not None:
            continue
        # Opened anew, so that what they find out about themselves goes with them.
        merged = [Segment(change.path, manifest, segment.record) for segment in groups[number]]
        name, files = change.new_segment()
        plan = SegmentPlan(
            files,
            name,
            msgspec.structs.replace(manifest, segments=known),
            choice if known else _fitting_choice(manifest, choice, merged),
            progress,
            merged=merged,
            among_others=bool(known),
        )
        record = merge_segments(plan)
        known.append(record)
        records[number] = record
    return [record for record in records if record is not None]


def _tokens_left(segment: Segment) -> int:
    return segment.entry_count + segment.record.documents - len(segment.removed)


def _fitting_choice(
    manifest: Manifest, choice: IndexChoice, segments: Sequence[Segment]
) -> IndexChoice:
    """The index that was asked for; auto where so few entries are left that it does not fit."""
    if manifest.keys is None:
        return choice
    entries = sum(segment.searched_count for segment in segments)
    try:
        check_spec(choice.spec, manifest.keys.stored_dim, choice.nprobe, entries)
    except SettingError:
        return replace(choice, spec=AUTO)
    return choice
