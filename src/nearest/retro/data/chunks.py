"""Documents cut into chunks of m tokens, which are numbered through all documents.

A chunk is not stored: where a document begins among the tokens says where its chunks do. The last
one of a document may be shorter; what is missing reads as −1. Chunks never cross documents.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt8

from nearest.corpus.tokens import token_dtype
from nearest.errors import CorpusError, SettingError

PADDING = -1
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of documents whose tokens stand one after the other in one array.

    Attributes:
        tokens: flat; may be a memory map.
        starts, stops: where each document's tokens begin and, its padding left out, would end if
            its chunks stood side by side.
        size: tokens of a chunk, m.
        stride: tokens from one chunk of a document to its next; more than m where something stands
            between them.
        names: an id of each document; its number where there are none.
        dates: ISO 8601 of each document, "" where it is unknown; None where no document has one.
    """

    tokens: Integer[np.ndarray, " n"]
    starts: Int[np.ndarray, " documents"]
    stops: Int[np.ndarray, " documents"]
    size: int = 64
    stride: int = 0
    names: Sequence[str] | None = None
    dates: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.size < 2:
            raise SettingError(f"chunk_size must be at least 2 tokens, got {self.size}")

    @classmethod
    def of(
        cls, documents: Iterable[Integer[np.ndarray, " _"] | Sequence[int]], size: int = 64
    ) -> "Chunks":
        """The chunks of documents given as token ids; a document without tokens has none.

        >>> chunks = Chunks.of([[5, 6, 7], [], [8]], size=2)
        >>> chunks.rows(np.arange(len(chunks))).tolist()
        [[5, 6], [7, -1], [8, -1]]
        """
        arrays = [np.asarray(tokens, dtype=np.int64) for tokens in documents]
        bounds = np.cumsum([0, *(len(array) for array in arrays)])
        tokens = np.concatenate([np.empty(0, np.int64), *arrays])
        if len(tokens) and tokens.min() < 0:
            raise CorpusError(
                f"a document has the token {tokens.min()}: token ids are not negative"
            )
        dtype = token_dtype(int(tokens.max(initial=0)) + 1)
        return cls(tokens.astype(dtype), bounds[:-1], bounds[1:], size)

    @cached_property
    def first(self) -> Int[np.ndarray, " documents_plus_1"]:
        """The first chunk of each document, and at the end the number of all."""
        counts = -(-(self.stops - self.starts) // self.size)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        """How many chunks there are."""
        return int(self.first[-1])

    @property
    def documents(self) -> int:
        """How many documents there are, those without tokens included."""
        return len(self.starts)

    def document_of(self, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The document of each chunk; −1 for chunk −1."""
        found = np.searchsorted(self.first, ids, side="right") - 1
        return np.where(np.asarray(ids) < 0, PADDING, found)

    def of_document(self, document: int) -> range:
        """The chunks of a document."""
        return range(int(self.first[document]), int(self.first[document + 1]))

    def rows(
        self, ids: Int[np.ndarray, "*shape"], continuation: int = 0
    ) -> Int[np.ndarray, "*shape length"]:
        """Token ids, int64, of each chunk and of up to `continuation` chunks that follow it.

        length = m · (1 + continuation). −1 after the document's end, and for chunk −1.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (ids.min() >= PADDING and ids.max() < len(self)):
            raise SettingError(
                f"chunk ids lie in {ids.min()} … {ids.max()}, but there are {len(self):,} chunks"
            )
        if not len(self):
            return np.full((*ids.shape, self.size * (1 + continuation)), PADDING, dtype=np.int64)
        document = self.document_of(ids)
        within = (ids - self.first[document])[..., None] * self.size
        places = within + np.arange(self.size * (1 + continuation))
        begin, end = self.starts[document][..., None], self.stops[document][..., None]
        held = (places < end - begin) & (ids >= 0)[..., None]
        stride = self.stride or self.size
        flat = begin + places // self.size * stride + places % self.size
        found = np.full(held.shape, PADDING, dtype=np.int64)
        found[held] = self.tokens[flat[held]]
        return found

    def document_tokens(self, document: int) -> Int[np.ndarray, " n"]:
        """All tokens of a document, int64."""
        rows = self.rows(np.asarray(self.of_document(document), dtype=np.int64))
        return rows[rows >= 0]

    @cached_property
    def digests(self) -> UInt8[np.ndarray, "documents 16"]:
        """A hash of each document's tokens: equal documents are found under any name."""
        found = np.empty((self.documents, DIGEST_BYTES), np.uint8)
        for number in range(self.documents):
            tokens = self.document_tokens(number).astype("<i8")
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=DIGEST_BYTES)
            found[number] = np.frombuffer(digest.digest(), np.uint8)
        return found

    @cached_property
    def digest(self) -> str:
        """A hash of the chunk size and of all documents in their order."""
        return hashlib.sha256(b"%d " % self.size + self.digests.tobytes()).hexdigest()

    def name(self, document: int) -> str:
        """What a document is called."""
        return str(document) if self.names is None else self.names[document]

    def date(self, document: int) -> str:
        """ISO 8601; "" where it is unknown."""
        return "" if self.dates is None else self.dates[document]


def owners(*chunks: Chunks) -> list[Int[np.ndarray, " documents"]]:
    """A number for each document, the same for documents of equal tokens, in whatever corpus."""
    every = np.concatenate([some.digests for some in chunks])
    keys = np.ascontiguousarray(every).view(f"V{DIGEST_BYTES}").ravel()
    numbers = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return np.split(numbers, np.cumsum([some.documents for some in chunks])[:-1])


def joined(parts: Sequence[Chunks]) -> Chunks:
    """Several corpora as one: ids count on from each to the next.

    Raises:
        SettingError: there is none, or their chunks differ in size.
    """
    if not parts:
        raise SettingError("there are no chunks to join: name a database")
    if len(parts) == 1:
        return parts[0]
    sizes = sorted({part.size for part in parts})
    if len(sizes) > 1:
        raise SettingError(
            f"chunks of {' and '.join(map(str, sizes))} tokens cannot be searched as one: prepare "
            "all databases with one chunk size"
        )
    arrays = [_side_by_side(part) for part in parts]
    bounds = np.cumsum([0, *(len(tokens) for tokens, _ in arrays)])
    offsets = [first + at for (_, first), at in zip(arrays, bounds[:-1].tolist(), strict=True)]
    wide: Any = np.result_type(*(tokens.dtype for tokens, _ in arrays))
    return Chunks(
        np.concatenate([tokens.astype(wide, copy=False) for tokens, _ in arrays]),
        np.concatenate([first[:-1] for first in offsets]),
        np.concatenate([first[1:] for first in offsets]),
        sizes[0],
        names=[part.name(number) for part in parts for number in range(part.documents)],
        dates=[part.date(number) for part in parts for number in range(part.documents)]
        if any(part.dates is not None for part in parts)
        else None,
    )


def _side_by_side(part: Chunks) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a corpus without gaps, and where each document begins, and the end."""
    bounds = np.concatenate([[0], np.cumsum(part.stops - part.starts)]).astype(np.int64)
    contiguous = not part.stride and np.array_equal(part.starts, bounds[:-1])
    if contiguous:
        return part.tokens[: bounds[-1]], bounds
    rows = part.rows(np.arange(len(part)))
    return rows[rows >= 0].astype(part.tokens.dtype), bounds
