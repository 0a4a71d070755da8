"""Give a memory another index, as a new snapshot."""

from functools import partial
from pathlib import Path

import msgspec

from nearest.build.segments import SegmentSpec, Write, write_each
from nearest.build.workers import reached, threads_of
from nearest.index.building import check_spec
from nearest.progress import Progress, no_progress
from nearest.store.change import changing
from nearest.store.manifest import SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.parts.index import IndexChoice, lead, write_beside, write_lead
from nearest.store.segment import Segment, no_keys


class IndexSpec(SegmentSpec, frozen=True, kw_only=True):
    """What a worker is told that makes indexes beside the largest segment's.

    Attributes:
        choice: of the memory's index.
        leads: the largest segment with its new index, which the others' are filled like.
    """

    choice: IndexChoice
    leads: SegmentRecord

    def writer(self, folder: Path) -> Write:
        """Writes the index of a segment."""
        return partial(_write, self.choice, self.leads, no_progress)


def rebuild_index(
    path: Path,
    choice: IndexChoice,
    progress: Progress = no_progress,
    workers: int | None = None,
    ray: str | None = None,
) -> None:
    """Give every segment another index; the others' are filled like the largest one's.

    With workers, as in `BuildOptions`, these make the others', a segment each.

    Raises:
        SettingError: the index does not fit the keys, or the memory has none.
        FolderError: the folder is no memory, or cannot be written.
    """
    spec = SegmentSpec(threads=threads_of(workers, ray))
    with reached(spec, ray), changing(path) as change:
        keys = change.manifest.keys
        if keys is None:
            raise no_keys(path)
        check_spec(choice.spec, keys.stored_dim, choice.nprobe)
        segments = list(change.segments)
        number = lead(segments)
        first = segments.pop(number)
        leads = write_lead(change.files(first.record.name), first, choice, progress)
        write = partial(_write, choice, leads, progress)
        told = IndexSpec(threads=spec.threads, choice=choice, leads=leads)
        made = write_each(change, segments, write, lambda _: told, workers, ray, progress)
        made.insert(number, leads)
        keys = msgspec.structs.replace(keys, index=choice.spec)
        change.publish(keys=keys, segments=made, keys_of=change.number)


def _write(
    choice: IndexChoice,
    leads: SegmentRecord,
    progress: Progress,
    files: NewFiles,
    segment: Segment,
) -> SegmentRecord:
    return write_beside(files, segment, choice, leads, progress)
