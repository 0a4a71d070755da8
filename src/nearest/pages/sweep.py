"""A sweep's report: a page, a figure and a table in one folder."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from nearest.memory import Memory
from nearest.pages.published import Published
from nearest.pages.report_folder import check_report_folder, write_report_folder
from nearest.pages.sweep_page import MARK, render
from nearest.verbs.sweep import Point, Sweep

# The beginning of each file that a sweep writes holds this.
_FILES = {
    "sweep.csv": b"method,setting,value,",
    "sweep.png": MARK.encode(),
    "sweep.html": MARK.encode(),
}


def check_folder(out: Path) -> None:
    """Refuse, before any work, a folder that a sweep's report cannot go to.

    Raises:
        NearestError: as `check_report_folder`.
    """
    check_report_folder(out, _FILES, "sweep")


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
    write_report_folder(out, files)


def as_csv(points: Sequence[Point]) -> str:
    """A line a point under the names of `Point.to_dict`; empty where there is no value."""
    rows = [point.to_dict() for point in points]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
