"""How far an unfinished build has come, so that it goes on from there, with any number of workers.

`build.json` says what is built and of which documents; it is replaced in one rename, at most every
half a minute. Work on the segments is cut into tasks, and a file below `build/` says of each that
is finished what it made. What these files tell of is on the disk. They go when the manifest has
been published; until then they are what says which files live. A build that is done by one process
in less than half a minute leaves none.
"""

import hashlib
import itertools
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nearest.corpus.documents import Document
from nearest.errors import FolderError
from nearest.folder import fsync_file, write_atomically
from nearest.store.claims import Claim, Position, beside, suspect
from nearest.store.documents import document_line
from nearest.store.manifest import KeysRecord, ModelRecord, SegmentRecord, check_file
from nearest.store.records import Digest, Positive

JOURNAL = "build.json"
TASKS = "build"
MACHINE = "machine.json"  # below it: what computes the keys
BATCHES = "batches.json"  # in the scratch folder of a task
_DONE = "done.json"
_TASK = re.compile(r"(\d{6})\.(suffix|keys|index|change)(\..+)?")
_FORMAT = 2
_SECONDS = 30.0
_LONG = 1.0  # seconds of a task whose end is noted at once: a note takes hundredths of one
_Inode = tuple[int, int]  # of a file, and when that was written


class Task(NamedTuple):
    """Work that one process does: a way to the entries of one segment."""

    segment: str
    path: str  # suffix, keys, or index (and what comes after it)

    def __str__(self) -> str:
        return f"{self.segment}.{self.path}"

    @classmethod
    def named(cls, name: str) -> "Task | None":
        """The task that a file below `build/` is about; None for a file of something else."""
        found = _TASK.fullmatch(name)
        return None if found is None else cls(found[1], found[2])


class CorpusRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The documents of one segment.

    `documents`: how many; `digest`: SHA-256 of their lines; `entries`: tokens with a successor;
    `record`: the files with them, None where another part of the build has these.
    """

    documents: Positive
    digest: Digest
    entries: Positive
    record: SegmentRecord | None


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is built, and of what.

    Attributes:
        arguments: all that decides what is written, but for the corpus; another build does not go
            on with this one's work.
        model, keys, recall, nprobe: of the memory that is to be.
        batch_size: windows a forward pass; None without keys.
        segment_tokens: after how many another segment begins, where that was asked for.
        part: which part of the build this is, and of how many.
        corpora: the documents of every segment whose corpus is written.
        whole: whether the corpus ends with these.
    """

    format: int
    arguments: dict[str, Any]
    model: ModelRecord
    keys: KeysRecord | None
    recall: float
    nprobe: Positive | None
    batch_size: Positive | None
    segment_tokens: Positive | None
    part: tuple[Positive, Positive]
    corpora: list[CorpusRecord] = []
    whole: bool = False


class Journal:
    """Keeps the stage of a build, on the disk from time to time."""

    def __init__(self, folder: Path, stage: Stage, began: _Inode | None = None) -> None:
        """Where it has `began`, it is another process's, and what is finished is noted at once."""
        self.folder = folder
        self.stage = stage
        self._began = began
        self._saved = self._finished = time.monotonic()
        self._done: dict[Task, SegmentRecord] = {}
        self._unsaved: list[Task] = []

    @classmethod
    def of(cls, folder: Path, stage: Stage) -> "Journal":
        """The journal of the build that was begun in this folder, or a new one.

        Raises:
            FolderError: that was another build, or what it left is damaged.
        """
        if not (folder / JOURNAL).exists():
            return cls(folder, stage)
        begun = read_stage(folder)
        for name in {**stage.arguments, **begun.arguments}:
            was, asked = begun.arguments.get(name), stage.arguments.get(name)
            if was != asked:
                raise _anew(folder, f"it was begun with {name} {was}, and not {asked}")
        if begun.part != stage.part:
            was, asked = ("/".join(map(str, one.part)) for one in (begun, stage))
            raise _anew(folder, f"it was begun with part {was}, and not {asked}")
        corpora, whole = begun.corpora, begun.whole
        journal = cls(folder, msgspec.structs.replace(stage, corpora=corpora, whole=whole))
        for corpus in corpora:
            for file in {} if corpus.record is None else corpus.record.files.values():
                check_file(folder, file)
        journal._forget_others()
        return journal

    @classmethod
    def opened(cls, folder: Path) -> "Journal":
        """The journal of a build that another process has begun; raises as `read_stage`."""
        began = _inode(folder)
        return cls(folder, read_stage(folder), began)

    @property
    def stands(self) -> bool:
        """Whether who shares this build with us has neither finished it nor begun another one."""
        return self._began is None or _inode(self.folder) == self._began

    def _forget_others(self) -> None:
        """Take away work on segments whose corpora are to be written anew; check what was done."""
        known = {f"{number + 1:06d}" for number in range(len(self.stage.corpora))}
        for item in (self.folder / TASKS).glob("*"):
            task = Task.named(item.name)
            if task is not None and task.segment not in known:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            elif task is not None and (record := self.done(task)) is not None:
                for file in record.file_records():
                    check_file(self.folder, file)

    @property
    def due(self) -> bool:
        """Whether it is time to make work durable."""
        return time.monotonic() - self._saved >= _SECONDS

    def note(self, **changes: Any) -> None:
        """Take changes of the stage down; what they tell of must be on the disk."""
        self.stage = msgspec.structs.replace(self.stage, **changes)
        self.save_if_due()

    def save_if_due(self) -> None:
        """Write the stage, if that is due, and not another process's to write."""
        if self.due and self._began is None:
            self.save()

    def save(self) -> None:
        """Write the stage, and what is finished."""
        for task in self._unsaved:
            self._write(task)
        self._unsaved = []
        data = msgspec.json.format(msgspec.json.encode(self.stage), indent=1)
        write_atomically(self.folder / JOURNAL, data)
        self._saved = time.monotonic()

    def path(self, task: Task) -> Path:
        """What a task is claimed by, and its notes are beside."""
        return self.folder / TASKS / str(task)

    def done(self, task: Task) -> SegmentRecord | None:
        """The segment as a finished task describes it; None for one that is not finished.

        Raises:
            FolderError: what it left is damaged.
        """
        if task not in self._done:
            file = beside(self.path(task), _DONE)
            try:
                self._done[task] = msgspec.json.decode(file.read_bytes(), type=SegmentRecord)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
                raise _anew(
                    self.folder, f"{file.relative_to(self.folder)} cannot be read ({error})"
                ) from error
        return self._done[task]

    def finish(self, task: Task, record: SegmentRecord) -> None:
        """Note that a task is finished; its files must be in their place.

        Notes of short tasks wait for each other. What a long one made is not left to the next task,
        which may take long before it notes anything.
        """
        self._done[task] = record
        before, self._finished = self._finished, time.monotonic()
        if self._began is not None:
            self._write(task)
            return
        self._unsaved.append(task)
        if self.due or self._finished - before >= _LONG:
            self.save()

    def _write(self, task: Task) -> None:
        self.make_durable([task.segment])
        write_atomically(beside(self.path(task), _DONE), msgspec.json.encode(self._done[task]))

    def make_durable(self, segments: Iterable[str]) -> None:
        """Let files stay where they were moved to, whatever happens to the machine."""
        for name in segments:
            fsync_file(self.folder / "segments" / name)
        fsync_file(self.folder / "segments")

    def combined(self, base: SegmentRecord, tasks: Sequence[Task]) -> SegmentRecord:
        """A segment as its corpus and those of some tasks that are finished describe it."""
        plain = msgspec.structs.asdict(base)
        for task in tasks:
            if (record := self.done(task)) is not None:
                fields = msgspec.structs.asdict(record)
                files = fields.pop("files")
                new = {name: value for name, value in fields.items() if value != plain[name]}
                base = base.with_files(files, **new)
        return base

    def close(self) -> None:
        """Take the journal away: the manifest has been published."""
        (self.folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder / TASKS, ignore_errors=True)

    def rest(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Pass documents through that no segment has yet.

        Raises:
            FolderError: those before are not the ones that the segments were made of.
        """
        stage, other = self.stage, _anew(self.folder, "it was begun with another corpus")
        for corpus in stage.corpora:
            digest = hashlib.sha256()
            for document in itertools.islice(documents, corpus.documents):
                digest.update(document_line(document))
            if digest.hexdigest() != corpus.digest:
                raise other
        ended = True
        for document in documents:
            if stage.whole:
                raise other
            ended = False
            yield document
        if stage.corpora and ended and not stage.whole:
            raise other


class TaskLog:
    """How far the keys of a segment have come; kept with the files that it tells of."""

    def __init__(self, journal: Journal, claim: Claim) -> None:
        self._journal, self._claim, self._file = journal, claim, claim.scratch / BATCHES
        self._saved = time.monotonic()
        try:
            self.batches = int(msgspec.json.decode(self._file.read_bytes(), type=int))
        except (FileNotFoundError, msgspec.DecodeError):
            self.batches = 0

    @property
    def due(self) -> bool:
        """Whether it is time to make work durable."""
        return time.monotonic() - self._saved >= _SECONDS

    def note(self, batches: int) -> None:
        """So many batches of keys are on the disk."""
        write_atomically(self._file, msgspec.json.encode(batches))
        self._saved = time.monotonic()
        self._journal.save_if_due()

    def at(self, position: Position) -> None:
        """Before a batch: keys of so many entries are made, and these documents come next."""
        self._claim.at(position)

    @property
    def suspect(self) -> Position | None:
        """Before which batch another process has ended unasked."""
        return suspect(self._claim.path)


def _inode(folder: Path) -> _Inode | None:
    """What tells a journal from one that has taken its place; None where there is none."""
    try:
        status = (folder / JOURNAL).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def read_stage(folder: Path) -> Stage:
    """What is built in a folder.

    Raises:
        FolderError: the journal cannot be read, or is of another version.
    """
    try:
        stage = msgspec.json.decode((folder / JOURNAL).read_bytes(), type=Stage)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise _anew(folder, f"its {JOURNAL} cannot be read ({error})") from error
    if stage.format != _FORMAT:
        raise _anew(folder, f"its {JOURNAL} is of another version")
    return stage


def new_stage(**fields: Any) -> Stage:
    """The stage of a build that begins."""
    return Stage(_FORMAT, **fields)


def _anew(folder: Path, reason: str) -> FolderError:
    return FolderError(
        f"{folder} holds an unfinished build that this one cannot go on with ({reason}): run that "
        "build again, or delete the folder to start anew"
    )
