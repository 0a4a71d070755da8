"""The entries that are weighed for a prediction, of whichever kind."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.index.neighbours import NO_ENTRY

KINDS = ("dense", "pointers", "suffix")


class Candidates(NamedTuple):
    """Entries of each query, a column each; a kind's columns stand together, in KINDS' order.

    Where a kind has fewer entries than columns for a query, the id and value are -1, the distance
    +inf and the length 0.
    """

    ids: Int[np.ndarray, "q c"]  # int64
    values: Int[np.ndarray, "q c"]  # int64, the token that follows each entry
    distances: Float[np.ndarray, "q c"]  # float32; all 0 in a memory without keys
    lengths: Int[np.ndarray, "q c"]  # int16, tokens of left context shared with the query
    columns: tuple[int, int, int]  # how many columns each kind has
    searched: Bool[np.ndarray, " q"]  # whether the dense search was made
    # float32: of how many entries each stands for; None where each stands for itself
    log_counts: Float[np.ndarray, "q c"] | None = None

    def rows(self, rows: slice | Int[np.ndarray, " r"] | Bool[np.ndarray, " q"]) -> "Candidates":
        """Those of some queries."""
        return Candidates(
            self.ids[rows],
            self.values[rows],
            self.distances[rows],
            self.lengths[rows],
            self.columns,
            self.searched[rows],
            None if self.log_counts is None else self.log_counts[rows],
        )

    def of(self, *kinds: str) -> slice:
        """The columns of neighbouring kinds, such as "dense" and "pointers"."""
        first, last = KINDS.index(kinds[0]), KINDS.index(kinds[-1])
        return slice(sum(self.columns[:first]), sum(self.columns[: last + 1]))

    def has(self, kind: str) -> Bool[np.ndarray, " q"]:
        """Whether anything of a kind was found."""
        found: Bool[np.ndarray, " q"] = (self.ids[:, self.of(kind)] != NO_ENTRY).any(axis=1)
        return found


class Part(NamedTuple):
    """The candidates of one kind; see Candidates."""

    ids: Int[np.ndarray, "q c"]
    distances: Float[np.ndarray, "q c"]
    lengths: Int[np.ndarray, "q c"]


def no_part(queries: int) -> Part:
    """No candidates, as of a kind that was not looked up."""
    shape = queries, 0
    return Part(np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int16))


def side_by_side(parts: Sequence[Part]) -> Part:
    """The columns of all parts."""
    wide = [part for part in parts if part.ids.shape[1]] or parts[:1]
    if len(wide) == 1:
        return wide[0]
    return Part(*(np.concatenate(arrays, axis=1) for arrays in zip(*wide, strict=True)))


def without_own(part: Part, own: Int[np.ndarray, " q"], most: int) -> Part:
    """Up to `most` entries a row, of `most` + 1 that were looked for: all but the query's own.

    A row that lacks its own loses its last.
    """
    if part.ids.shape[1] <= most:
        part = Part(
            *(
                np.pad(array, ((0, 0), (0, 1)), constant_values=fill)
                for array, fill in zip(part, (NO_ENTRY, np.inf, 0), strict=True)
            )
        )
    gone = (part.ids == own[:, None]) & (own >= 0)[:, None]
    gone[~gone.any(axis=1), -1] = True
    return Part(*(array[~gone].reshape(len(own), -1) for array in part))


def scattered(part: Part, rows: Bool[np.ndarray, " n"]) -> Part:
    """Parts of some queries as parts of all n; the other rows hold nothing."""
    if rows.all():
        return part
    shape = len(rows), part.ids.shape[1]
    whole = Part(
        np.full(shape, NO_ENTRY, np.int64),
        np.full(shape, np.inf, np.float32),
        np.zeros(shape, np.int16),
    )
    for everywhere, some in zip(whole, part, strict=True):
        everywhere[rows] = some
    return whole
