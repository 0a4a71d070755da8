"""A disk that fails at every operation that writes, with each error."""

import shutil
from pathlib import Path
from typing import Any

from faults import ERRORS, disk
from memories import CHANGES, answers, furnish
from nearest.errors import FolderError
from nearest.store.verify import verify


def faults(folder: Path, share: float) -> dict[str, Any]:
    """A clear error and a whole generation, each time."""
    started = folder / "started"
    furnish(started)
    old = answers(started)
    figures: dict[str, Any] = {"sites": 0, "cases": 0, "published": 0}
    step = max(1, int(0.2 / share))
    for name, change in CHANGES.items():
        whole = Path(shutil.copytree(started, folder / name))
        with disk() as counted:
            change(whole)
        new = answers(whole)
        figures["sites"] += len(counted.operations)
        short = Path(shutil.copytree(started, folder / f"{name}-short"))
        with disk(short=True):
            change(short)
        assert answers(short) == new
        assert verify(short) == []
        for site in range(1, len(counted.operations) + 1, step):
            for error in ERRORS.values():
                path = Path(shutil.copytree(started, folder / "failing"))
                try:
                    with disk(site, error):
                        change(path)
                    raise AssertionError(f"{name} says nothing of site {site}")
                except FolderError as told:
                    assert "then run again" in str(told)
                left = answers(path)
                assert verify(path) == []
                assert left in (old, new)
                figures["published"] += left == new
                if left == old:
                    change(path)
                    assert answers(path) == new
                figures["cases"] += 1
                shutil.rmtree(path)
    return figures
