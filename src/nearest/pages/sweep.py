"""A sweep's report: a page, a figure and a table in one folder."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from nearest.errors import FolderError, require
from nearest.folder import disk_errors_explained, write_atomically
from nearest.memory import Memory
from nearest.pages.published import Published
from nearest.pages.sweep_page import MARK, render
from nearest.verbs.sweep import Point, Sweep

# The beginning of each file that a sweep writes holds this.
_FILES = {
    "sweep.csv": b"method,setting,value,",
    "sweep.png": MARK.encode(),
    "sweep.html": MARK.encode(),
}


def check_folder(out: Path) -> None:
    """Refuse, before any work, a folder that a report cannot go to; nothing is made yet.

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
        others = [item.name for item in items if not _is_ours(item)]
    if others:
        raise FolderError(
            f"{out} holds {others[0]}, which is not of an earlier sweep: give --out another folder"
        )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_ours(item: Path) -> bool:
    if item.name in {f"{name}.partial" for name in _FILES}:  # of a sweep that was killed
        return True
    if item.name not in _FILES or item.is_symlink() or not item.is_file():
        return False
    with item.open("rb") as file:
        return _FILES[item.name] in file.read(1024)


def write_report(
    out: Path, swept: Sweep, memory: Memory, published: Sequence[Published] = ()
) -> None:
    """Write sweep.csv, sweep.png and sweep.html into a folder that passed `check_folder`."""
    from nearest.pages.sweep_plots import sweep_png

    files = {
        "sweep.csv": as_csv(swept.points).encode(),
        "sweep.png": sweep_png(swept.points, published, MARK),
        "sweep.html": render(swept, memory, published).encode(),
    }
    with disk_errors_explained(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(out / name, data)


def as_csv(points: Sequence[Point]) -> str:
    """A line a point under the names of `Point.to_dict`; empty where there is no value."""
    rows = [point.to_dict() for point in points]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
