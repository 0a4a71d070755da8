"""The suffix array of a segment: entries sorted by their reversed left context."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from nearest.folder import open_array
from nearest.index.ids import position_dtype
from nearest.index.suffix import SuffixArray, sort_suffixes
from nearest.store.manifest import Manifest, SegmentRecord
from nearest.store.parts.corpus import Paths, valued_entries, valued_mask

if TYPE_CHECKING:
    from nearest.store.new_segment import NewSegment
    from nearest.store.segment import Segment

LAYOUT = {"suffixes": "suffix.npy"}


def open_suffixes(paths: Paths, _: Manifest, record: SegmentRecord) -> Int[np.ndarray, " entries"]:
    """Map the array (KeyError or FolderError where it is missing or not as recorded)."""
    return open_array(paths["suffixes"], position_dtype(record.tokens), (record.entries,))


def write(new: "NewSegment", record: SegmentRecord) -> SegmentRecord:
    """Sort the entries of a new segment, whether its text is new or merged."""
    new.plan.progress("suffix array", 0, record.entries)
    suffixes = sort_suffixes(new.tokens, valued_mask(new.offsets))
    file = new.files.write(LAYOUT["suffixes"], suffixes)
    new.plan.progress("suffix array", record.entries, record.entries)
    return record.with_files({"suffixes": file})


def suffix_array(segment: "Segment", first: int = 0) -> SuffixArray:
    """The suffix array to search, and which of its entries are alive."""
    alive = segment.alive if len(segment.removed) else None
    return SuffixArray(segment.tokens, segment.suffixes, first, alive)


def served(segment: "Segment") -> Int[np.ndarray, " _"]:
    """The entries that matches are found among."""
    array = suffix_array(segment)
    return array.positions(np.arange(array.size))


def check(segment: "Segment") -> list[str]:
    """Whether the array holds every entry once, in order.

    Two neighbours are in order if the first has the lower token, or if the tokens are equal and the
    entry before the first stands before the entry before the second. Documents' first entries have
    no such predecessor and are in any order.
    """
    suffixes, tokens = segment.suffixes, segment.tokens
    if not np.array_equal(np.sort(suffixes), valued_entries(segment.offsets)):
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
