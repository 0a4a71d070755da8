"""Candidate entries of a prediction, from every kind of retrieval."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.index.neighbours import NO_ENTRY

MEMORY_KINDS = ("dense", "pointers", "suffix")
KINDS = (*MEMORY_KINDS, "text")  # and earlier places of the text itself


class Candidates(NamedTuple):
    """Candidate entries, one row a query; columns of one kind are contiguous, in KINDS' order.

    A row with fewer entries of a kind is padded: id and value -1, distance +inf, length 0. A place
    of the text itself is no entry: its id is -1, its distance 0.
    """

    ids: Int[np.ndarray, "q c"]  # int64
    values: Int[np.ndarray, "q c"]  # int64, the token that follows each entry
    distances: Float[np.ndarray, "q c"]  # float32; all 0 in a memory without keys
    lengths: Int[np.ndarray, "q c"]  # int16, tokens of left context shared with the query
    columns: tuple[int, ...]  # how many columns each kind has; kinds at the end may be left out
    searched: Bool[np.ndarray, " q"]  # whether the dense search was made
    # float32: of how many entries each stands for; None where each stands for itself
    log_counts: Float[np.ndarray, "q c"] | None = None

    @classmethod
    def joined(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """The candidates of several calls as those of one."""
        if len(parts) == 1:
            return parts[0]
        widths = np.array([part.columns for part in parts])
        columns = widths.max(axis=0)
        places = [_spread(own, columns) for own in widths]
        count = sum(len(part.ids) for part in parts)

        def wide(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
            whole = np.full((count, columns.sum()), fill, dtype=arrays[0].dtype)
            row = 0
            for array, own in zip(arrays, places, strict=True):
                whole[row : row + len(array), own] = array
                row += len(array)
            return whole

        log_counts = [part.log_counts for part in parts if part.log_counts is not None]
        return cls(
            wide([part.ids for part in parts], NO_ENTRY),
            wide([part.values for part in parts], NO_ENTRY),
            wide([part.distances for part in parts], np.inf),
            wide([part.lengths for part in parts], 0),
            tuple(columns.tolist()),
            np.concatenate([part.searched for part in parts]),
            wide(log_counts, 0) if log_counts else None,
        )

    def rows(self, rows: slice | Int[np.ndarray, " r"] | Bool[np.ndarray, " q"]) -> "Candidates":
        """The candidates of some queries."""
        return Candidates(
            self.ids[rows],
            self.values[rows],
            self.distances[rows],
            self.lengths[rows],
            self.columns,
            self.searched[rows],
            None if self.log_counts is None else self.log_counts[rows],
        )

    def beside(
        self, values: Int[np.ndarray, "q places"], lengths: Int[np.ndarray, "q places"]
    ) -> "Candidates":
        """With places of the text itself, of which those without a value are none."""
        distances = np.where(values < 0, np.float32(np.inf), np.float32(0))
        log_counts = self.log_counts
        if log_counts is not None:
            log_counts = np.concatenate([log_counts, np.zeros_like(distances)], axis=1)
        return Candidates(
            np.concatenate([self.ids, np.full_like(values, NO_ENTRY)], axis=1),
            np.concatenate([self.values, values], axis=1),
            np.concatenate([self.distances, distances], axis=1),
            np.concatenate([self.lengths, lengths], axis=1),
            (*self.columns, values.shape[1]),
            self.searched,
            log_counts,
        )

    def without(self, gone: Bool[np.ndarray, "q c"]) -> "Candidates":
        """With nothing in the places of some candidates."""
        part = Part(self.ids, self.distances, self.lengths).without(gone)
        return self._replace(values=np.where(gone, NO_ENTRY, self.values), **part._asdict())

    def of(self, *kinds: str) -> slice:
        """The columns of one kind, or of kinds that are adjacent in KINDS."""
        return columns_of(self.columns, *kinds)

    def has(self, kind: str) -> Bool[np.ndarray, " q"]:
        """Which queries have a candidate of this kind."""
        found: Bool[np.ndarray, " q"] = (self.ids[:, self.of(kind)] != NO_ENTRY).any(axis=1)
        return found


def columns_of(columns: tuple[int, ...], *kinds: str) -> slice:
    """Where candidates of these kinds stand, if there are so many columns of each."""
    first, last = KINDS.index(kinds[0]), KINDS.index(kinds[-1])
    return slice(sum(columns[:first]), sum(columns[: last + 1]))


@lru_cache(maxsize=256)
def spans_of(
    columns: tuple[int, ...], groups: tuple[tuple[str, ...], ...]
) -> Int[np.ndarray, "2 n"]:
    """Where the columns of each group of adjacent kinds begin and end; as `columns_of`."""
    spans = [columns_of(columns, *kinds) for kinds in groups]
    return np.array([(span.start, span.stop) for span in spans], np.int64).reshape(-1, 2).T.copy()


def _spread(
    own: Int[np.ndarray, " kinds"], columns: Int[np.ndarray, " kinds"]
) -> Int[np.ndarray, " c"]:
    """Where columns, so many `own` of each kind, stand among `columns` of each."""
    begun = np.cumsum(columns) - columns
    return np.concatenate(
        [first + np.arange(count) for first, count in zip(begun, own, strict=True)]
    )


class Part(NamedTuple):
    """The candidates of one kind; see Candidates."""

    ids: Int[np.ndarray, "q c"]
    distances: Float[np.ndarray, "q c"]
    lengths: Int[np.ndarray, "q c"]

    def rows(self, rows: slice) -> "Part":
        """The candidates of some queries."""
        return Part(self.ids[rows], self.distances[rows], self.lengths[rows])

    def without(self, gone: Bool[np.ndarray, "q c"]) -> "Part":
        """With nothing in the places of some candidates."""
        return Part(
            np.where(gone, NO_ENTRY, self.ids),
            np.where(gone, np.float32(np.inf), self.distances),
            np.where(gone, np.int16(0), self.lengths),
        )


def no_part(queries: int) -> Part:
    """An empty part, for a kind that was not looked up."""
    shape = queries, 0
    return Part(np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int16))


def side_by_side(parts: Sequence[Part]) -> Part:
    """Concatenate parts along the candidate axis."""
    wide = [part for part in parts if part.ids.shape[1]] or parts[:1]
    if len(wide) == 1:
        return wide[0]
    return Part(*(np.concatenate(arrays, axis=1) for arrays in zip(*wide, strict=True)))


def without_own(part: Part, own: Int[np.ndarray, " q"], most: int) -> Part:
    """Drop each query's own entry from a result of `most` + 1 candidates.

    Rows that do not contain it drop their last column instead.
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
    """Expand a part of the queries marked in `rows` to all n queries; other rows are empty."""
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
