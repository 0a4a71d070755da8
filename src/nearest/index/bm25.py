"""Texts by the words that they share: BM25 over token ids."""

from typing import Any, Protocol, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int

from nearest.errors import require
from nearest.index.neighbours import NO_ENTRY, Neighbours, sort_nearest_first
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached

K1, B = 0.9, 0.4  # as Lucene's users take them for passages
_ROWS = 65_536


class TokenRows(Protocol):
    """Short texts as token ids, a row for each; −1 fills a row."""

    @property
    def largest(self) -> int:
        """The largest token id; −1 where there is none."""

    def __len__(self) -> int: ...

    def rows(self, ids: Int[np.ndarray, " q"]) -> Int[np.ndarray, "q m"]:
        """The tokens of some."""


class Bm25:
    """Okapi BM25 of a query and short texts, Lucene's variant.

    Distances are scores negated, so that smaller is nearer. A token that a query holds twice counts
    twice, as with bm25s and Lucene.
    """

    def __init__(self, database: TokenRows) -> None:
        self._database = database
        self._lengths = np.zeros(len(database), np.float32)
        frequency = np.zeros(database.largest + 1, np.int64)
        for start in range(0, len(database), _ROWS):
            rows = database.rows(np.arange(start, min(start + _ROWS, len(database))))
            held = rows >= 0
            self._lengths[start : start + len(rows)] = held.sum(1)
            ordered = np.sort(rows, axis=1)
            new = np.diff(ordered, axis=1, prepend=-2) != 0
            frequency += np.bincount(ordered[new & (ordered >= 0)], minlength=len(frequency))
        count = len(database)
        self._idf = np.log1p((count - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        mean = float(self._lengths.mean()) if count else 1.0
        self._norms = (K1 * (1 - B + B * self._lengths / mean)).astype(np.float32)
        self._retriever: Any = None

    def distances(
        self, queries: Int[np.ndarray, "q m"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Of chosen texts, float32; +inf for id −1."""
        found = np.full(ids.shape, np.inf, np.float32)

        def measure(part: slice) -> None:
            rows = self._database.rows(ids[part])
            _score(queries[part], rows, ids[part], self._idf, self._norms, found[part])

        in_threads(measure, len(ids))
        return found

    def search(self, queries: Int[np.ndarray, "q m"], k: int) -> Neighbours:
        """The k nearest texts of each query; ties in the random order of ids.

        Texts that share no token with the query are not found: id −1.

        Raises:
            NearestError: bm25s is not installed.
        """
        if self._retriever is None:
            self._retriever = self._indexed()
        k = min(k, len(self._database))
        ids = np.full((len(queries), k), NO_ENTRY, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        for row, query in enumerate(queries):
            known = query[(query >= 0) & (query < len(self._idf))]
            scores = self._retriever.get_scores_from_ids([int(token) for token in known])
            scores = np.asarray(scores, dtype=np.float32)
            least = np.partition(scores, len(scores) - k)[len(scores) - k] if len(scores) else 0
            near = np.flatnonzero(scores >= max(least, np.finfo(np.float32).tiny))
            found = sort_nearest_first(Neighbours(near[None], -scores[near][None]), k)
            ids[row, : found.ids.shape[1]] = found.ids[0]
            distances[row, : found.ids.shape[1]] = found.distances[0]
        return Neighbours(ids, distances)

    def _indexed(self) -> Any:
        require("bm25s", "passages")
        import bm25s

        rows = self._database.rows(np.arange(len(self._database)))
        corpus = [row[row >= 0].tolist() for row in rows]
        retriever = bm25s.BM25(k1=K1, b=B, method="lucene")
        vocabulary = {token: token for token in range(len(self._idf))}
        retriever.index((corpus, vocabulary), show_progress=False, create_empty_token=False)
        return retriever


@no_type_check
@numba.njit(cache=code_can_be_cached(), nogil=True)
def _score(queries: Any, rows: Any, ids: Any, idf: Any, norms: Any, out: Any) -> None:
    for q in range(len(queries)):
        for column in range(ids.shape[1]):
            chunk = ids[q, column]
            if chunk < 0:
                continue
            total = np.float32(0)
            for token in queries[q]:
                if token < 0 or token >= len(idf):
                    continue
                count = 0
                for other in rows[q, column]:
                    count += other == token
                if count:
                    total += idf[token] * count / (count + norms[chunk])
            out[q, column] = -total
