"""Files that one process makes, or several together: each is made whole, and once.

Who makes them is a `Maker`: this process (`here`), one of several (`beside_others`), or the workers
that this one starts (`by_workers`).
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nearest.build.workers import Spec, crew_of, drive
from nearest.errors import NearestError
from nearest.progress import Progress, no_progress
from nearest.store.claims import Watch

_POLL = 0.05  # seconds, growing to
_LONGEST_POLL = 1.0

Make = Callable[[int, Path], None]
"""Write the file of this number, to a place from which it is moved to its own."""


class Files:
    """Files that are to be made; one that is there is made."""

    def __init__(
        self,
        paths: Sequence[Path],
        named: Callable[[int], str],
        stage: str,
        progress: Progress = no_progress,
    ) -> None:
        """Of these paths, in one folder that is there.

        Args:
            paths: that make up the whole.
            named: what the file of a number is of, as a message names it.
            stage, progress: told (stage, files made, all).
        """
        self.paths, self._named, self._stage, self._progress = paths, named, stage, progress
        self._left = list(range(len(paths)))

    def left(self) -> list[int]:
        """The numbers of those that are not made."""
        self._left = [number for number in self._left if not self.paths[number].exists()]
        return self._left

    def path(self, number: int) -> Path:
        """What a file is claimed by."""
        return self.paths[number]

    def hopeless(self, number: int, error: BaseException) -> NearestError:
        """What to say of a file at which a process ends each time."""
        return NearestError(
            f"the process that reads {self._named(number)} ends each time ({error}): leave that "
            "out, or give it more memory"
        )

    def report(self) -> None:
        """Say how many are made."""
        self._progress(self._stage, len(self.paths) - len(self._left), len(self.paths))


Maker = Callable[[Files, Make], bool]
"""Lets files be made; returns whether this process is who goes on with them."""


def here(files: Files, make: Make) -> bool:
    """Make what is not there, in this process alone."""
    for number in list(files.left()):
        make(number, files.paths[number])
        files.left()
        files.report()
    return True


def by_workers(folder: Path, spec: Spec, workers: int | None, ray: str | None) -> Maker:
    """Let workers in a folder make what is not there, or this process, as `crew_of` says."""

    def driven(files: Files, make: Make) -> bool:
        with crew_of(folder, spec, workers, ray) as crew:
            if crew is None:
                return here(files, make)
            drive(files, crew)
        return True

    return driven


def beside_others(watch: Watch) -> Maker:
    """Make what nobody else makes, until all is there; others go on with it."""

    def shared(files: Files, make: Make) -> bool:
        pause = _POLL
        with watch.beating():
            while files.left():
                if any(_made(files.paths[number], number, make, watch) for number in files.left()):
                    pause = _POLL
                else:  # the others are at work
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_POLL)
        return False

    return shared


def _made(path: Path, number: int, make: Make, watch: Watch) -> bool:
    """Make a file, unless another has claimed it."""
    claim = watch.take(path)
    if claim is None:
        return False
    with claim.unless_lost():
        if not path.exists():  # made by another, while it was being claimed
            place = claim.scratch / path.name
            make(number, place)
            if claim.held:
                place.replace(path)
        shutil.rmtree(claim.scratch, ignore_errors=True)
    watch.give_up()
    return True
