"""A segment that is being written: first its corpus, then its other parts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Integer

from nearest.corpus.tokens import TokenisedDocument
from nearest.index.building import check_spec
from nearest.index.choice import AUTO, bytes_an_entry
from nearest.index.keys import KeyFormat
from nearest.progress import Progress
from nearest.store.journal import Journal
from nearest.store.manifest import KeysRecord, Manifest, SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.parts import PARTS
from nearest.store.parts.corpus import StoredSources, open_corpus, write_corpus
from nearest.store.parts.index import IndexChoice
from nearest.store.parts.keys import KeyWriter
from nearest.store.segment import Segment

# What a segment takes while it is written decides how large one becomes: sorting suffixes takes 11
# bytes a token (16 with large vocabularies), and the codes of its index are filled in memory, in
# lists that take up to twice as much while they grow.
SEGMENT_TOKENS = 1 << 24
_INDEX_BYTES = 5 << 27

MakeKeys = Callable[["NewSegment", KeyFormat, KeyWriter], None]


@dataclass(frozen=True)
class SegmentPlan:
    """A segment to be written, and from what.

    Attributes:
        files: where.
        name: of the segment.
        manifest: what all segments share (the model, the format of keys, clusters), and the
            segments beside this one.
        choice: of its index.
        progress: told what is done.
        make_keys: writes the keys of new text; None where there are none, or they are copied.
        merged: the segments that this one replaces, in order; empty for new text.
        among_others: whether the memory has other segments beside it.
        journal: told what is on the disk, where the work can be gone on with.
    """

    files: NewFiles
    name: str
    manifest: Manifest
    choice: IndexChoice
    progress: Progress
    make_keys: MakeKeys | None = None
    merged: Sequence[Segment] = ()
    among_others: bool = False
    journal: Journal | None = None


@dataclass(frozen=True)
class NewSegment:
    """A segment whose corpus is written and whose other parts are to come.

    Attributes:
        plan: from what they are to be made.
        record: describes the corpus alone.
        tokens, offsets: as in `Segment`.
        choice: of the index.
        digest: SHA-256 of its documents.
        sources: what the encoder reads for each; None for models without one.
    """

    plan: SegmentPlan
    record: SegmentRecord
    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    choice: IndexChoice
    digest: str
    sources: StoredSources | None

    @property
    def files(self) -> NewFiles:
        """Where its files go."""
        return self.plan.files

    @property
    def batches_written(self) -> int:
        """How many batches of keys an interrupted build has left."""
        return 0 if self.plan.journal is None else self.plan.journal.stage.batches

    def opened(self, record: SegmentRecord) -> Segment:
        """Open it as far as `record` describes it."""
        return Segment(self.files.root, self.plan.manifest, record)

    def others(self) -> Iterator[Segment]:
        """Open the segments beside it, one at a time."""
        return map(self.opened, self.plan.manifest.segments)


def segment_tokens(keys: KeysRecord | None) -> int:
    """Tokens after which a memory with such keys begins another segment."""
    if keys is None or keys.index != AUTO:
        return SEGMENT_TOKENS
    return min(SEGMENT_TOKENS, _INDEX_BYTES // bytes_an_entry(keys.stored_dim))


def begin_segment(plan: SegmentPlan, documents: Iterable[TokenisedDocument]) -> NewSegment:
    """Write the corpus of a segment.

    Raises:
        CorpusError: there is no document, or no token that follows another.
        SettingError: the index does not fit them.
    """
    record, digest = write_corpus(
        plan.files, plan.name, plan.manifest.model, documents, plan.progress
    )
    return reopen_segment(plan, record, digest)


def reopen_segment(plan: SegmentPlan, record: SegmentRecord, digest: str) -> NewSegment:
    """A segment whose corpus was written before, as far as `record` describes it."""
    paths = {kind: plan.files.root / file.path for kind, file in record.files.items()}
    corpus = open_corpus(paths, plan.manifest, record)
    choice, keys = plan.choice, plan.manifest.keys
    if keys is not None:
        if plan.among_others:
            choice = choice.among_others(keys.stored_dim, record.entries)
        check_spec(choice.spec, keys.stored_dim, choice.nprobe, record.entries)
    return NewSegment(plan, record, corpus.tokens, corpus.offsets, choice, digest, corpus.sources)


def write_parts(new: NewSegment) -> SegmentRecord:
    """Write the parts of a segment that are not there yet; nothing refers to it before a publish.

    Raises:
        NearestError: keys or index cannot be used.
    """
    record, journal = new.record, new.plan.journal
    done = [] if journal is None else list(journal.stage.done)
    for part in PARTS:
        if part.name not in done:
            record = part.write(new, record)
            done.append(part.name)
            if journal is not None:
                journal.note(current=record, done=list(done), batches=0)
    return record


def write_segment(plan: SegmentPlan, documents: Iterable[TokenisedDocument]) -> SegmentRecord:
    """Write a segment of documents with all its parts (raises as its two halves do)."""
    return write_parts(begin_segment(plan, documents))


def merge_segments(plan: SegmentPlan) -> SegmentRecord:
    """Write one segment of what is left of `plan.merged`."""

    def documents() -> Iterator[TokenisedDocument]:
        for segment in plan.merged:
            for number in segment.numbers.tolist():
                document = segment.documents[number]
                yield TokenisedDocument(
                    document, segment.tokens_of(number), segment.source_of(number)
                )

    return write_segment(plan, documents())
