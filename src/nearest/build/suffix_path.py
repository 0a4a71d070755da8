"""The suffix array of a segment: entries by their reversed left context."""

import numpy as np
from jaxtyping import Int

from nearest.build.new_segment import NewSegment
from nearest.index.suffix import sort_suffixes
from nearest.store.manifest import SegmentRecord
from nearest.store.segment import Segment, valued_mask


def write(new: NewSegment, record: SegmentRecord) -> SegmentRecord:
    """Sort the entries."""
    new.plan.progress("suffix array", 0, record.entries)
    suffixes = sort_suffixes(new.tokens, valued_mask(new.offsets))
    file = new.write("suffix.npy", suffixes)
    new.plan.progress("suffix array", record.entries, record.entries)
    return record.with_files({"suffixes": file})


def reachable(segment: Segment) -> Int[np.ndarray, "_"]:
    """What a match can find."""
    return segment.suffixes


def problems(segment: Segment) -> list[str]:
    """Whether the array holds every entry once, and in order.

    Of two neighbours in it, the first has the lower token; or the tokens are equal, and the entry
    before the first stands before the one before the second. The order of documents' starts says
    nothing.
    """
    suffixes, tokens = segment.stored_suffixes, segment.tokens
    if not np.array_equal(np.sort(suffixes), segment.stored_entries):
        return ["the suffix array does not hold every entry once"]
    rank = np.full(len(tokens), -1)
    rank[suffixes] = np.arange(len(suffixes))
    first, second = suffixes[:-1], suffixes[1:]
    starts = np.zeros(len(tokens), dtype=bool)
    starts[segment.offsets[:-1]] = True
    rising = starts[first] | starts[second] | (rank[first - 1] < rank[second - 1])
    equal = tokens[first] == tokens[second]
    if not np.where(equal, rising, tokens[first] < tokens[second]).all():
        return ["the suffix array is not in order"]
    return []
