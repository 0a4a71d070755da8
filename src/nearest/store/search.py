"""The indexes of a memory's segments, those that can be as one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex, joined
from nearest.index.exact import ExactIndex
from nearest.index.gpu import GpuScan, SearchOn
from nearest.index.keys import Keys
from nearest.index.live import LiveIndex
from nearest.index.neighbours import MeasuringIndex
from nearest.store.manifest import IndexRecord
from nearest.store.segment import Segment


@dataclass(frozen=True)
class JointIndex:
    """What searches some segments at once.

    Attributes:
        index: whose ids count through the whole memory.
        owned: entries [first, stop) of each of its segments.
        entries: how many it can find.
        margin: so many more are to be fetched before they are re-ranked by their keys.
        most: how many can be fetched at once, where they are searched.
    """

    index: MeasuringIndex
    owned: tuple[tuple[int, int], ...]
    entries: int
    margin: int
    most: int

    def fetched(self, k: int, wanted: int) -> int:
        """How many to fetch for k neighbours: as many as are wanted, where they can be.

        Raises:
            SettingError: k are too many for FAISS on a GPU.
        """
        if self.most < min(k, self.entries):
            raise SettingError(
                f"{k:,} neighbours were asked for, and on a GPU FAISS finds {self.most:,} in "
                "lists: ask for fewer, or search on the CPU"
            )
        return min(wanted, self.most, self.entries)


def joint_indexes(
    segments: Sequence[Segment], keys: Keys, search_on: SearchOn = "cpu"
) -> list[JointIndex]:
    """Read the indexes of segments, and join those filled from the same trained one.

    What is scanned is scanned together. So a memory that has grown by many additions is searched
    about as quickly as one that was built at once.

    Args:
        segments: all of a memory.
        keys: of all of them.
        search_on: where. Of indexes that FAISS does not search on GPUs, as of those that `auto`
            builds, all keys are scanned there instead, which is exact.

    Raises:
        SettingError: an index has no form for GPUs.
    """
    bounds = np.cumsum([0, *(segment.record.tokens for segment in segments)]).tolist()
    together: dict[str, list[int]] = {}
    for number, segment in enumerate(segments):
        record = segment.record.index
        if record is not None and segment.searched_count:
            alone = "" if record.file is None else f"segment {number}"
            together.setdefault(record.filled_from or alone, []).append(number)
    return [_joint(segments, numbers, bounds, keys, search_on) for numbers in together.values()]


def _joint(
    segments: Sequence[Segment],
    numbers: list[int],
    bounds: list[int],
    keys: Keys,
    search_on: SearchOn,
) -> JointIndex:
    some = [segments[number] for number in numbers]
    first = [bounds[number] for number in numbers]
    entries = sum(segment.searched_count for segment in some)
    read = _read(some, first, keys, search_on)
    index: MeasuringIndex
    if read is None:
        searched: Int[np.ndarray, " s"] = np.concatenate(
            [one.searched + begin for one, begin in zip(some, first, strict=True)]
        )
        index = (ExactIndex if search_on == "cpu" else GpuScan)(keys, searched)
    elif any(len(one.removed) for one in some):
        gone = np.concatenate([segment.gone for segment in segments])
        index = LiveIndex(read, read.most, gone)
    else:
        index = read
    return JointIndex(
        index,
        tuple((bounds[number], bounds[number + 1]) for number in numbers),
        entries,
        max(record.margin for record in _records(some)),
        entries if read is None else read.most,
    )


def _read(
    some: Sequence[Segment], first: Sequence[int], keys: Keys, search_on: SearchOn
) -> ApproximateIndex | None:
    """The indexes of some segments as one, where it is searched; None: their keys are scanned."""
    if not some[0].has_index:
        return None
    whole = joined([(one.read_index(), begin) for one, begin in zip(some, first, strict=True)])
    index = ApproximateIndex(whole, keys.metric, _records(some)[0].nprobe)
    return index if search_on == "cpu" else index.on_gpu()


def _records(segments: Iterable[Segment]) -> list[IndexRecord]:
    return [one.record.index for one in segments if one.record.index is not None]
