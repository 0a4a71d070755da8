"""A run's folder: what it was begun with, its checkpoints, each whole, and the model at its end.

settings.json     what decides the run's numbers
curve.jsonl       a line a step
checkpoint-120/   model, optimiser, schedule and random states after so many steps
model/            after the last step
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, fsync_file, write_atomically
from nearest.retro.config import RetroConfig

MODEL, PARTIAL = "model", "partial"
_SETTINGS, _CURVE, _PREFIX = "settings.json", "curve.jsonl", "checkpoint-"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, the earliest first."""
    found = [p for p in run.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was made."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def make_folder(run: Path) -> None:
    """Make a run's folder where there is none (FolderError where that cannot be)."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"{run} cannot be made ({error.strerror}): give --out a folder that you may write to"
        ) from error


def begin(run: Path, record: Mapping[str, Any]) -> Path | None:
    """Begin a run in its folder, or go on with it; returns the checkpoint to go on from.

    Raises:
        FolderError: the folder holds something else, or the disk fails.
        SettingError: it was begun with other settings; all differences are named.
    """
    with disk_errors_explained(run):
        if all(p.suffix == ".partial" for p in run.iterdir()):  # left by a kill at the very start
            write_atomically(run / _SETTINGS, json.dumps(record, indent=1, sort_keys=True).encode())
            return None
        check_record(run, record)
        whole = checkpoints(run)
        return whole[-1] if whole else None


def clear(run: Path, steps: int) -> None:
    """Remove what an ended process has left half-written, and the model of a run that goes on.

    Args:
        run: its folder, whose writer's lock is held.
        steps: that its last checkpoint has, where it has more to make; 0: none, or no more.
    """
    shutil.rmtree(run / PARTIAL, ignore_errors=True)
    if steps and (run / MODEL).exists():  # the checkpoint holds the same weights
        (run / PARTIAL).mkdir()
        (run / MODEL).rename(run / PARTIAL / MODEL)
        shutil.rmtree(run / PARTIAL, ignore_errors=True)


def check_record(run: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was begun otherwise."""
    try:
        there = json.loads((run / _SETTINGS).read_text(encoding="utf-8"))
        config = there["model"]["config"]
        there["model"]["config"] = _settings_since(config, record["model"]["config"]) | config
        differing = differences(there, json.loads(json.dumps(record)))
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise FolderError(
            f"{run} exists and is no training run that can be read ({error}): give --out a new "
            "folder"
        ) from error
    if differing:
        raise SettingError(
            f"{run} was begun with other settings: {'; '.join(differing)}. Go on with those, or "
            "give --out a new folder"
        )


def _settings_since(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that have come since a run was begun, where they have their default."""
    default = RetroConfig()
    return {
        name: value
        for name, value in now.items()
        if name not in there and value == getattr(default, name, None)
    }


def differences(there: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> list[str]:
    """Every setting that two records do not share, with both values.

    >>> differences({"a": 1, "of": {"b": 2}}, {"a": 1, "of": {"b": 3}})
    ['of.b was 2, is 3']
    """
    found = []
    for name in sorted(there.keys() | now.keys()):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{within}{name}.")
        elif old != new:
            found.append(f"{within}{name} was {old}, is {new}")
    return found


def publish(run: Path, name: str, keep: int | None = None) -> None:
    """Turn what stands whole in the partial folder into a folder of the run, then drop old ones.

    A kill before the rename leaves the run as it was.
    """
    partial, place = run / PARTIAL / name, run / name
    for folder, _, files in os.walk(partial):
        for file in files:
            fsync_file(Path(folder) / file)
        fsync_file(Path(folder))
    if place.exists():  # of an earlier end of this run, which went on since
        place.rename(run / PARTIAL / f"{name}.old")
    partial.rename(place)
    fsync_file(run)
    for old in checkpoints(run)[:-keep] if keep else ():
        old.rename(run / PARTIAL / old.name)  # no half-removed checkpoint can be taken for whole
    shutil.rmtree(run / PARTIAL, ignore_errors=True)


class Curve:
    """The lines of `curve.jsonl`: what each step, and each validation, gave."""

    def __init__(self, run: Path, step: int) -> None:
        """Lines after a step, which a kill left without a checkpoint, are taken back.

        Those of step 0, the validation before the first step, too where the step is −1.
        """
        self._path = run / _CURVE
        kept = [line for line in read_curve(run) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self._path, text.encode())

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_curve(run: Path | str) -> list[dict[str, Any]]:
    """What `Curve` wrote; a last line that a kill cut is left out."""
    path = Path(run) / _CURVE
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
