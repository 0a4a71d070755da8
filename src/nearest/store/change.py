"""How a snapshot replaces another: locks, new files, one rename, and what interruptions leave.

New files are written beside the live ones; the manifest's rename publishes them. Until then a kill
leaves the old snapshot, and on any error the files begun are taken away.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nearest.errors import FolderError
from nearest.folder import disk_errors_explained, refuse_address, writer_lock
from nearest.store.journal import JOURNAL, MACHINE, TASKS, Task
from nearest.store.manifest import (
    MANIFEST,
    Manifest,
    SegmentRecord,
    in_cache,
    read_manifest,
    write_manifest,
)
from nearest.store.new_files import NewFiles, make_names_durable, segment_files
from nearest.store.opening import open_snapshot
from nearest.store.parts import GATE_SUFFIX, SEGMENT_FILES, SHARED_FILES
from nearest.store.segment import Segment
from nearest.store.snapshot import Snapshot

_PARTIAL = (f"{MANIFEST}.partial", f"{JOURNAL}.partial")
_SEGMENT = re.compile(r"\d{6}")
_MACHINE = re.compile(rf"{re.escape(MACHINE)}(\.[0-9a-f]{{8}}\.partial)?")  # `write_once`
_LATER = r"g\d{6}\."  # what a change puts before the names of its files


def _names(files: Iterable[str]) -> str:
    return "(" + "|".join(map(re.escape, sorted(files))) + ")"


_IN_SEGMENT = re.compile(f"({_LATER})?{_names(SEGMENT_FILES)}")
_IN_MEMORY = re.compile(
    f"{_LATER}({_names(SHARED_FILES)}|[a-z+-]+{re.escape(GATE_SUFFIX)}(\\.partial)?)"
)


@dataclass(frozen=True)
class Change:
    """The next snapshot of a memory, while it is made.

    Attributes:
        snapshot: the one that stands, open.
    """

    snapshot: Snapshot

    @property
    def path(self) -> Path:
        """The memory folder."""
        return self.snapshot.path

    @property
    def manifest(self) -> Manifest:
        """Of the current snapshot."""
        return self.snapshot.manifest

    @property
    def segments(self) -> list[Segment]:
        """Of the current snapshot."""
        return self.snapshot.segments

    @property
    def number(self) -> int:
        """The number of the next snapshot."""
        return self.manifest.version + 1

    def files(self, segment: str | None = None) -> NewFiles:
        """Where new files of a segment go; without its name, those that all segments share."""
        folder = "" if segment is None else f"segments/{segment}"
        return NewFiles(self.path, folder, f"g{self.number:06d}.")

    def new_segment(self, records: Sequence[SegmentRecord] = ()) -> tuple[str, NewFiles]:
        """A name for a new segment, after those there are and `records`, and where it goes."""
        number = max(int(record.name) for record in [*self.manifest.segments, *records]) + 1
        while os.path.lexists(self.path / "segments" / f"{number:06d}"):
            number += 1  # what others have put there is passed over
        return f"{number:06d}", segment_files(self.path, f"{number:06d}")

    def publish(self, **fields: Any) -> None:
        """Make the snapshot that differs in some fields of the manifest the one that stands."""
        manifest = msgspec.structs.replace(self.manifest, version=self.number, **fields)
        known = {record.path for record in self.manifest.file_records()}
        new = [record for record in manifest.file_records() if record.path not in known]
        make_names_durable(self.path, new)
        write_manifest(self.path, manifest)


def check_new(path: Path) -> None:
    """Refuse a path at which no memory can be begun: an address, a file, a memory, a folder in use.

    Raises:
        FolderError: it is one of these.
    """
    refuse_address(path)
    try:
        if path.is_file():
            raise FolderError(f"{path} is a file: give the memory another path")
        if (path / MANIFEST).exists():
            raise FolderError(f"{path} is already a memory: give another path, or delete it first")
        unknown = sorted(
            item.relative_to(path).as_posix()
            for item in path.rglob("*")
            if not _is_leftover(path, item)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_folder(path, error) from error
    if unknown:
        raise FolderError(
            f"{path} is not empty (it holds {unknown[0]!r}): give the memory its own folder"
        )


def _no_folder(path: Path, error: Exception) -> FolderError:
    reason = getattr(error, "strerror", None) or error
    return FolderError(f"{path} cannot be a folder ({reason}): give the memory another path")


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Lock a folder for a first snapshot; on any error, take away what was begun.

    What a journal tells of stays, so that the build can be gone on with.
    """
    check_new(path)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with disk_errors_explained(path):
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _no_folder(path, error) from error
    with writer_lock(path):
        check_new(path)  # now that no other writer can begin one
        try:
            with disk_errors_explained(path):
                if not (path / JOURNAL).exists():  # else an interrupted build can go on
                    _remove_begun(path)
                for name in _PARTIAL:
                    (path / name).unlink(missing_ok=True)
                yield
        except BaseException:
            published = (path / MANIFEST).exists()  # and is whole
            if not published and not (path / JOURNAL).exists():
                _remove_begun(path)
                with suppress(OSError):  # what others have put there stays
                    for folder in created:
                        folder.rmdir()
            raise


def _remove_begun(path: Path) -> None:
    for folder in ("segments", TASKS):
        shutil.rmtree(path / folder, ignore_errors=True)


def _is_leftover(path: Path, item: Path) -> bool:
    """Whether an interrupted build may have left this; nothing else is ever taken away."""
    place = item.relative_to(path).as_posix()
    if place in (JOURNAL, *_PARTIAL):
        return item.is_file()
    if item.is_symlink():
        return False
    parts = place.split("/")
    if parts[0] == TASKS:  # notes of tasks, and files that are not whole yet
        return (
            len(parts) < 2
            or _MACHINE.fullmatch(parts[1]) is not None
            or Task.named(parts[1]) is not None
        )
    if parts[0] != "segments" or (len(parts) > 1 and not _SEGMENT.fullmatch(parts[1])):
        return False
    return item.is_dir() if len(parts) < 3 else len(parts) == 3 and parts[2] in SEGMENT_FILES


@contextmanager
def changing(path: Path) -> Iterator[Change]:
    """Lock a memory for its next snapshot; before and after, delete files that no manifest names.

    Raises:
        FolderError: the folder is no memory, cannot be written, or another process writes it.
    """
    read_manifest(path)  # what is no memory is told apart from what is locked
    if in_cache(path):
        raise FolderError(
            f"{path} is in a cache, which is not to be changed: copy the memory first "
            f"(cp -rL {path} my.memory)"
        )
    with writer_lock(path), disk_errors_explained(path):
        try:
            _remove_unnamed_files(path, read_manifest(path))
            yield Change(open_snapshot(path))
        finally:
            _remove_unnamed_files(path, read_manifest(path))


def _remove_unnamed_files(path: Path, manifest: Manifest) -> None:
    """Delete what interrupted writers and earlier snapshots left; readers hold theirs open."""
    named = {path / record.path for record in manifest.file_records()}
    if all(_is_leftover(path, item) for item in (path / TASKS).rglob("*")):
        shutil.rmtree(path / TASKS, ignore_errors=True)
    found = [file for file in path.iterdir() if _IN_MEMORY.fullmatch(file.name)]
    found += [path / name for name in (JOURNAL, *_PARTIAL)]
    folders = []
    for segment in (path / "segments").iterdir():
        if segment.is_symlink() or not segment.is_dir():
            continue
        folders.append(segment)
        found += [file for file in segment.iterdir() if _IN_SEGMENT.fullmatch(file.name)]
    for file in found:
        if file not in named and (file.is_symlink() or file.is_file()):
            file.unlink()
    for folder in folders:
        if _SEGMENT.fullmatch(folder.name):
            with suppress(OSError):  # what others have put there stays, and so does what is named
                folder.rmdir()
