"""Which ids a corpus has had, in about 16 bytes a document."""

import hashlib
from array import array

import numpy as np

_SMALLEST = 1 << 10


def id_hash(document_id: str) -> np.uint64:
    """64 bits by which a document is found among many; equal ones are then compared as text."""
    return np.uint64(_hash(document_id))


def _hash(document_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")


class SeenIds:
    """A set of ids, kept as hashes of 64 bits in an open-addressing table at most half full.

    Two of four million different ids share a hash with a probability of 4e-7.
    """

    def __init__(self) -> None:
        self._slots = _zeros(_SMALLEST)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, document_id: str) -> bool:
        """Add an id; whether it is new."""
        value = _hash(document_id) or 1  # 0 marks an empty slot
        if not _insert(self._slots, value):
            return False
        self._count += 1
        if 2 * self._count > len(self._slots):
            larger = _zeros(2 * len(self._slots))
            for held in self._slots:
                if held:
                    _insert(larger, held)
            self._slots = larger
        return True


def _zeros(count: int) -> "array[int]":
    return array("Q", bytes(8 * count))


def _insert(slots: "array[int]", value: int) -> bool:
    mask = len(slots) - 1
    at = value & mask
    while held := slots[at]:
        if held == value:
            return False
        at = (at + 1) & mask
    slots[at] = value
    return True
