"""A corpus in segments of bounded size: a pure function of the documents and of that size."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace

import msgspec

from nearest.corpus.tokens import TokenisedDocument
from nearest.errors import CorpusError
from nearest.progress import Progress
from nearest.store.change import Change
from nearest.store.documents import document_line
from nearest.store.journal import CorpusRecord, Journal
from nearest.store.manifest import SegmentRecord
from nearest.store.new_files import segment_files
from nearest.store.new_segment import SegmentPlan, segment_tokens, tokens_a_segment, write_segment
from nearest.store.parts.corpus import write_corpus


def in_segments(
    documents: Iterator[TokenisedDocument], tokens: int
) -> Iterator[Iterator[TokenisedDocument]]:
    """Runs of whole documents of at least so many tokens, but for the last; each is read in turn.

    Every run but the first begins with a document that has an entry.

    >>> from nearest.corpus.documents import Document
    >>> import numpy as np
    >>> documents = (TokenisedDocument(Document("", ""), np.arange(n)) for n in (3, 4, 1, 5))
    >>> [[len(item.tokens) for item in run] for run in in_segments(documents, 6)]
    [[3, 4, 1], [5]]
    """
    following = next(documents, None)

    def run() -> Iterator[TokenisedDocument]:
        nonlocal following
        taken = 0
        while following is not None and not (taken >= tokens and len(following.tokens) > 1):
            item, following = following, next(documents, None)
            taken += len(item.tokens)
            yield item

    while following is not None:
        yield run()


def write_corpora(
    journal: Journal, documents: Iterator[TokenisedDocument], progress: Progress
) -> None:
    """Write the corpora of all segments that this part of the build has, going on where it was.

    Raises:
        CorpusError: there are no documents, or none with a token that follows another.
    """
    stage = journal.stage
    part, parts = stage.part
    limit = segment_tokens(stage.keys, stage.segment_tokens)
    for run in in_segments(documents, limit):
        corpora = journal.stage.corpora
        if len(corpora) % parts == part - 1:
            files = segment_files(journal.folder, f"{len(corpora) + 1:06d}")
            shutil.rmtree(files.path(""), ignore_errors=True)
            record, digest = write_corpus(files, files.path("").name, stage.model, run, progress)
            found = CorpusRecord(record.documents, digest, record.entries, record)
        else:
            found = _counted(run)
        journal.note(corpora=[*corpora, found])
    if not journal.stage.corpora:
        raise CorpusError("the corpus holds no documents: give it at least one")
    journal.note(whole=True)


def _counted(documents: Iterable[TokenisedDocument]) -> CorpusRecord:
    """Describe a segment's documents without writing them."""
    digest, count, entries = hashlib.sha256(), 0, 0
    for item in documents:
        digest.update(document_line(item.document))
        count, entries = count + 1, entries + len(item.tokens) - 1
    if not entries:
        raise CorpusError("the corpus holds no token that follows another: give it longer text")
    return CorpusRecord(count, digest.hexdigest(), entries, None)


def write_added(
    change: Change, plan: SegmentPlan, documents: Iterator[TokenisedDocument]
) -> list[SegmentRecord]:
    """Write documents that come to a memory, in segments as large as a build makes them.

    Raises:
        NearestError: documents, keys or index cannot be used.
    """
    added: list[SegmentRecord] = []
    for run in in_segments(documents, tokens_a_segment(plan.manifest)):
        segments = [*plan.manifest.segments, *added]
        manifest = msgspec.structs.replace(plan.manifest, segments=segments)
        name, files = change.new_segment(added)
        added.append(write_segment(replace(plan, files=files, name=name, manifest=manifest), run))
    return added
