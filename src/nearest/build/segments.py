"""New files for the segments of a memory, made by this process or by workers beside it.

The writer holds the lock; workers open the snapshot that stands, and write aside, in a folder that
goes with the change. What is written depends on nothing but the segment and on what workers are
told, so that it does not matter who does it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch

from nearest.build.files import Files, beside_others, by_workers
from nearest.build.workers import Spec
from nearest.errors import FolderError
from nearest.folder import disk_errors_explained
from nearest.progress import Progress, no_progress
from nearest.store.change import Change
from nearest.store.journal import TASKS
from nearest.store.manifest import SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.opening import open_snapshot
from nearest.store.segment import Segment

_RECORD = "record.json"

Write = Callable[[NewFiles, Segment], SegmentRecord]
"""Writes new files of a segment, and describes it with them."""


class SegmentSpec(Spec, frozen=True, kw_only=True):
    """What a worker at the segments of a memory is told.

    Attributes:
        prefix: what the names of new files begin with.
        segments: that are to be given new files, by name.
        version: of the snapshot that is changed.
    """

    prefix: str = ""
    segments: tuple[str, ...] = ()
    version: int = 0

    def writer(self, folder: Path) -> Write:
        """What gives a segment new files, by what the writer has left in a folder for it."""
        raise NotImplementedError

    def work(self, folder: Path, token: str) -> None:
        """Give segments new files that nobody else is at, until all have some.

        Raises:
            NearestError: the memory is not what it was, or something cannot be written.
        """
        torch.set_num_threads(self.threads)
        root = folder.parent.parent
        memory = open_snapshot(root)
        if memory.manifest.version != self.version:
            raise FolderError(
                f"{root} as a worker opens it is another snapshot than the one that is changed: "
                "give all workers the same folder, and run again"
            )
        segments = {segment.record.name: segment for segment in memory.segments}
        write = self.writer(folder)

        def make(number: int, place: Path) -> None:
            name = self.segments[number]
            place.mkdir()
            scratch = place.relative_to(root).as_posix()
            files = NewFiles(root, f"segments/{name}", self.prefix, scratch)
            record = write(files, segments[name])
            (place / _RECORD).write_bytes(msgspec.json.encode(record))

        with disk_errors_explained(root):
            beside_others(self.watch(token))(_files(folder, self.segments), make)


def write_each(
    change: Change,
    segments: Sequence[Segment],
    write: Write,
    told: Callable[[Path], SegmentSpec],
    workers: int | None,
    ray: str | None,
    progress: Progress,
) -> list[SegmentRecord]:
    """Give some segments new files: by this process, or by workers, as `workers.crew_of` says.

    Args:
        change: of the memory, which is locked.
        segments: of its snapshot.
        write: how this process does it.
        told: what workers are told, by a folder in which files can be left for them.
        workers, ray: how many, and where.
        progress: told how many segments workers have done.

    Raises:
        NearestError: a worker's, or of a segment that ends its process.
    """
    if not segments or (workers is None and ray is None):
        return [write(change.files(segment.record.name), segment) for segment in segments]
    names = tuple(segment.record.name for segment in segments)
    these = {"segments": names, "prefix": change.files().prefix, "version": change.manifest.version}
    tasks = change.path / TASKS
    tasks.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="000000.change.", dir=tasks, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        spec = msgspec.structs.replace(told(folder), **these)
        files = _files(folder, names, progress)
        by_workers(folder, spec, workers, ray)(files, _nothing)
        return [_taken_over(change.path, path) for path in files.paths]


def _files(folder: Path, names: Sequence[str], progress: Progress = no_progress) -> Files:
    paths = [folder / name for name in names]
    return Files(paths, lambda number: f"segment {names[number]}", "segments", progress)


def _nothing(_number: int, _place: Path) -> None:
    """Workers make the files."""


def _taken_over(root: Path, made: Path) -> SegmentRecord:
    """Move a segment's new files to their place."""
    record = msgspec.json.decode((made / _RECORD).read_bytes(), type=SegmentRecord)
    for file in made.iterdir():
        if file.name != _RECORD:
            file.replace(root / "segments" / made.name / file.name)
    return record
