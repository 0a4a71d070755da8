"""Which files of a folder are read: not hidden ones, not this library's own, and each once."""

import json
import os
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from nearest.corpus.report import CorpusReport
from nearest.corpus.tables import dataset_files
from nearest.corpus.text_files import shown
from nearest.errors import CorpusError

_OWN = "of our own"
_LINKED_AGAIN = "linked to twice"
_BROKEN = "that lead nowhere"
_TEXTS = "documents.jsonl.zst"  # in each segment of a memory


class Entry(NamedTuple):
    """A file, and the parts of its path below the corpus."""

    path: Path
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The path below the corpus."""
        return shown("/".join(self.parts))


def files_of(
    root: Path,
    kind_of: Callable[[Path], str],
    excluded: Collection[str],
    own: Collection[Path],
    report: CorpusReport,
) -> list[Entry]:
    """The files below a folder that have a kind, sorted, those of a folder before its subfolders.

    Links are followed: a folder or file that is reached twice is read once, by its own path where
    it lies below `root`. What is left out is counted in the report.

    Args:
        root: the folder.
        kind_of: how a file is read; "" for one that is not.
        excluded: patterns of names, or of paths (below the root, or as they would be typed), that
            are left out.
        own: folders that are being written, resolved.
        report: told what is left out.

    Raises:
        CorpusError: a folder cannot be listed.
    """
    walk = _Walk(kind_of, excluded, own, report)
    walk.folder(Entry(root, ()))
    walk.follow_links()
    return sorted(walk.found, key=_files_first)


def _files_first(entry: Entry) -> tuple[tuple[bool, str], ...]:
    *folders, file = entry.parts
    return (*((True, part) for part in folders), (False, file))


class _Walk:
    """A walk through folders; links wait until all else has been seen."""

    def __init__(
        self,
        kind_of: Callable[[Path], str],
        excluded: Collection[str],
        own: Collection[Path],
        report: CorpusReport,
    ) -> None:
        self.found: list[Entry] = []
        self._kind_of = kind_of
        self._excluded = excluded
        self._own = own
        self._report = report
        self._folders: set[tuple[int, int]] = set()
        self._links: list[Entry] = []
        self._linked_files: list[Entry] = []

    def folder(self, root: Entry) -> None:
        """Find the files of a folder and of those below it."""
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                state = folder.path.stat()
                if (state.st_dev, state.st_ino) in self._folders:
                    self._report.skip(_LINKED_AGAIN, folder.name)
                    continue
                self._folders.add((state.st_dev, state.st_ino))
                if is_memory(folder.path) or (self._own and folder.path.resolve() in self._own):
                    self._report.skip(_OWN, folder.name)
                    continue
                with os.scandir(folder.path) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                raise CorpusError(
                    f"{shown(str(folder.path))} cannot be read ({error.strerror}): check it, or "
                    "leave it out (--exclude)"
                ) from error
            if all(_hidden(entry) for entry in listed):
                self._report.empty.add(folder.name)
            dataset = dataset_files(folder.path)
            if dataset is not None:
                files = [Entry(path, (*folder.parts, path.name)) for path in dataset]
                self.found += [file for file in files if self._pattern_of(file) is None]
            for entry in listed:
                self._take(entry, folder, waiting, dataset is not None)

    def _take(
        self, entry: os.DirEntry[str], folder: Entry, waiting: list[Entry], of_dataset: bool
    ) -> None:
        found = Entry(Path(entry.path), (*folder.parts, entry.name))
        pattern = self._pattern_of(found)
        if pattern is not None:
            self._report.skip("excluded", found.name)
            self._report.unmatched.discard(pattern)
            return
        linked = entry.is_symlink()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if of_dataset and not is_folder:
            return
        if _hidden(entry):
            self._report.skip("hidden", found.name)
        elif is_folder:
            (self._links if linked else waiting).append(found)
        elif linked and not is_file:
            self._report.skip(_BROKEN, found.name)
            self._report.unread.add(found.name)
            self._report.unread_rows = True
        elif not is_file:
            self._report.skip("neither file nor folder", found.name)
        elif not self._kind_of(found.path):
            self._report.skip(found.path.suffix.lower() or "without a suffix", found.name)
        else:
            (self._linked_files if linked else self.found).append(found)

    def _pattern_of(self, entry: Entry) -> str | None:
        """The pattern that leaves a file or folder out."""
        names = entry.parts[-1], entry.name, shown(str(entry.path))
        for pattern in self._excluded:
            if any(fnmatch(name, os.path.normpath(pattern)) for name in names):
                return pattern
        return None

    def follow_links(self) -> None:
        """Read what links lead to, unless it was read by its own path."""
        while self._links:
            link = self._links.pop(0)
            if memory_around(link.path.resolve()) is not None:
                self._report.skip(_OWN, link.name)
            else:
                self.folder(link)
        if not self._linked_files:
            return
        read = {_identity(entry.path) for entry in self.found}
        for entry in self._linked_files:
            if memory_around(entry.path.resolve()) is not None:
                self._report.skip(_OWN, entry.name)
            elif _identity(entry.path) in read:
                self._report.skip(_LINKED_AGAIN, entry.name)
            else:
                read.add(_identity(entry.path))
                self.found.append(entry)


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith((".", "~$"))  # what Office keeps while a file is open


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def memory_around(path: Path) -> Path | None:
    """The memory that a path is, or lies in; None where there is none."""
    return next((folder for folder in (path, *path.parents) if is_memory(folder)), None)


def is_memory(folder: Path) -> bool:
    """Whether a folder is a memory, finished or not, damaged or not."""
    try:
        if next((folder / "segments").glob(f"*/{_TEXTS}"), None) is not None:
            return True  # written before the manifest
        if (folder / _TEXTS).is_file() and (folder / "offsets.npy").is_file():
            return True  # a segment of one, copied
        written = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(written, dict) and str(written.get("created_by")).startswith("nearest ")
