"""Drafts for rows that advance together, as long as they pay.

Each row drafts from its request's memories and from its own text; one pass verifies them all, as
wide as pays for the rows together. What a pass costs depends on how many rows it has, so that each
number of rows has its own experience.
"""

import time
from collections.abc import Sequence

import numpy as np

from nearest.models.drafting import LEAST, Experience, PassTimes
from nearest.retrieval.drafts import LONGEST, NO_DRAFT, Draft, draft, pooled
from nearest.serve.work import Row

_MOST_LOGITS = 1 << 24  # numbers, 64 MB, of a pass


class Drafts:
    """Finds drafts for the rows of a pass, and learns from what became of them."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._known: dict[int, Experience] = {}  # by the number of rows
        self._began = self._looking = 0.0

    def find(self, rows: Sequence[Row]) -> list[Draft]:
        """A draft for each row, which may be empty."""
        began = time.perf_counter()
        experience = self._of(len(rows))
        found = [NO_DRAFT] * len(rows)
        if experience.times.known and not experience.resting:
            most = min(LONGEST, _MOST_LOGITS // (len(rows) * self._vocabulary) - 1)
            found = [_draft(row, most) for row in rows]
            rates = pooled([experience.acceptance.rates(one.classes) for one in found])
            length = experience.length(rates)
            found = [one.first(length) for one in found]
        self._began = time.perf_counter()
        self._looking = self._began - began
        return found

    def least(self, rows: int) -> int:
        """Tokens to which the drafts of so many rows are filled up."""
        return self._of(rows).times.least

    def _of(self, rows: int) -> Experience:
        if rows not in self._known:
            least = max(1, -(-(1 + LEAST) // rows) - 1)  # as many numbers to multiply in all
            self._known[rows] = Experience(times=PassTimes(least))
        return self._known[rows]

    def saw(self, found: Sequence[Draft], accepted: Sequence[int]) -> None:
        """So many tokens of each draft were what the row wrote."""
        seconds = time.perf_counter() - self._began
        self._known[len(found)].saw(found, accepted, seconds, self._looking)


def _draft(row: Row, most: int) -> Draft:
    memories = [lookup.memory for lookup, _ in row.work.ensemble.used]
    most = min(most, row.work.wanted.max_tokens - row.new - 1)
    if most < 1 or not memories:
        return NO_DRAFT
    return draft(memories, np.array(row.tokens, dtype=np.int64), most)
