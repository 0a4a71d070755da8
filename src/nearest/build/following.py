"""A build as it is seen by who has started workers: how far it is, and where one of them ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nearest.build.tasks import Unfinished
from nearest.build.workers import ends_each_time
from nearest.errors import NearestError
from nearest.folder import open_array
from nearest.store.claims import position
from nearest.store.documents import FRAME_DTYPE, DocumentReader
from nearest.store.journal import Task


class Followed(NamedTuple):
    """The tasks of a build, as `workers.drive` asks for them."""

    build: Unfinished

    def left(self) -> Sequence[Task]:
        """Tasks that are not finished."""
        return self.build.left()

    def path(self, task: Task) -> Path:
        """What a task is claimed by."""
        return self.build.journal.path(task)

    def hopeless(self, task: Task, error: BaseException) -> NearestError:
        """What to say of a task at which a process ends each time."""
        return NearestError(
            f"{ends_each_time(self._named(task), error)}; what else is done is kept, and the same "
            "build goes on from there"
        )

    def _named(self, task: Task) -> str:
        """What a worker was at, as a message names it."""
        build, found = self.build, position(self.path(task))
        corpus = build.corpora[task.segment].record
        if found is None or corpus is None:
            return f"segment {task.segment} ({task.path})"
        place, count = build.folder / corpus.files["frames"].path, corpus.frames
        frames = open_array(place, FRAME_DTYPE, (count, 2))
        _, first, last = found
        with (build.folder / corpus.files["documents"].path).open("rb") as file:
            documents = DocumentReader(file, frames, corpus.documents)
            ids = [repr(documents[number].id) for number in sorted({first, last})]
        return f"document {ids[0]}" if first == last else f"documents {ids[0]} to {ids[1]}"

    def report(self) -> None:
        """Say how far all workers are."""
        build, done = self.build, self.build.journal.done
        for path, stage in (("keys", "keys"), ("suffix", "suffix array"), ("index", "index")):
            tasks = [task for task in build.tasks if task.path == path]
            sizes = [build.corpora[task.segment].entries for task in tasks]
            if not all(map(done, tasks)):
                made = sum(
                    size if done(task) else (position(self.path(task)) or (0,))[0]
                    for task, size in zip(tasks, sizes, strict=True)
                )
                build.progress(stage, made, sum(sizes))
                return
