"""Where documents are stored, by their ids."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nearest.corpus.unique import id_hash
from nearest.errors import CorpusError
from nearest.store.snapshot import Snapshot


class Stored(NamedTuple):
    """Where a document is: the number of its segment, and its stored number in it."""

    segment: int
    number: int


class StoredIds:
    """The ids of all documents of a memory, sorted by their hashes once for all look-ups."""

    def __init__(self, memory: Snapshot) -> None:
        self.path = memory.path
        self._segments = memory.segments
        numbers = [segment.numbers for segment in memory.segments]
        hashes = [s.id_hashes[own] for s, own in zip(memory.segments, numbers, strict=True)]
        every = np.concatenate(hashes)
        order = np.argsort(every, kind="stable")
        self._hashes = every[order]
        self._segment = np.repeat(np.arange(len(numbers)), list(map(len, numbers)))[order]
        self._number = np.concatenate(numbers)[order]

    def has_hash_of(self, document_id: str) -> bool:
        """Whether a document has this id, or another with the same hash; reads no document."""
        wanted = id_hash(document_id)
        at = int(self._hashes.searchsorted(wanted))
        return at < len(self._hashes) and bool(self._hashes[at] == wanted)

    def find(self, ids: Sequence[str]) -> list[Stored | None]:
        """Where the document with each id is stored; None where there is none (any more).

        Documents are read in the order in which they are stored, for they are compressed together.
        """
        wanted = np.array([id_hash(document_id) for document_id in ids], self._hashes.dtype)
        start = self._hashes.searchsorted(wanted, "left")
        count = self._hashes.searchsorted(wanted, "right") - start
        row = np.repeat(np.arange(len(ids)), count)  # several where different ids have one hash
        at = np.arange(len(row)) - np.repeat(np.cumsum(count) - count - start, count)
        segment, number = self._segment[at], self._number[at]
        found: list[Stored | None] = [None] * len(ids)
        for one in np.lexsort((number, segment)).tolist():
            stored, i = Stored(int(segment[one]), int(number[one])), int(row[one])
            if self._segments[stored.segment].documents.has_id(stored.number, ids[i]):
                found[i] = stored
        return found

    def stored(self, ids: Sequence[str]) -> list[Stored]:
        """Like `find`, but raises CorpusError if a document is not there."""
        places = self.find(ids)
        if None in places:
            raise CorpusError(
                f"{self.path} has no document with the id {ids[places.index(None)]!r}: "
                "nothing was changed"
            )
        return [place for place in places if place is not None]
