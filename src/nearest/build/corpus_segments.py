"""A corpus in segments of bounded size: built, going on where a journal says, or added."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from nearest.corpus.tokens import TokenisedDocument
from nearest.store.change import Change
from nearest.store.journal import CorpusRecord, Journal
from nearest.store.manifest import SegmentRecord
from nearest.store.new_files import segment_files
from nearest.store.new_segment import (
    SegmentPlan,
    begin_segment,
    reopen_segment,
    segment_tokens,
    write_parts,
    write_segment,
)


def write_segments(
    plan: SegmentPlan, journal: Journal, documents: Iterator[TokenisedDocument]
) -> list[SegmentRecord]:
    """Write a corpus in segments, going on where the journal says."""
    stage = journal.stage
    segments, parts = list(stage.segments), _Parts(documents)
    if stage.corpora:
        parts.ended()  # reads what was read before, and finds out whether it is the same

    def following() -> SegmentPlan:
        manifest = msgspec.structs.replace(plan.manifest, segments=list(segments))
        name, among_others = f"{len(segments) + 1:06d}", bool(segments)
        files = segment_files(plan.files.root, name)
        return replace(plan, files=files, name=name, manifest=manifest, among_others=among_others)

    while True:
        if stage.current is not None:
            digest = stage.corpora[-1].digest
            new = reopen_segment(following(), stage.current, digest)
        elif stage.whole:
            return segments
        else:
            segment = following()
            shutil.rmtree(segment.files.path(""), ignore_errors=True)
            new = begin_segment(segment, parts.take(segment_tokens(plan.manifest.keys)))
            corpora = [*stage.corpora, CorpusRecord(new.record.documents, new.digest)]
            journal.note(corpora=corpora, whole=parts.ended(), current=new.record, done=[])
        segments.append(write_parts(new))
        journal.note(segments=list(segments), current=None, done=[])
        stage = journal.stage


def write_added(
    change: Change, plan: SegmentPlan, documents: Iterator[TokenisedDocument]
) -> list[SegmentRecord]:
    """Write documents that come to a memory, in segments as large as a build makes them.

    Raises:
        NearestError: documents, keys or index cannot be used.
    """
    parts, added = _Parts(documents), list[SegmentRecord]()
    while not added or not parts.ended():
        segments = [*plan.manifest.segments, *added]
        manifest = msgspec.structs.replace(plan.manifest, segments=segments)
        name, files = change.new_segment(added)
        segment = replace(plan, files=files, name=name, manifest=manifest)
        added.append(write_segment(segment, parts.take(segment_tokens(manifest.keys))))
    return added


class _Parts:
    """A stream of documents, taken a segment's worth at a time."""

    def __init__(self, documents: Iterator[TokenisedDocument]) -> None:
        self._documents = documents
        self._next: TokenisedDocument | None = None
        self._begun = False

    def ended(self) -> bool:
        """Whether none are left."""
        if not self._begun:
            self._begun, self._next = True, next(self._documents, None)
        return self._next is None

    def take(self, tokens: int) -> Iterator[TokenisedDocument]:
        """Whole documents of at least so many tokens, where there are as many.

        What follows begins with a document that has an entry.
        """
        taken = 0
        while not self.ended() and self._next is not None:
            if taken >= tokens and len(self._next.tokens) > 1:
                return
            item, self._next = self._next, next(self._documents, None)
            taken += len(item.tokens)
            yield item
