"""Make a memory hold what a corpus holds: skip, replace, remove and add, in one snapshot."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from nearest.build.add import (
    AddOptions,
    encoder_of,
    merged_tail,
    plan_of_additions,
)
from nearest.build.corpus_segments import write_added
from nearest.build.match import rules_of
from nearest.build.remove import without
from nearest.corpus.documents import Document
from nearest.corpus.incoming import Documents, in_batches, incoming_documents
from nearest.corpus.reading import Corpus, read_documents
from nearest.corpus.report import CorpusReport
from nearest.corpus.tokens import TokenRules, tokenise
from nearest.encode.layers import LanguageModel
from nearest.errors import CorpusError
from nearest.store.change import changing
from nearest.store.opening import open_snapshot
from nearest.store.snapshot import Snapshot
from nearest.store.stored_ids import Stored, StoredIds

_MADE_ID = re.compile(r"(.*)#[0-9a-f]{16}(#\d+)?", re.DOTALL)  # of a row: its file and a hash


@dataclass(frozen=True)
class SyncOptions(AddOptions):
    """How documents are added, and what may be removed."""

    allow_empty: bool = False  # what was read from folders in which there is nothing now


@dataclass(frozen=True)
class Synced:
    """How many documents a synchronisation found to be what."""

    equal: int
    replaced: int
    removed: int
    added: int
    kept: int = 0  # that may be of what is there and could not be read

    @property
    def changed(self) -> bool:
        """Whether the memory and the corpus differed."""
        return bool(self.replaced or self.removed or self.added)

    def to_dict(self) -> dict[str, int]:
        """A plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        kept = f", {self.kept:,} kept (they may be of what cannot be read)" if self.kept else ""
        return (
            f"{self.equal:,} equal, {self.replaced:,} replaced, {self.removed:,} removed, "
            f"{self.added:,} added{kept}"
        )


def sync_documents(
    path: Path,
    documents: Documents,
    model: LanguageModel | None,
    tokenizer: Any,
    options: SyncOptions,
) -> Synced:
    """Make a memory hold exactly these documents; those that are equal are not touched.

    Raises:
        NearestError: model, documents or folder cannot be used, nothing would be left, or a folder
            of the corpus is empty that held documents; the memory stays as it was.
    """
    with changing(path) as change:
        rules = rules_of(change.manifest, model)
        compared = _Compared(change.snapshot, documents, rules, options)
        encoder = encoder_of(change.snapshot, model, tokenizer, options)
        new, added = _peeked(compared.changed()), []
        if new is not None:
            plan = plan_of_additions(change, encoder, options)
            added = write_added(change, plan, tokenise(new, tokenizer, rules))
        synced = compared.result()
        if synced.changed:
            records = [*without(change, [*compared.replaced, *compared.gone]), *added]
            segments = merged_tail(change, records, options.progress)
            change.publish(segments=segments, documents_of=change.number)
    return synced


def compare_documents(path: Path, documents: Documents, options: SyncOptions) -> Synced:
    """Say what `sync_documents` would do, without a model; raises as it does."""
    snapshot = open_snapshot(path)
    model = snapshot.manifest.model
    rules = TokenRules(model.start_token, model.vocab_size, model.source_vocab_size)
    compared = _Compared(snapshot, documents, rules, options)
    for _ in compared.changed():
        pass
    return compared.result()


def _peeked(documents: Iterator[Document]) -> Iterator[Document] | None:
    """The documents, or None where there are none."""
    first = next(documents, None)
    if first is None:
        return None

    def all_of_them() -> Iterator[Document]:
        yield first
        yield from documents

    return all_of_them()


class _Compared:
    """A memory and a corpus, compared document by document as the corpus is read."""

    def __init__(
        self, memory: Snapshot, documents: Documents, rules: TokenRules, options: SyncOptions
    ) -> None:
        self.replaced: list[Stored] = []
        self.gone: list[Stored] = []
        self._memory = memory
        self._documents = read_documents(documents) if isinstance(documents, Path) else documents
        self._rules, self._allow_empty = rules, options.allow_empty
        self._ids = StoredIds(memory)
        self._seen = [np.zeros(segment.record.documents, bool) for segment in memory.segments]
        self._early: dict[str, Stored] | None = None
        self._equal = self._added = 0

    def changed(self) -> Iterator[Document]:
        """The documents that are new or differ from those that are stored."""
        for some in in_batches(incoming_documents(self._documents, self._rules)):
            hashed = [document.id for document in some if self._ids.has_hash_of(document.id)]
            places = dict(zip(hashed, self._ids.find(hashed), strict=True))
            known = sorted({place for place in places.values() if place is not None})
            read = {place: self._document(place) for place in known}  # as they are stored
            for document in some:
                found = self._stored(document, places.get(document.id))
                if found is None:
                    self._added += 1
                    yield document
                    continue
                self._seen[found.segment][found.number] = True
                if _equal(document, read.get(found) or self._document(found)):
                    self._equal += 1
                else:
                    self.replaced.append(found)
                    yield document

    def result(self) -> Synced:
        """The counts, when all documents have been read; finds what is gone.

        Raises:
            CorpusError: nothing would be left, or a folder is empty that held documents.
        """
        given, kept = self._documents, 0
        report = given.report if isinstance(given, Corpus) else CorpusReport()
        self.gone, emptied = [], Counter[str]()
        for number, segment in enumerate(self._memory.segments):
            for stored in segment.numbers[~self._seen[number][segment.numbers]].tolist():
                gone = Stored(number, stored)
                if report.unread and _may_be_of_unread(self._document(gone), report):
                    kept += 1
                    continue
                self.gone.append(gone)
                if report.empty and not self._allow_empty:
                    emptied.update(report.empty.intersection(_places(self._document(gone))))
        if not self._equal + self._added + len(self.replaced) + kept:
            raise CorpusError(
                f"nothing would be left of {self._memory.path}: delete its folder instead, or name "
                "a corpus with documents"
            )
        if emptied:
            folder, count = min(emptied.items())
            raise CorpusError(
                f"the folder {folder} is empty, and {count:,} of the documents of "
                f"{self._memory.path} came from it: mount it again, if it is a drive or a share; "
                "if they are to go, delete the folder, or say so (--allow-empty, allow_empty=True)"
            )
        return Synced(self._equal, len(self.replaced), len(self.gone), self._added, kept)

    def _document(self, stored: Stored) -> Document:
        return self._memory.segments[stored.segment].documents[stored.number]

    def _stored(self, document: Document, found: Stored | None) -> Stored | None:
        """The stored document that this one is a version of, where one of its id was found."""
        if found is None and document.made_id and document.metadata.get("path") == document.id:
            found = self._early_files().get(document.id)
        if found is not None and self._seen[found.segment][found.number]:
            return None
        return found

    def _early_files(self) -> dict[str, Stored]:
        """Files by their paths, whose ids early memories made of path and hash."""
        if self._early is None:
            self._early = {}
            for number, segment in enumerate(self._memory.segments):
                for stored in segment.numbers.tolist():
                    document = self._document(Stored(number, stored))
                    name = document.metadata.get("path")
                    if isinstance(name, str) and document.id.startswith(f"{name}#"):
                        self._early[name] = Stored(number, stored)
        return self._early


def _equal(document: Document, stored: Document) -> bool:
    """Whether a stored document is this one; early memories kept no hash with a file's path."""
    if (document.text, document.encoder_text) != (stored.text, stored.encoder_text):
        return False
    if document.id != stored.id:
        return True
    return _as_stored(document.metadata) == _as_stored(stored.metadata)


def _as_stored(metadata: Mapping[str, Any]) -> str:
    """What JSON makes of metadata: tuples are lists, and the names of fields strings."""
    return json.dumps(json.loads(json.dumps(dict(metadata))), sort_keys=True)


def _may_be_of_unread(document: Document, report: CorpusReport) -> bool:
    """Whether a document may be of a file, or below a folder, that could not be read."""
    places = _places(document)
    return not report.unread.isdisjoint(places) if places else report.unread_rows


def _places(document: Document) -> list[str]:
    """The file that a document was read from, and its folders; none of a row with its own id."""
    file = _file_of(document)
    return [] if file is None else [file, *map(str, PurePosixPath(file).parents)]


def _file_of(document: Document) -> str | None:
    """The file that a document was read from; None for a row with an id of its own."""
    path = document.metadata.get("path")
    whole = isinstance(path, str) and "sha256" in document.metadata
    if whole and (document.id == path or document.id.startswith(f"{path}#")):
        return str(path)
    made = _MADE_ID.fullmatch(document.id)
    return None if made is None else made[1]
