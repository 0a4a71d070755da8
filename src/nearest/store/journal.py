"""How far an unfinished build has come, so that the same build, run again, goes on from there.

The journal stands beside the segments that it tells of, and is replaced in one rename, at most
every half a minute: what came after it is done again, and a build that takes less leaves none.
It goes when the manifest has been published; until then it is what says which files live.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from nearest.corpus.documents import Document
from nearest.errors import FolderError
from nearest.folder import write_atomically
from nearest.store.documents import document_line
from nearest.store.manifest import SegmentRecord, check_file
from nearest.store.records import Count, Digest, Positive

JOURNAL = "build.json"
_FORMAT = 1
_SECONDS = 30.0


class CorpusRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The documents of one segment: how many, and SHA-256 of their lines."""

    documents: Positive
    digest: Digest


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a build stands.

    Attributes:
        arguments: what it was asked for; another build does not go on with its work.
        corpora: the documents of every segment that was begun.
        whole: whether the corpus ends with these.
        segments: those that are finished.
        current: the one that is not, as far as it is described.
        done: names of its access paths that are written.
        batches: forward passes whose keys are on the disk.
    """

    format: int
    arguments: dict[str, Any]
    corpora: list[CorpusRecord]
    whole: bool
    segments: list[SegmentRecord]
    current: SegmentRecord | None
    done: list[str]
    batches: Count


class Journal:
    """Keeps the stage of a build, on the disk from time to time."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self._folder = folder
        self._saved = time.monotonic()
        self.stage = stage

    @classmethod
    def of(cls, folder: Path, arguments: dict[str, Any]) -> "Journal":
        """The journal of the build that was begun in this folder, or a new one.

        Raises:
            FolderError: that was another build, or what it left is damaged.
        """
        path = folder / JOURNAL
        if not path.exists():
            return cls(folder, Stage(_FORMAT, arguments, [], False, [], None, [], 0))
        try:
            stage = msgspec.json.decode(path.read_bytes(), type=Stage)
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            raise _anew(folder, f"its {JOURNAL} cannot be read ({error})") from error
        if stage.format != _FORMAT:
            raise _anew(folder, f"its {JOURNAL} is of another version")
        for name in {**arguments, **stage.arguments}:
            begun, asked = stage.arguments.get(name), arguments.get(name)
            if begun != asked:
                raise _anew(folder, f"it was begun with {name} {begun}, and not {asked}")
        for record in [*stage.segments, *([] if stage.current is None else [stage.current])]:
            for file in record.files.values():
                check_file(folder, file)
        return cls(folder, stage)

    @property
    def due(self) -> bool:
        """Whether it is time to make work durable."""
        return time.monotonic() - self._saved >= _SECONDS

    def note(self, **changes: Any) -> None:
        """Take changes of the stage down; what they tell of must be on the disk."""
        self.stage = msgspec.structs.replace(self.stage, **changes)
        if self.due:
            data = msgspec.json.format(msgspec.json.encode(self.stage), indent=1)
            write_atomically(self._folder / JOURNAL, data)
            self._saved = time.monotonic()

    def close(self) -> None:
        """Take the journal away: the manifest has been published."""
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def rest(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Pass documents through that no segment has yet.

        Raises:
            FolderError: those before are not the ones that the segments were made of.
        """
        stage, other = self.stage, _anew(self._folder, "it was begun with another corpus")
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


def _anew(folder: Path, reason: str) -> FolderError:
    return FolderError(
        f"{folder} holds an unfinished build that this one cannot go on with ({reason}): run that "
        "build again, or delete the folder to start anew"
    )
