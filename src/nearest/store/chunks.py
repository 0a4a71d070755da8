"""The chunks of a whole memory and their vectors: ids count through all segments."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import FolderError
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import joined
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys, JoinedKeys, Keys
from nearest.index.neighbours import NO_ENTRY, Neighbours
from nearest.index.search import Searched, Searcher
from nearest.index.vectors import RERANKED
from nearest.store.parts.chunks import left_rows, not_made, vectors_of
from nearest.store.records import ChunksRecord
from nearest.store.segment import Segment

_BLOCK = 1 << 14  # vectors in memory at a time while they are written

Made = Callable[[int, int], np.ndarray]
"""The vectors of the chunks `missing[start:stop]`, [stop - start, dim]."""


class ChunkVectors:
    """The vectors of the chunks that are left of some segments, and their search.

    Attributes:
        rows: of each chunk, among the stored ones of all segments, ascending; a chunk's id is its
            place here, so that removing documents leaves no gap, and compacting changes no id.
    """

    def __init__(self, segments: Sequence[Segment], chunks: ChunksRecord) -> None:
        self._segments = segments
        self._stored = [vectors_of(segment, chunks) for segment in segments]
        self._bounds = np.cumsum([0, *map(len, self._stored)]).tolist()
        self._left = [left_rows(segment, chunks) for segment in segments]
        shifted = [left + first for left, first in zip(self._left, self._bounds, strict=False)]
        self.rows: Int[np.ndarray, " chunks"] = np.concatenate(shifted)

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.rows)

    @cached_property
    def vectors(self) -> Float[np.ndarray, "chunks dim"]:
        """All of them in the order of ids; mapped where one segment has lost nothing."""
        if len(self._stored) == 1 and len(self.rows) == len(self._stored[0]):
            return self._stored[0]
        pairs = zip(self._stored, self._left, strict=True)
        return np.concatenate([vectors[left] for vectors, left in pairs])

    def of(self, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """The vectors of some chunks, float32, read where they lie."""
        return self._keys.rows(self.rows[ids])

    @cached_property
    def missing(self) -> Int[np.ndarray, " _"]:
        """The ids of chunks that have no vector yet, ascending."""
        pairs = zip(self._stored, self._left, strict=True)
        return np.flatnonzero(np.concatenate([not_made(vectors)[left] for vectors, left in pairs]))

    def filled(
        self, made: Made, dtype: str
    ) -> list[tuple[int, Iterator[Float[np.ndarray, "rows dim"]]]]:
        """How many vectors each segment stores, and these in blocks, with those missing put in."""
        rows = self.rows[self.missing]

        def blocks(
            stored: Float[np.ndarray, "chunks dim"], begin: int
        ) -> Iterator[Float[np.ndarray, "rows dim"]]:
            for first in range(0, max(1, len(stored)), _BLOCK):
                old = stored[first : first + _BLOCK]
                start, stop = np.searchsorted(
                    rows, begin + first + np.array([0, len(old)])
                ).tolist()
                new = made(start, stop)
                block = np.full((len(old), new.shape[1]), np.nan, dtype)
                if old.shape[1]:
                    block[:] = old
                block[rows[start:stop] - begin - first] = new
                yield block

        pairs = zip(self._stored, self._bounds, strict=False)
        return [(len(stored), blocks(stored, begin)) for stored, begin in pairs]

    @property
    def indexed(self) -> bool:
        """Whether every segment says how its chunks are searched."""
        return all(segment.record.chunk_index is not None for segment in self._segments)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The ids of the k nearest chunks of each query, fewer columns where there are fewer.

        Squared L2 distances by the stored vectors; ties in the random order of rows.
        """
        found = self._found(queries, k)
        ids = np.searchsorted(self.rows, found.ids)
        return Neighbours(np.where(found.ids < 0, NO_ENTRY, ids), found.distances)

    def rows_found(self, queries: Float[np.ndarray, "q dim"], k: int) -> Int[np.ndarray, " found"]:
        """The stored rows that a search finds, as the index gives them: what `verify` looks at."""
        ids = self._found(queries, k).ids
        return ids[ids != NO_ENTRY] if len(self.rows) else np.empty(0, np.int64)

    def _found(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        return self._searcher.search(np.ascontiguousarray(queries, dtype=np.float32), k)

    @cached_property
    def _keys(self) -> Keys:
        parts = [FloatKeys(vectors, "l2") for vectors in self._stored]
        return parts[0] if len(parts) == 1 else JoinedKeys(parts, self._bounds)

    @cached_property
    def _searcher(self) -> Searcher:
        alive = None
        if len(self.rows) < self._bounds[-1]:
            alive = np.zeros(self._bounds[-1], dtype=bool)
            alive[self.rows] = True
        searched = [
            self._searched(segment, left, first, self._keys)
            for segment, left, first in zip(
                self._segments, self._left, self._bounds[:-1], strict=True
            )
            if len(left)
        ]
        return Searcher(searched, self._keys, alive)

    def _searched(
        self, segment: Segment, left: Int[np.ndarray, " left"], first: int, keys: Keys
    ) -> Searched:
        made = segment.record.chunk_index
        if made is None:
            raise FolderError(
                f"the chunks of segment {segment.record.name} have no index: run `nearest retro "
                "index`"
            )
        index = segment.read_chunk_index()
        if index is None:
            return Searched(ExactIndex(keys, left + first), len(left), RERANKED)
        whole = ApproximateIndex(joined([(index, first)]), "l2", made.nprobe)
        return Searched(whole, len(left), RERANKED)
