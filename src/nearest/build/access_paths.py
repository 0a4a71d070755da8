"""Everything that a segment derives from its corpus: the one place where it is listed.

Whatever adds, compacts or verifies goes through this list, so that what stands in it cannot be
forgotten. A new access path needs four things:

- `write`: make its files for a new segment, from new text (`plan.encoder`) or out of the segments
  that it replaces (`plan.merged`), and describe them;
- a place in `Segment` where its files are opened and what was removed is left out;
- `reachable`: the entries that it leads to then, which `verify` compares with what was removed;
- `problems`: what is wrong with its files.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from nearest.build import cluster_path, index_path, key_path, suffix_path
from nearest.build.new_segment import NewSegment, SegmentPlan, write_corpus
from nearest.corpus.tokens import TokenisedDocument
from nearest.store.manifest import SegmentRecord
from nearest.store.segment import Segment


class AccessPath(NamedTuple):
    """One way to the entries of a segment."""

    name: str
    write: Callable[[NewSegment, SegmentRecord], SegmentRecord]
    reachable: Callable[[Segment], Int[np.ndarray, "_"]]
    problems: Callable[[Segment], list[str]]


# In the order in which they are written: an index needs keys.
ACCESS_PATHS = (
    AccessPath("suffix array", suffix_path.write, suffix_path.reachable, suffix_path.problems),
    AccessPath("keys", key_path.write, key_path.reachable, key_path.problems),
    AccessPath("index", index_path.write, index_path.reachable, index_path.problems),
    AccessPath("clusters", cluster_path.write, cluster_path.reachable, cluster_path.problems),
)


def write_segment(plan: SegmentPlan, documents: Iterable[TokenisedDocument]) -> SegmentRecord:
    """Write a segment of documents and all that is derived from them; nothing refers to it yet.

    Raises:
        NearestError: documents, keys or index cannot be used.
    """
    return write_access_paths(write_corpus(plan, documents))


def write_access_paths(new: NewSegment) -> SegmentRecord:
    """Write all that is derived from a segment's corpus and is not there yet."""
    record, journal = new.record, new.plan.journal
    done = [] if journal is None else list(journal.stage.done)
    for path in ACCESS_PATHS:
        if path.name not in done:
            record = path.write(new, record)
            done.append(path.name)
            if journal is not None:
                journal.note(current=record, done=list(done), batches=0)
    return record


def merge_segments(plan: SegmentPlan) -> SegmentRecord:
    """Write one segment of what is left of `plan.merged`; nothing refers to it yet."""

    def documents() -> Iterator[TokenisedDocument]:
        for segment in plan.merged:
            for number in segment.numbers.tolist():
                document = segment.stored_documents[number]
                yield TokenisedDocument(
                    document, segment.tokens_of(number), segment.source_of(number)
                )

    return write_segment(plan, documents())


def access_path_problems(segment: Segment) -> list[str]:
    """What is wrong with a segment's access paths, one sentence each."""
    problems = []
    for path in ACCESS_PATHS:
        found = path.problems(segment)
        problems += found
        if not found and len(segment.removed) and segment.gone[path.reachable(segment)].any():
            problems.append(f"the {path.name} leads to a document that was removed")
    return problems
