"""The work of a build, once its corpora are written: what it consists of, one task, and the end.

Any number of processes do tasks of one folder at a time: `store/claims.py` says who does which, and
`store/journal.py` what is finished. What a task writes depends on nothing but the corpus and the
settings, so that it does not matter who does it, nor whether two do.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from nearest import __version__
from nearest.build.keys import EncodedKeys
from nearest.build.machine import check_alike, check_all_alike, machine_of
from nearest.encode.encoder import Encoder
from nearest.errors import NearestError
from nearest.folder import disk_errors_explained, write_atomically, write_once
from nearest.progress import Progress, no_progress
from nearest.store.claims import Claim, Watch, until_done
from nearest.store.journal import BATCHES, MACHINE, TASKS, CorpusRecord, Journal, Task, TaskLog
from nearest.store.manifest import (
    FORMAT,
    KeysRecord,
    Manifest,
    ModelRecord,
    SegmentRecord,
    check_file,
    write_manifest,
)
from nearest.store.new_files import NewFiles
from nearest.store.new_segment import SegmentPlan, reopen_segment, write_parts
from nearest.store.parts import PARTS
from nearest.store.parts.index import IndexChoice
from nearest.store.records import MachineRecord

_PARTS = {"suffix": PARTS[:1], "keys": PARTS[1:2], "index": PARTS[2:]}


@dataclass(frozen=True)
class Unfinished:
    """A build whose corpora are written.

    Attributes:
        journal: what is to be done and what is done.
        encoder: makes the keys; None where there are none to make.
        allow_mixed: accept keys of unlike machines.
        progress: told what is done.
    """

    journal: Journal
    encoder: Encoder | None
    allow_mixed: bool = False
    progress: Progress = no_progress

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.journal.folder

    @cached_property
    def manifest(self) -> Manifest:
        """Of the memory that is to be, without segments."""
        stage = self.journal.stage
        return first_manifest(stage.model, stage.keys, stage.segment_tokens)

    @cached_property
    def corpora(self) -> dict[str, CorpusRecord]:
        """The corpora of all segments by name, those of other parts of the build included."""
        return {f"{n:06d}": corpus for n, corpus in enumerate(self.journal.stage.corpora, 1)}

    @cached_property
    def tasks(self) -> list[Task]:
        """All that this part of the build has to do, in an order in which one process can do it."""
        own = [name for name, corpus in self.corpora.items() if corpus.record is not None]
        if self.manifest.keys is None:
            return [Task(name, "suffix") for name in own]
        found = [Task(name, path) for name in own for path in ("suffix", "keys")]
        if self.journal.stage.part[1] > 1:
            return found  # indexes are filled like one: `nearest join` makes them
        first = self.lead
        others = [Task(name, "index") for name in own if name != first]
        return [*found, Task(first, "index"), *others]

    @cached_property
    def lead(self) -> str:
        """The largest segment: the others' indexes are filled like the one trained on it."""
        corpora = self.corpora
        return max(corpora, key=lambda name: (corpora[name].entries, -int(name)))

    def needs(self, task: Task) -> list[Task]:
        """Tasks that are to be finished before."""
        if task.path != "index":
            return []
        own = [Task(task.segment, "suffix"), Task(task.segment, "keys")]
        return own if task.segment == self.lead else [*own, Task(self.lead, "index")]

    def left(self) -> list[Task]:
        """Tasks that are not finished."""
        return [task for task in self.tasks if self.journal.done(task) is None]

    def record(self, segment: str, paths: Iterable[str] = tuple(_PARTS)) -> SegmentRecord:
        """A segment of this part as its corpus and those of some tasks that are done describe it.

        The order of its files does not depend on who was first.
        """
        base = self.corpora[segment].record
        if base is None:
            raise ValueError(f"segment {segment} is of another part")
        return self.journal.combined(base, [Task(segment, path) for path in paths])

    def before(self, task: Task) -> SegmentRecord:
        """The segment of a task as those that it needs describe it."""
        needed = [one.path for one in self.needs(task) if one.segment == task.segment]
        return self.record(task.segment, needed)


def first_manifest(
    model: ModelRecord, keys: KeysRecord | None, segment_tokens: int | None = None
) -> Manifest:
    """A first snapshot that has no segment yet."""
    return Manifest(
        format=FORMAT,
        version=1,
        created_by=f"nearest {__version__}",
        model=model,
        keys=keys,
        segments=[],
        clusters=None,
        settings={},
        gates={},
        documents_of=1,
        tuned_at={},
        segment_tokens=segment_tokens,
    )


def work(build: Unfinished, watch: Watch) -> None:
    """Do tasks, beside whoever else does, until none is left.

    Raises:
        NearestError: keys or index cannot be made, or the folder cannot be written.
    """
    try:
        with disk_errors_explained(build.folder), watch.beating():
            _work(build, watch)
    except (OSError, NearestError):
        if build.journal.stands:
            raise  # else the build is over, or another's


def _work(build: Unfinished, watch: Watch) -> None:
    made_on = None
    if build.encoder is not None:
        made_on = machine_of(build.encoder)
        if not build.allow_mixed:
            _agree(build, made_on)
    until_done(
        lambda: not (build.journal.stands and build.left()),
        lambda: _done_one(build, watch, made_on),
    )


def _done_one(build: Unfinished, watch: Watch, made_on: MachineRecord | None) -> bool:
    """Do the first task that is ready and that nobody has claimed; whether there is one."""
    for task in build.left():
        if all(map(build.journal.done, build.needs(task))):
            claim = watch.take(build.journal.path(task))
            if claim is not None:
                _do(build, task, claim, made_on)
                watch.give_up()
                return True
    return False


def machine_begun(build: Unfinished) -> MachineRecord | None:
    """What the first keys of a build are made on; None where none were begun, or any will do."""
    if build.allow_mixed:
        return None
    try:
        return msgspec.json.decode(
            (build.folder / TASKS / MACHINE).read_bytes(), type=MachineRecord
        )
    except (OSError, msgspec.DecodeError):
        return None


def _agree(build: Unfinished, made_on: MachineRecord) -> None:
    """Refuse to make keys beside those of another kind of machine; the first says which."""
    path, data = build.folder / TASKS / MACHINE, msgspec.json.encode(made_on)
    write_once(path, data)
    if (first := machine_begun(build)) is None:  # it is damaged
        return write_atomically(path, data)
    check_alike(first, made_on, str(build.folder))


def _do(build: Unfinished, task: Task, claim: Claim, made_on: MachineRecord | None) -> None:
    """Do one task: write its files aside, move them to their place, and note it."""
    if build.journal.done(task) is not None:
        return  # by another, while it was being claimed
    with claim.unless_lost():
        files, record = _written(build, task, claim, made_on)
        if claim.held and build.journal.stands:
            (claim.scratch / BATCHES).unlink(missing_ok=True)  # it tells of files that go now
            files.settle(_names(record) - _names(build.before(task)))
            build.journal.finish(task, record)
        shutil.rmtree(claim.scratch, ignore_errors=True)


def _names(record: SegmentRecord) -> set[str]:
    return {Path(file.path).name for file in record.file_records()}


def _written(
    build: Unfinished, task: Task, claim: Claim, made_on: MachineRecord | None
) -> tuple[NewFiles, SegmentRecord]:
    """Write the files of a task into its scratch folder, and describe them."""
    name, encoder, keys = task.segment, build.encoder, build.manifest.keys
    others = []
    if task.path == "index" and name != build.lead:
        others = [build.record(build.lead)]
    stage = build.journal.stage
    scratch = claim.scratch.relative_to(build.folder).as_posix()
    files = NewFiles(build.folder, f"segments/{name}", scratch=scratch)
    plan = SegmentPlan(
        files,
        name,
        msgspec.structs.replace(build.manifest, segments=others),
        IndexChoice("exact" if keys is None else keys.index, stage.recall, stage.nprobe),
        build.progress,
        None if encoder is None else EncodedKeys(encoder),
        among_others=bool(others),
        log=TaskLog(build.journal, claim) if task.path == "keys" else None,
        made_on=made_on,
    )
    return files, write_parts(reopen_segment(plan, build.before(task)), _PARTS[task.path])


def publish(build: Unfinished) -> None:
    """Make what is finished a memory: one manifest, in one rename.

    Raises:
        FolderError: a file is missing or of another size, or keys are of unlike machines.
    """
    if left := build.left():
        raise ValueError(f"{left[0]} is not finished")
    segments = [build.record(name) for name in build.corpora]
    if not build.allow_mixed:
        check_all_alike((str(build.folder), segment.made_on) for segment in segments)
    with disk_errors_explained(build.folder):
        build.journal.make_durable(build.corpora)
        for segment in segments:
            for file in segment.file_records():
                check_file(build.folder, file)
        write_manifest(build.folder, msgspec.structs.replace(build.manifest, segments=segments))
        build.journal.close()
