"""A corpus in segments of bounded size: built, going on where a journal says, or added."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from nearest.build.access_paths import write_access_paths, write_segment
from nearest.build.new_segment import (
    SegmentPlan,
    reopen_corpus,
    segment_tokens,
    write_corpus,
)
from nearest.corpus.tokens import TokenisedDocument
from nearest.store.change import free_segment_name
from nearest.store.journal import CorpusRecord, Journal
from nearest.store.manifest import SegmentRecord


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
        return replace(plan, manifest=manifest, name=name, among_others=among_others)

    while True:
        if stage.current is not None:
            digest = stage.corpora[-1].digest
            new = reopen_corpus(following(), stage.current, digest)
        elif stage.whole:
            return segments
        else:
            segment = following()
            shutil.rmtree(segment.root / segment.folder, ignore_errors=True)
            new = write_corpus(segment, parts.take(segment_tokens(plan.manifest.keys)))
            corpora = [*stage.corpora, CorpusRecord(new.record.documents, new.digest)]
            journal.note(corpora=corpora, whole=parts.ended(), current=new.record, done=[])
        segments.append(write_access_paths(new))
        journal.note(segments=list(segments), current=None, done=[])
        stage = journal.stage


def write_added(plan: SegmentPlan, documents: Iterator[TokenisedDocument]) -> list[SegmentRecord]:
    """Write documents that come to a memory, in segments as large as a build makes them.

    Raises:
        NearestError: documents, keys or index cannot be used.
    """
    parts, added = _Parts(documents), list[SegmentRecord]()
    while not added or not parts.ended():
        segments = [*plan.manifest.segments, *added]
        manifest = msgspec.structs.replace(plan.manifest, segments=segments)
        segment = replace(plan, manifest=manifest, name=free_segment_name(plan.root, manifest))
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
