"""The report of an analysis of overlap: a page, a figure and two tables in one folder."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearest.pages.overlap_page import MARK, render
from nearest.pages.report_folder import check_report_folder, write_report_folder
from nearest.retro.analysis.analyse import Analysis, Point

_FILES = {
    "chunks.csv": b"up_to,chunks,",
    "tokens.csv": b"from,to,tokens,",
    "overlap.png": MARK.encode(),
    "overlap.html": MARK.encode(),
}


def check_folder(out: Path) -> None:
    """Refuse, before any work, a folder that the report cannot go to.

    Raises:
        NearestError: as `check_report_folder`.
    """
    check_report_folder(out, _FILES, "analysis")


def write_report(out: Path, analysis: Analysis, model: str, text: str) -> None:
    """Write the report of a model on a text into a folder that passed `check_folder`."""
    from nearest.pages.overlap_plots import overlap_png

    files = {
        "chunks.csv": _csv([chunk_row(point) for point in analysis.by_share()]),
        "tokens.csv": _csv([token_row(point) for point in analysis.by_match()]),
        "overlap.png": overlap_png(analysis, MARK),
        "overlap.html": render(analysis, model, text).encode(),
    }
    write_report_folder(out, files)


def chunk_row(point: Point) -> dict[str, Any]:
    """A point of the curve over chunks, losses in bits a byte."""
    losses = {f"bpb_{name}": value for name, value in point.losses.items()}
    return {
        "up_to": point.high,
        "chunks": point.chunks,
        "tokens": point.tokens,
        **losses,
        **_gain(point),
    }


def token_row(point: Point) -> dict[str, Any]:
    """A group of tokens, losses in nats a token."""
    losses = {f"nll_{name}": value for name, value in point.losses.items()}
    return {
        "from": point.low,
        "to": point.high,
        "tokens": point.tokens,
        **losses,
        **_gain(point),
    }


def _gain(point: Point) -> dict[str, Any]:
    low, high = point.interval
    return {"gain": point.gain, "gain_low": low, "gain_high": high, "share_of_gain": point.share}


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
