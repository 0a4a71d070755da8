"""Make one segment of all: without what was removed, and as quick to search as a new memory."""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nearest.errors import FolderError, SettingError
from nearest.index.approximate import check_spec
from nearest.index.choice import AUTO
from nearest.index.suffix import sort_suffixes
from nearest.memory.access_paths import merge_segments
from nearest.memory.generation import changing, free_segment_name
from nearest.memory.index_files import IndexChoice
from nearest.memory.manifest import Manifest, publish_next
from nearest.memory.memory import Memory
from nearest.memory.new_segment import SegmentPlan
from nearest.memory.segment import Segment
from nearest.progress import Progress, no_progress

_SAMPLE = 65_536  # tokens by which the time is estimated


@dataclass(frozen=True)
class CompactionPlan:
    """What compacting will do and take.

    Attributes:
        segments: that are there; one will be.
        removed: documents whose bytes will be erased.
        bytes_needed: on the disk, beside what is there, until the old files are gone; a larger
            index than there was comes on top.
        bytes_free: of the disk.
        seconds: estimated from sorting a sample, without building an index.
    """

    segments: int
    removed: int
    bytes_needed: int
    bytes_free: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def plan_compaction(path: Path) -> CompactionPlan:
    """Say what compacting a memory would take, and do nothing.

    Raises:
        FolderError: the folder is no memory.
    """
    memory = Memory.open(path)
    share = memory.tokens / memory.positions
    files = [file for record in memory.manifest.segments for file in record.files.values()]
    files += [f for r in memory.manifest.segments if r.index for f in r.index.file_records()]
    size = int(share * sum(file.size for file in files))
    sample = memory.segments[0].tokens[:_SAMPLE]
    started = time.perf_counter()
    sort_suffixes(sample, np.ones(len(sample), bool))
    seconds = (time.perf_counter() - started) * memory.tokens / len(sample)
    return CompactionPlan(
        len(memory.segments),
        sum(len(segment.removed) for segment in memory.segments),
        size,
        shutil.disk_usage(path).free,
        round(seconds, 1),
    )


def compact_memory(path: Path, progress: Progress = no_progress) -> bool:
    """Write one segment out of what is left of all; then the old ones' files are deleted.

    Readers that have the memory open go on with the old generation. What is copied is what was
    stored; suffix array and index are made anew.

    Returns:
        Whether there was anything to do.

    Raises:
        FolderError: the folder is no memory, cannot be written, or its disk has too little room.
    """
    needs = plan_compaction(path)
    if needs.segments == 1 and not needs.removed:
        return False
    if needs.bytes_needed > needs.bytes_free:
        raise FolderError(
            f"compacting {path} needs {needs.bytes_needed:,} bytes until the old files are gone, "
            f"and its disk has {needs.bytes_free:,} free: make room, then run again"
        )
    with changing(path) as manifest:
        memory = Memory.open(path)
        left = [segment for segment in memory.segments if segment.entry_count]
        name = free_segment_name(path, manifest)
        choice = _fitting_choice(manifest, left)
        plan = SegmentPlan(path, manifest, name, choice, progress, merged=left)
        publish_next(path, manifest, segments=[merge_segments(plan)])
    return True


def _fitting_choice(manifest: Manifest, segments: list[Segment]) -> IndexChoice:
    """The index that was asked for; auto where so few entries are left that it does not fit."""
    choice = IndexChoice.of(manifest)
    if manifest.keys is None:
        return choice
    entries = sum(segment.searched_count for segment in segments)
    try:
        check_spec(choice.spec, manifest.keys.stored_dim, choice.nprobe, entries)
    except SettingError:
        return replace(choice, spec=AUTO)
    return choice
