"""How a generation is begun and published: locks, and what interrupted writers have left.

New files are written beside the live ones; the manifest's rename publishes them. Until then a kill
leaves the old generation, and on any error the files begun are taken away.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nearest.errors import FolderError
from nearest.folder import disk_errors_explained, writer_lock
from nearest.store.journal import JOURNAL
from nearest.store.manifest import MANIFEST, Manifest, read_manifest

# What writers call their files: of a new segment, and in a segment or the memory's folder later.
_BUILT = {
    "tokens.npy",
    "offsets.npy",
    "documents.jsonl.zst",
    "frames.npy",
    "ids.npy",
    "sources.npy",
    "sources.offsets.npy",
    "suffix.npy",
    "keys.npy",
    "scales.npy",
    "rows.npy",
    "weights.npy",
    "index.faiss",
    "trained.faiss",
    "clusters.of.npy",
    "clusters.offsets.npy",
    "clusters.members.npy",
}
_PARTIAL = (f"{MANIFEST}.partial", f"{JOURNAL}.partial")
_SEGMENT = re.compile(r"\d{6}")
_LATER_IN_SEGMENT = re.compile(
    r"g\d{6}\.((index|trained)\.faiss"
    r"|(keys|scales|rows|weights|removed|clusters\.(of|offsets|members))\.npy)"
)
_LATER_IN_MEMORY = re.compile(
    r"g\d{6}\.((projection|codebooks)\.npy"
    r"|[a-z+-]+\.gate\.safetensors(\.partial)?)"
)


def of_generation(generation: int, name: str) -> str:
    """The name of a file that a later generation writes."""
    return f"g{generation:06d}.{name}"


def free_segment_name(path: Path, manifest: Manifest) -> str:
    """A name for a new segment, after all that live; what others have put there is passed over."""
    number = max(int(segment.name) for segment in manifest.segments) + 1
    while os.path.lexists(path / "segments" / f"{number:06d}"):
        number += 1
    return f"{number:06d}"


def check_new(path: Path) -> None:
    """Refuse a path at which no memory can be begun: a file, a memory, or a folder in use.

    Raises:
        FolderError: it is one of these.
    """
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
    """Lock a folder for a first generation; on any error, take away what was begun.

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
                    shutil.rmtree(path / "segments", ignore_errors=True)
                for name in _PARTIAL:
                    (path / name).unlink(missing_ok=True)
                yield
        except BaseException:
            published = (path / MANIFEST).exists()  # and is whole
            if not published and not (path / JOURNAL).exists():
                shutil.rmtree(path / "segments", ignore_errors=True)
                with suppress(OSError):  # what others have put there stays
                    for folder in created:
                        folder.rmdir()
            raise


def _is_leftover(path: Path, item: Path) -> bool:
    """Whether an interrupted build may have left this; nothing else is ever taken away."""
    place = item.relative_to(path).as_posix()
    if place in (JOURNAL, *_PARTIAL):
        return item.is_file()
    if item.is_symlink():
        return False
    parts = place.split("/")
    if parts[0] != "segments" or (len(parts) > 1 and not _SEGMENT.fullmatch(parts[1])):
        return False
    return item.is_dir() if len(parts) < 3 else len(parts) == 3 and parts[2] in _BUILT


@contextmanager
def changing(path: Path) -> Iterator[Manifest]:
    """Lock a memory for its next generation; before and after, remove files no manifest names."""
    read_manifest(path)  # what is no memory is told apart from what is locked
    with writer_lock(path), disk_errors_explained(path):
        manifest = read_manifest(path)
        try:
            _remove_unnamed_files(path, manifest)
            yield manifest
        finally:
            _remove_unnamed_files(path, read_manifest(path))


def _remove_unnamed_files(path: Path, manifest: Manifest) -> None:
    """Clear what interrupted writers and earlier generations left; readers hold theirs open."""
    named = {path / record.path for record in manifest.file_records()}
    found = [file for file in path.iterdir() if _LATER_IN_MEMORY.fullmatch(file.name)]
    found += [path / name for name in (JOURNAL, *_PARTIAL)]
    folders = []
    for segment in (path / "segments").iterdir():
        if segment.is_symlink() or not segment.is_dir():
            continue
        folders.append(segment)
        for file in segment.iterdir():
            if file.name in _BUILT or _LATER_IN_SEGMENT.fullmatch(file.name):
                found.append(file)
    for file in found:
        if file not in named and (file.is_symlink() or file.is_file()):
            file.unlink()
    for folder in folders:
        if _SEGMENT.fullmatch(folder.name):
            with suppress(OSError):  # what others have put there stays, and so does what is named
                folder.rmdir()
