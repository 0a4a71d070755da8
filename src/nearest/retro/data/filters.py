"""Which of the chunks that a search found may not be neighbours, and why.

A neighbour that repeats what is to be predicted teaches a model to copy, and makes an evaluation
worthless: chunks of the same document, of copies of it, and of passages quoted at length.
"""

from dataclasses import dataclass
from typing import Any, Literal, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Int, UInt8

from nearest.errors import SettingError
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached
from nearest.retro.data.chunks import PADDING, Chunks, owners

KEPT = 0
REASONS = ("same_document", "not_older", "common_run", "common_ngrams")
"""Why a candidate is struck out, numbered from 1 in this order; the first that holds counts."""

Dates = Literal["any", "older"]


@dataclass(frozen=True)
class Filters:
    """What may be no neighbour.

    Attributes:
        same_document: strike out chunks of the query's document, and of others with the same text.
        longest_run: strike out candidates that share so many tokens in a row with the query: both
            with what follows them (MassiveDS takes 32 words); 0: none.
        ngram, jaccard: strike out candidates whose n-grams are the query's up to this Jaccard
            similarity or above, what follows both included; ngram 0: none.
        dates: "older" strikes out what is not older than the query's document, or has no date.

    Raises:
        SettingError: a number is out of its range.
    """

    same_document: bool = True
    longest_run: int = 0
    ngram: int = 0
    jaccard: float = 0.8
    dates: Dates = "any"

    def __post_init__(self) -> None:
        if self.longest_run < 0 or self.ngram < 0:
            raise SettingError("longest_run and ngram count tokens: give 0 or more")
        if not 0 < self.jaccard <= 1:
            raise SettingError(f"jaccard must lie in (0, 1], got {self.jaccard}")
        if self.dates not in ("any", "older"):
            raise SettingError(f"dates {self.dates!r} is unknown: choose any or older")


class Judge:
    """Says of candidates why they may be no neighbours; knows the queries and the database."""

    def __init__(self, queries: Chunks, database: Chunks, filters: Filters) -> None:
        self.queries = queries
        self.database = database
        self.filters = filters
        self._owner, self._their_owner = owners(queries, database)
        self._day = _days(queries) if filters.dates == "older" else None
        self._their_day = _days(database) if filters.dates == "older" else None

    def __call__(
        self, query_ids: Int[np.ndarray, " q"], candidates: Int[np.ndarray, "q k"]
    ) -> UInt8[np.ndarray, "q k"]:
        """The reason's number for each candidate, KEPT where there is none or it is −1."""
        filters, found = self.filters, np.zeros(candidates.shape, np.uint8)
        held = candidates != PADDING
        own = self.queries.document_of(query_ids)[:, None]
        other = np.maximum(self.database.document_of(candidates), 0)
        if filters.same_document:
            found[held & (self._their_owner[other] == self._owner[own])] = 1
        if self._day is not None and self._their_day is not None:
            older = self._their_day[other] < self._day[own]  # NaT is never older
            found[held & (found == KEPT) & ~older] = 2
        if filters.longest_run or filters.ngram:
            self._strike_repetitions(query_ids, candidates, held, found)
        return found

    def _strike_repetitions(
        self,
        query_ids: Int[np.ndarray, " q"],
        candidates: Int[np.ndarray, "q k"],
        held: Bool[np.ndarray, "q k"],
        found: UInt8[np.ndarray, "q k"],
    ) -> None:
        rows, columns = np.nonzero(held & (found == KEPT))
        read = self.queries.rows(query_ids, continuation=1)

        def strike(part: slice) -> None:
            row, column = rows[part], columns[part]
            theirs = self.database.rows(candidates[row, column], continuation=1)
            if self.filters.longest_run:
                repeated = shares_run(read[row], theirs, self.filters.longest_run)
                found[row[repeated], column[repeated]] = 3
            if self.filters.ngram:
                kept = found[row, column] == KEPT
                alike = jaccard(read[row[kept]], theirs[kept], self.filters.ngram)
                alike = alike >= self.filters.jaccard
                found[row[kept][alike], column[kept][alike]] = 4

        in_threads(strike, len(rows))


def _days(chunks: Chunks) -> np.ndarray:
    """The date of each document, to the second; NaT where it is unknown."""
    days = np.empty(chunks.documents, "datetime64[s]")
    for number in range(chunks.documents):
        date = chunks.date(number)
        try:
            days[number] = np.datetime64(date or "NaT", "s")
        except ValueError as error:
            raise SettingError(
                f"document {chunks.name(number)!r} has the date {date!r}, which is not ISO 8601: "
                "write it as 2024-12-31"
            ) from error
    if np.isnat(days).all():
        raise SettingError(
            "no document has a date, so that none can be said to be older: give each a 'date' "
            "(ISO 8601) in its metadata, or leave this filter out"
        )
    return days


def shares_run(
    a: Int[np.ndarray, "pairs la"], b: Int[np.ndarray, "pairs lb"], length: int
) -> Bool[np.ndarray, " pairs"]:
    """Whether both rows of a pair hold the same `length` tokens in a row; −1 is no token."""
    return np.asarray(_shares_run(a, b, length))


@no_type_check
@numba.njit(cache=code_can_be_cached(), nogil=True)
def _shares_run(a: Any, b: Any, length: Any) -> Any:
    """Any such run of `a` holds a place i ≡ length − 1 (mod length): runs are grown from these."""
    found = np.zeros(len(a), np.bool_)
    for pair in range(len(a)):
        x, y = a[pair], b[pair]
        for i in range(length - 1, len(x), length):
            if found[pair]:
                break
            for j in range(len(y)):
                if x[i] < 0 or x[i] != y[j]:
                    continue
                back = 0
                while back < length and i - back > 0 and j - back > 0:
                    token = x[i - back - 1]
                    if token < 0 or token != y[j - back - 1]:
                        break
                    back += 1
                ahead = 0
                while i + ahead + 1 < len(x) and j + ahead + 1 < len(y):
                    token = x[i + ahead + 1]
                    if back + ahead + 1 >= length or token < 0 or token != y[j + ahead + 1]:
                        break
                    ahead += 1
                if back + ahead + 1 >= length:
                    found[pair] = True
                    break
    return found


def jaccard(a: Int[np.ndarray, "pairs la"], b: Int[np.ndarray, "pairs lb"], n: int) -> np.ndarray:
    """|A ∩ B| / |A ∪ B| of the sets of n-grams of each pair of rows; 0 where one has none.

    float64 [pairs]. n-grams are compared by 64-bit hashes.
    """
    return np.asarray(_jaccard(a, b, n))


@no_type_check
@numba.njit(cache=code_can_be_cached(), nogil=True)
def _grams(x: Any, n: Any) -> Any:
    """Sorted hashes of the n-grams without padding."""
    hashes = np.empty(max(len(x) - n + 1, 0), np.uint64)
    count = 0
    for i in range(len(x) - n + 1):
        value = np.uint64(14695981039346656037)
        whole = True
        for j in range(i, i + n):
            if x[j] < 0:
                whole = False
                break
            value = (value ^ np.uint64(x[j] + 1)) * np.uint64(1099511628211)
            value ^= value >> np.uint64(29)
        if whole:
            hashes[count] = value
            count += 1
    return np.unique(hashes[:count])


@no_type_check
@numba.njit(cache=code_can_be_cached(), nogil=True)
def _jaccard(a: Any, b: Any, n: Any) -> Any:
    found = np.zeros(len(a), np.float64)
    for pair in range(len(a)):
        x, y = _grams(a[pair], n), _grams(b[pair], n)
        i = j = both = 0
        while i < len(x) and j < len(y):
            if x[i] == y[j]:
                both += 1
                i += 1
                j += 1
            elif x[i] < y[j]:
                i += 1
            else:
                j += 1
        if both:
            found[pair] = both / (len(x) + len(y) - both)
    return found
