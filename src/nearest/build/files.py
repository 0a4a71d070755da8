"""Files that one process makes, or several together: each is made whole, and once.

Who makes them is a `Maker`: this process (`here`), one of several (`beside_others`), or the workers
that this one starts (`by_workers`).
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from nearest.build.workers import Spec, crew_of, drive, ends_each_time
from nearest.errors import NearestError
from nearest.progress import Progress, no_progress
from nearest.store.claims import Watch, owner_here, until_done

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
        """The numbers of those that are not made; none where the folder went with the work."""
        if self._left and not self.paths[0].parent.exists():
            self._left = []
        self._left = [number for number in self._left if not self.paths[number].exists()]
        return self._left

    def made(self, number: int) -> None:
        """Take note of one that is made, which is quicker than to look at all."""
        self._left.remove(number)

    def path(self, number: int) -> Path:
        """What a file is claimed by."""
        return self.paths[number]

    def hopeless(self, number: int, error: BaseException) -> NearestError:
        """What to say of a file at which a process ends each time."""
        return NearestError(ends_each_time(self._named(number), error))

    def report(self) -> None:
        """Say how many are made."""
        self._progress(self._stage, len(self.paths) - len(self._left), len(self.paths))


Maker = Callable[[Files, Make], bool]
"""Lets files be made; returns whether this process is who goes on with them."""


def here(files: Files, make: Make) -> bool:
    """Make what is not there, in this process alone."""
    left = list(files.left())
    for number in left:
        make(number, files.paths[number])
        files.made(number)
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
        def some() -> bool:
            left = list(files.left())
            return sum(_made(files.paths[number], number, make, watch) for number in left) > 0

        with watch.beating():
            try:
                until_done(lambda: not files.left(), some)
            except FileNotFoundError:
                if files.left():  # else others have ended, and taken the folder away
                    raise
        return False

    return shared


def by_one(path: Path, work: Callable[[], None]) -> None:
    """Let one of the processes that have made some files do what is next; the others wait for it.

    Each does it, one after the other: `work` is to see what is done already. The claim lies beside
    the files, in a folder that may go with the work.
    """
    watch = Watch(owner_here())

    def done() -> bool:
        try:
            claim = watch.take(path)
        except FileNotFoundError:
            return True
        if claim is not None:
            work()
        return claim is not None

    with watch.beating():
        until_done(done, lambda: False)


def _made(path: Path, number: int, make: Make, watch: Watch) -> bool:
    """Make a file, unless another has claimed it."""
    if path.exists() or (claim := watch.take(path, go_on=False)) is None:
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
