"""The searcher of a memory: over the indexes of its segments, those that can be as one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nearest.index.approximate import ApproximateIndex
from nearest.index.building import joined
from nearest.index.exact import ExactIndex
from nearest.index.gpu import GpuScan, SearchOn
from nearest.index.keys import Keys
from nearest.index.search import Backend, Searched, Searcher
from nearest.index.together import TogetherIndex
from nearest.store.manifest import IndexRecord
from nearest.store.shard import entry_bounds

if TYPE_CHECKING:
    from nearest.store.segment import Segment

    _Located = tuple[Segment, int]

_SCANNED = "scanned"
_REST = 4  # times as large as what is searched beside it, an index that is held must be


Filled = tuple[tuple[str, int | None, int], ...]
"""Of the segments whose indexes were joined: each one's checksum, nprobe and first id."""
Held = Mapping[Filled, ApproximateIndex]
"""Indexes in RAM."""


def searcher_of(
    segments: "Sequence[Segment]",
    keys: Keys,
    search_on: SearchOn = "cpu",
    held: "Held | None" = None,
    first: int = 0,
) -> tuple[Searcher, Held]:
    """Read the indexes of segments, and join those that were filled from the same trained one.

    All segments that are scanned are scanned together. A memory that has grown by many additions
    so is searched about as quickly as one that was built at once.

    Args:
        segments: all that are searched.
        keys: of all of them.
        search_on: where. Indexes that FAISS does not search on GPUs, as those that `auto` builds,
            give way there to a scan of all keys, which is exact.
        held: indexes that an earlier snapshot has in RAM; they are used where they hold most of
            the entries of one that is searched.
        first: id of the first entry; ids count through the segments.

    Returns:
        The searcher, and the indexes that it holds.

    Raises:
        SettingError: the GPU has no room.
    """
    bounds = (first + entry_bounds([segment.record for segment in segments])).tolist()
    together: dict[str, list[int]] = {}
    for number, segment in enumerate(segments):
        record = segment.record.index
        if record is not None and segment.searched_count:
            alone = _SCANNED if record.file is None else f"segment {segment.record.name}"
            together.setdefault(record.filled_from or alone, []).append(number)
    alive = None
    if any(len(segment.removed) for segment in segments):
        alive = np.zeros(bounds[-1], dtype=bool)
        for segment, start, stop in zip(segments, bounds[:-1], bounds[1:], strict=True):
            alive[start:stop] = segment.alive
    parts: dict[Filled, ApproximateIndex] = {}
    searched = [
        _searched(name, [(segments[n], bounds[n]) for n in own], keys, search_on, held or {}, parts)
        for name, own in together.items()
    ]
    return Searcher(searched, keys, alive), parts


def _searched(
    name: str,
    some: "Sequence[_Located]",
    keys: Keys,
    search_on: SearchOn,
    held: Held,
    parts: dict[Filled, ApproximateIndex],
) -> Searched:
    backend: Backend | None = None
    if some[0][0].has_index:
        if search_on == "cpu":
            backend = _on_cpu(some, keys, held, parts)
        else:
            backend = _joined(some, keys).on_gpu()
    if backend is None:
        ids = np.concatenate([segment.searched + first for segment, first in some])
        backend = (ExactIndex if search_on == "cpu" else GpuScan)(keys, ids)
    return Searched(
        backend,
        sum(segment.searched_count for segment, _ in some),
        max(record.margin for record in _records(some)),
        tuple((first, first + segment.record.tokens) for segment, first in some),
        name,
    )


def _on_cpu(
    some: "Sequence[_Located]", keys: Keys, held: Held, parts: dict[Filled, ApproximateIndex]
) -> Backend:
    """The joined index; beside one that is held and has most of the entries, the rest alone."""
    filled = tuple(
        (record.file.sha256, record.nprobe, first)
        for record, (_, first) in zip(_records(some), some, strict=True)
        if record.file is not None
    )
    for known in sorted(held, key=len, reverse=True):
        most = held[known]
        if filled[: len(known)] == known:
            rest = some[len(known) :]
            if _REST * sum(record.entries for record in _records(rest)) > most.entries:
                continue
            parts[known] = most
            if not rest:
                return most
            return TogetherIndex([most, _joined(rest, keys)], [some[0][1], rest[0][1]])
    parts[filled] = whole = _joined(some, keys)
    return whole


def _joined(some: "Sequence[_Located]", keys: Keys) -> ApproximateIndex:
    whole = joined([(segment.read_index(), first) for segment, first in some])
    return ApproximateIndex(whole, keys.metric, _records(some)[0].nprobe)


def _records(some: "Iterable[_Located]") -> list[IndexRecord]:
    return [one.record.index for one, _ in some if one.record.index is not None]
