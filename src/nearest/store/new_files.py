"""Where a writer puts new files: beside the live ones, never over them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from nearest.folder import ArrayFile, fsync_file
from nearest.store.records import FileRecord


@dataclass(frozen=True)
class NewFiles:
    """Names for the files of a segment, or of the memory, that are to be written.

    Attributes:
        root: the memory folder.
        folder: below it, such as "segments/000001"; "" for files that all segments share.
        prefix: what their names begin with, such as "g000002." of the second snapshot.
        scratch: the folder in which they are written first, until `settle`; "": at once in place.
    """

    root: Path
    folder: str = ""
    prefix: str = ""
    scratch: str = ""

    def path(self, name: str) -> Path:
        """Where a file of this name is written."""
        return self.root / (self.scratch or self.folder) / (self.prefix + name)

    def record(self, name: str) -> FileRecord:
        """Describe a file that is completely written, by the place that it is to have."""
        place = Path(self.folder) / (self.prefix + name)
        return FileRecord.of(self.root, place.as_posix(), self.path(name))

    def settle(self, names: Iterable[str]) -> None:
        """Move files from the scratch folder to their place, each in one rename."""
        for name in names:
            self.path(name).replace(self.root / self.folder / (self.prefix + name))

    def write(self, name: str, array: np.ndarray) -> FileRecord:
        """Write an array, and describe its file."""
        return self.write_blocks(name, len(array), [array])

    def write_blocks(self, name: str, rows: int, blocks: Iterable[np.ndarray]) -> FileRecord:
        """As `write`, of an array of so many rows that comes in blocks, at least one."""
        left = iter(blocks)
        first, done = next(left), 0
        with ArrayFile(self.path(name), first.dtype, first.shape[1:], rows=rows) as file:
            for block in chain([first], left):
                file.write(done, block)
                done += len(block)
        return self.record(name)


def segment_files(path: Path, name: str) -> NewFiles:
    """Where the files of a new segment go."""
    return NewFiles(path, f"segments/{name}")


def make_names_durable(folder: Path, files: Iterable[FileRecord]) -> None:
    """Let files stand under their names below a memory's folder, whatever happens to the machine.

    The names in the folder itself become durable with the manifest's.
    """
    folders = {parent for file in files for parent in Path(file.path).parents}
    for place in sorted(folders - {Path()}):
        fsync_file(folder / place)
