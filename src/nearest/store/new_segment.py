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
from nearest.store.journal import TaskLog
from nearest.store.manifest import KeysRecord, Manifest, SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.parts import PARTS, Part
from nearest.store.parts.corpus import StoredSources, open_corpus, write_corpus
from nearest.store.parts.index import IndexChoice
from nearest.store.parts.keys import KeyWriter
from nearest.store.records import MachineRecord
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
        log: told how far the keys have come, where they can be gone on with.
        made_on: what computes the keys of new text.
    """

    files: NewFiles
    name: str
    manifest: Manifest
    choice: IndexChoice
    progress: Progress
    make_keys: MakeKeys | None = None
    merged: Sequence[Segment] = ()
    among_others: bool = False
    log: TaskLog | None = None
    made_on: MachineRecord | None = None


@dataclass(frozen=True)
class NewSegment:
    """A segment whose corpus is written and whose other parts are to come.

    Attributes:
        plan: from what they are to be made.
        record: describes the corpus alone.
        tokens, offsets: as in `Segment`.
        choice: of the index.
        sources: what the encoder reads for each; None for models without one.
    """

    plan: SegmentPlan
    record: SegmentRecord
    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    choice: IndexChoice
    sources: StoredSources | None

    @property
    def files(self) -> NewFiles:
        """Where its files go."""
        return self.plan.files

    @property
    def batches_written(self) -> int:
        """How many batches of keys an interrupted build has left."""
        return 0 if self.plan.log is None else self.plan.log.batches

    def opened(self, record: SegmentRecord) -> Segment:
        """Open it as far as `record` describes it."""
        return Segment(self.files.root, self.plan.manifest, record)

    def others(self) -> Iterator[Segment]:
        """Open the segments beside it, one at a time."""
        return map(self.opened, self.plan.manifest.segments)


def segment_tokens(keys: KeysRecord | None, asked: int | None = None) -> int:
    """Tokens after which a memory with such keys begins another segment, unless asked for."""
    if asked is not None:
        return asked
    if keys is None or keys.index != AUTO:
        return SEGMENT_TOKENS
    return min(SEGMENT_TOKENS, _INDEX_BYTES // bytes_an_entry(keys.stored_dim))


def tokens_a_segment(manifest: Manifest) -> int:
    """Tokens after which a memory begins another segment."""
    return segment_tokens(manifest.keys, manifest.segment_tokens)


def reopen_segment(plan: SegmentPlan, record: SegmentRecord) -> NewSegment:
    """A segment whose corpus is written, as far as `record` describes it.

    Raises:
        SettingError: the index does not fit it.
    """
    paths = {kind: plan.files.root / file.path for kind, file in record.files.items()}
    corpus = open_corpus(paths, plan.manifest, record)
    choice, keys = plan.choice, plan.manifest.keys
    if keys is not None:
        if plan.among_others:
            choice = choice.among_others(keys.stored_dim, record.entries)
        check_spec(choice.spec, keys.stored_dim, choice.nprobe, record.entries)
    return NewSegment(plan, record, corpus.tokens, corpus.offsets, choice, corpus.sources)


def write_parts(new: NewSegment, parts: Iterable[Part] = PARTS) -> SegmentRecord:
    """Write parts of a segment; nothing refers to it before a publish.

    Raises:
        NearestError: keys or index cannot be used.
    """
    record = new.record
    for part in parts:
        record = part.write(new, record)
    return record


def write_segment(plan: SegmentPlan, documents: Iterable[TokenisedDocument]) -> SegmentRecord:
    """Write a segment of documents with all its parts.

    Raises:
        CorpusError: there is no document, or no token that follows another.
        NearestError: keys or index cannot be used.
    """
    model = plan.manifest.model
    record, _ = write_corpus(plan.files, plan.name, model, documents, plan.progress)
    return write_parts(reopen_segment(plan, record))


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
