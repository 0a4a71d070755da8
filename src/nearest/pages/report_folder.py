"""The folder that a report goes to: new, or of an earlier report of the same kind."""

import os
from collections.abc import Mapping
from pathlib import Path

from nearest.errors import FolderError, require
from nearest.folder import disk_errors_explained, write_atomically

_BEGINNING = 1024  # bytes in which a file says what wrote it


def check_report_folder(out: Path, marks: Mapping[str, bytes], kind: str) -> None:
    """Refuse, before any work, a folder that a report cannot go to; nothing is made yet.

    Args:
        out: the folder.
        marks: the report's files, and what the beginning of each holds.
        kind: of report, for the message.

    Raises:
        NearestError: it cannot be made or written to, holds anything but an earlier report, or
            matplotlib is missing.
    """
    require("matplotlib", "plots")
    with disk_errors_explained(out):
        existing = next(folder for folder in (out, *out.absolute().parents) if _is_there(folder))
        if not existing.is_dir():
            raise FolderError(f"{existing} is not a folder: give --out another one")
        if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
            raise FolderError(f"{existing} cannot be written to: give --out another folder")
        items = sorted(out.iterdir()) if existing == out else []
        others = [item.name for item in items if not _is_ours(item, marks)]
    if others:
        raise FolderError(
            f"{out} holds {others[0]}, which is not of an earlier {kind}: give --out another folder"
        )


def write_report_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write a report's files, each whole, into a folder that passed the check."""
    with disk_errors_explained(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(out / name, data)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_ours(item: Path, marks: Mapping[str, bytes]) -> bool:
    if item.name in {f"{name}.partial" for name in marks}:  # of a report that was killed
        return True
    if item.name not in marks or item.is_symlink() or not item.is_file():
        return False
    with item.open("rb") as file:
        return marks[item.name] in file.read(_BEGINNING)
