"""A little of everything that `make torture` does at length (docs/reliability.md)."""

from pathlib import Path

import pytest

from damage import damage
from fuzz import fuzz
from kills import kills
from readers import readers

pytestmark = pytest.mark.slow


def test_killed_writers_leave_the_old_generation_or_the_new(tmp_path: Path) -> None:
    counts = kills(tmp_path, 0.01)
    assert counts["left_old"] + counts["left_new"] == counts["moments"] > 15


def test_damage_is_found_and_never_crashes(tmp_path: Path) -> None:
    figures = damage(tmp_path, 0.01)
    assert figures["cases"] == 4 * figures["files"] > 100


def test_made_up_bytes_are_read_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the fuzzer is for Linux")
    figures = fuzz(tmp_path, 0.002)
    assert figures["manifests"] >= 600
    assert figures["lines_kept_for_coverage"] > 1


def test_readers_see_whole_generations_beside_a_writer(tmp_path: Path) -> None:
    figures = readers(tmp_path, 0.01)
    assert figures["evaluations"] > 0
