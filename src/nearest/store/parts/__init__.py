"""The parts of a segment, one module each: corpus, suffix array, keys, index, clusters, chunks.

`PARTS` lists what is derived from a corpus, in the order in which it is written (an index needs
keys). Whatever builds, adds, merges, compacts or verifies goes through this list. From the layouts
follows which files a writer may delete, and a part cannot be forgotten by one of them.

A new part is a module here, in `PARTS`, with

- `LAYOUT`: the names of its files in a segment's folder, by the names that the manifest gives them;
- `open_…(paths, manifest, record)`: map its files; `Segment` calls it, so that a reader holds them
  open when a writer replaces them;
- `write(new, record)`: write its files for a new segment, from new text or from the segments that
  it merges (`new.plan.merged`), leave out what was removed, and return the record with the files;
- `served(segment)`: entries that it leads a reader to; `verify` finds removed ones among them;
- `check(segment)`: what is wrong with its files, one sentence each.

`gates` is no part of a segment: gates are small files of the memory, read whole when it is opened.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from nearest.store.manifest import SegmentRecord
from nearest.store.parts import chunks, clusters, corpus, gates, index, keys, suffix

if TYPE_CHECKING:
    from nearest.store.new_segment import NewSegment
    from nearest.store.segment import Segment


class Part(NamedTuple):
    """One way to the entries of a segment, by the name that journals and messages use."""

    name: str
    layout: Mapping[str, str]
    write: "Callable[[NewSegment, SegmentRecord], SegmentRecord]"
    served: "Callable[[Segment], Int[np.ndarray, ' _']]"
    check: "Callable[[Segment], list[str]]"


PARTS = (
    Part("suffix array", suffix.LAYOUT, suffix.write, suffix.served, suffix.check),
    Part("keys", keys.LAYOUT, keys.write, keys.served, keys.check),
    Part("index", index.LAYOUT, index.write, index.served, index.check),
    Part("clusters", clusters.LAYOUT, clusters.write, clusters.served, clusters.check),
    Part("chunks", chunks.LAYOUT, chunks.write, chunks.served, chunks.check),
)
SEGMENT_FILES = frozenset(corpus.LAYOUT.values()).union(*(part.layout.values() for part in PARTS))
SHARED_FILES = frozenset(keys.SHARED.values())
GATE_SUFFIX = gates.SUFFIX
