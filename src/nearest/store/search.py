"""The searcher of a memory: over the indexes of its segments, those that can be as one."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nearest.index.approximate import ApproximateIndex
from nearest.index.building import joined
from nearest.index.exact import ExactIndex
from nearest.index.gpu import GpuScan, SearchOn
from nearest.index.keys import Keys
from nearest.index.search import Backend, Searched, Searcher
from nearest.store.manifest import IndexRecord

if TYPE_CHECKING:
    from nearest.store.segment import Segment


def searcher_of(segments: "Sequence[Segment]", keys: Keys, search_on: SearchOn = "cpu") -> Searcher:
    """Read the indexes of segments, and join those that were filled from the same trained one.

    All segments that are scanned are scanned together. A memory that has grown by many additions
    so is searched about as quickly as one that was built at once.

    Args:
        segments: all that are searched; ids count through them.
        keys: of all of them.
        search_on: where. Indexes that FAISS does not search on GPUs, as those that `auto` builds,
            give way there to a scan of all keys, which is exact.

    Raises:
        SettingError: the GPU has no room.
    """
    bounds = np.cumsum([0, *(segment.record.tokens for segment in segments)]).tolist()
    together: dict[str, list[int]] = {}
    for number, segment in enumerate(segments):
        record = segment.record.index
        if record is not None and segment.searched_count:
            alone = "" if record.file is None else f"segment {number}"
            together.setdefault(record.filled_from or alone, []).append(number)
    alive = None
    if any(len(segment.removed) for segment in segments):
        alive = np.concatenate([segment.alive for segment in segments])
    return Searcher(
        [_searched(segments, numbers, bounds, keys, search_on) for numbers in together.values()],
        keys,
        alive,
    )


def _searched(
    segments: "Sequence[Segment]",
    numbers: list[int],
    bounds: list[int],
    keys: Keys,
    search_on: SearchOn,
) -> Searched:
    some = [(segments[number], bounds[number]) for number in numbers]
    backend: Backend | None = None
    if some[0][0].has_index:
        whole = joined([(segment.read_index(), first) for segment, first in some])
        index = ApproximateIndex(whole, keys.metric, _records(some)[0].nprobe)
        backend = index if search_on == "cpu" else index.on_gpu()
    if backend is None:
        ids = np.concatenate([segment.searched + first for segment, first in some])
        backend = (ExactIndex if search_on == "cpu" else GpuScan)(keys, ids)
    return Searched(
        backend,
        sum(segment.searched_count for segment, _ in some),
        max(record.margin for record in _records(some)),
        tuple((bounds[number], bounds[number + 1]) for number in numbers),
    )


def _records(some: "Iterable[tuple[Segment, int]]") -> list[IndexRecord]:
    return [one.record.index for one, _ in some if one.record.index is not None]
