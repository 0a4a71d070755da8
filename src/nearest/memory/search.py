"""The indexes of a memory's segments, those that can be as one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from nearest.index.approximate import ApproximateIndex, build_index, joined
from nearest.index.exact import ExactIndex
from nearest.index.gpu import SearchOn
from nearest.index.keys import Keys
from nearest.index.live import LiveIndex
from nearest.index.neighbours import MeasuringIndex
from nearest.memory.manifest import IndexRecord
from nearest.memory.segment import Segment


@dataclass(frozen=True)
class JointIndex:
    """What searches some segments at once.

    Attributes:
        index: whose ids count through the whole memory.
        owned: entries [first, stop) of each of its segments.
        entries: how many it can find.
        margin: so many more are to be fetched before they are re-ranked by their keys.
    """

    index: MeasuringIndex
    owned: tuple[tuple[int, int], ...]
    entries: int
    margin: int


def joint_indexes(
    segments: Sequence[Segment], keys: Keys, search_on: SearchOn = "cpu"
) -> list[JointIndex]:
    """Read the indexes of segments, and join those filled from the same trained one.

    What is scanned is scanned together. So a memory that has grown by many additions is searched
    about as quickly as one that was built at once.

    Args:
        segments: all of a memory.
        keys: of all of them.
        search_on: where; on a GPU, what is scanned is copied there, too.

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
    index: MeasuringIndex
    if some[0].has_index:
        read = joined([(one.read_index(), begin) for one, begin in zip(some, first, strict=True)])
        index = _placed(ApproximateIndex(read, keys.metric, _records(some)[0].nprobe), search_on)
        if any(len(one.removed) for one in some):
            gone = np.concatenate([segment.gone for segment in segments])
            index = LiveIndex(index, index.entries, gone)
    else:
        searched: Int[np.ndarray, " s"] = np.concatenate(
            [one.searched + begin for one, begin in zip(some, first, strict=True)]
        )
        if search_on == "cpu":
            index = ExactIndex(keys, searched)
        else:
            flat = build_index(keys, searched, "Flat", np.random.default_rng(0))
            index = _placed(ApproximateIndex(flat, keys.metric), search_on)
    return JointIndex(
        index,
        tuple((bounds[number], bounds[number + 1]) for number in numbers),
        sum(segment.searched_count for segment in some),
        max(record.margin for record in _records(some)),
    )


def _placed(index: ApproximateIndex, search_on: SearchOn) -> ApproximateIndex:
    return index.on_gpu() if search_on == "gpu" else index


def _records(segments: Iterable[Segment]) -> list[IndexRecord]:
    return [one.record.index for one in segments if one.record.index is not None]
