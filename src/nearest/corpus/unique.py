"""Which ids a corpus has had, however many documents it has.

What is looked up are hashes of 64 bits, and they alone are held as they are; ids and places, of
which one is needed when two hashes are equal, are held compressed. So a document takes some 30
bytes, a tenth of its place in a dictionary.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32, UInt64

from nearest.corpus.documents import Document
from nearest.errors import CorpusError

_RUN = 1 << 14  # documents that are compressed together
_LEVEL = 1 << 18  # documents; merging takes three times as much for a moment


def with_unique_ids(documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents through, refusing the second of two that share an id, with both places."""
    seen = _SeenIds()
    for document in documents:
        first = seen.origin_of(document.id)
        if first is not None:
            raise CorpusError(
                f"document id {document.id!r} stands twice, in {first} and in "
                f"{document.origin}: ids must be unique; give them ids of their own, or remove one"
            )
        seen.add(document)
        yield document


def id_hash(document_id: str) -> np.uint64:
    """64 bits by which a document is found among many; equal ones are then compared as text."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


class _Level(NamedTuple):
    """The hashes of some runs, sorted, each with the number of its run."""

    hashes: UInt64[np.ndarray, " n"]
    runs: UInt32[np.ndarray, " n"]


class _SeenIds:
    """Ids with the places that messages name."""

    def __init__(self) -> None:
        self._recent: dict[str, str] = {}  # id → origin; becomes a run when it is full
        self._runs: list[bytes] = []
        self._levels: list[_Level] = []  # none smaller than the next

    def origin_of(self, document_id: str) -> str | None:
        """The place of the document with this id; None where there was none."""
        if document_id in self._recent:
            return self._recent[document_id]
        wanted = id_hash(document_id)
        for hashes, runs in self._levels:
            first = int(np.searchsorted(hashes, wanted))
            for at in range(first, len(hashes)):
                if hashes[at] != wanted:
                    break
                run = json.loads(zlib.decompress(self._runs[runs[at]]))
                if document_id in run:  # else another id has the same hash
                    origin: str = run[document_id]
                    return origin
        return None

    def add(self, document: Document) -> None:
        """Take a document's id down."""
        self._recent[document.id] = document.origin
        if len(self._recent) < _RUN:
            return
        hashes = np.sort(np.array([id_hash(name) for name in self._recent], np.uint64))
        self._levels.append(_Level(hashes, np.full(len(hashes), len(self._runs), np.uint32)))
        self._runs.append(zlib.compress(json.dumps(self._recent).encode()))
        self._recent = {}
        # A document is merged as often as their number has doubled.
        while self._mergeable:
            self._levels[-2:] = [_merged(*self._levels[-2:])]

    @property
    def _mergeable(self) -> bool:
        sizes = [len(level.hashes) for level in self._levels[-2:]]
        return len(sizes) > 1 and sizes[0] <= sizes[1] and sum(sizes) <= _LEVEL


def _merged(one: _Level, other: _Level) -> _Level:
    hashes = np.concatenate([one.hashes, other.hashes])
    order = np.argsort(hashes, kind="stable")  # quick for what is two sorted parts
    return _Level(hashes[order], np.concatenate([one.runs, other.runs])[order])
