"""Where the segments of a memory begin, and which of them one of several servers holds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from nearest.errors import SettingError

if TYPE_CHECKING:
    from nearest.store.manifest import SegmentRecord


def share_named(text: str, what: str = "part") -> tuple[int, int]:
    """Read "2/4", the second of four (SettingError if it is no such thing)."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise SettingError(f"{what} {text!r} is none: write i/n with i from 1 to n, such as 2/4")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Shard:
    """One of `of` runs of whole segments, of about as many tokens each; `number` counts from 1."""

    number: int
    of: int

    @staticmethod
    def parse(text: str) -> "Shard":
        """From "2/4", the second of four (SettingError if it is no such thing)."""
        return Shard(*share_named(text, "shard"))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def segments(self, tokens: Sequence[int]) -> range:
        """The numbers of its segments, of a memory whose segments have so many tokens each.

        All shards together hold every segment once, in order. A shard may hold none.
        """
        total, before, owners = sum(tokens), 0, []
        for count in tokens:
            # The shard in whose equal share of the tokens the middle of the segment lies.
            owners.append((2 * before + count) * self.of // (2 * total) + 1)
            before += count
        first = sum(owner < self.number for owner in owners)
        return range(first, first + owners.count(self.number))


def entry_bounds(records: "Sequence[SegmentRecord]") -> Int[np.ndarray, " segments_plus_1"]:
    """The first entry id of each segment, and the id after the last."""
    return np.cumsum([0, *(record.tokens for record in records)])


def document_bounds(records: "Sequence[SegmentRecord]") -> Int[np.ndarray, " segments_plus_1"]:
    """The first document's number of each segment, and how many documents there are."""
    return np.cumsum([0, *(record.documents - record.removed for record in records)])
