"""Documents cut into chunks of m tokens, which are numbered through all documents.

A chunk is not stored: where a document begins among the tokens says where its chunks do. The last
one of a document may be shorter; what is missing reads as −1. Chunks never cross documents. A token
that every document is to begin or end with need not be stored, either.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from jaxtyping import Int, Integer, UInt8

from nearest.corpus.tokens import token_dtype
from nearest.errors import CorpusError, SettingError
from nearest.store.parts.chunks import first_chunks

PADDING = -1
DIGEST_BYTES = 16


class JoinedTokens:
    """The tokens of several corpora, one after another, where they lie: nothing is copied."""

    def __init__(self, parts: "Sequence[Integer[np.ndarray, '_'] | JoinedTokens]") -> None:
        self._parts = parts
        self._first = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        """Tokens of all."""
        return int(self._first[-1])

    def __getitem__(self, places: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
        """The tokens at some places."""
        found = np.empty(len(places), np.int64)
        parts = np.searchsorted(self._first, places, side="right") - 1
        for number in np.unique(parts).tolist():
            own = parts == number
            found[own] = self._parts[number][places[own] - self._first[number]]
        return found

    def max(self, initial: int) -> int:
        """The largest token; `initial` where there is none."""
        return max(int(part.max(initial=initial)) for part in self._parts)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of documents whose tokens stand one after the other in one array.

    Attributes:
        tokens: flat; may be a memory map, or several one after another.
        starts, stops: where each document's tokens begin and, its padding left out, would end if
            its chunks stood side by side. What stands between documents is not read.
        size: tokens of a chunk, m.
        stride: tokens from one chunk of a document to its next; more than m where something stands
            between them.
        start, end: token ids that are read before and after each document's; None: none.
        names: an id of each document; its number where there are none.
        dates: ISO 8601 of each document, "" where it is unknown; None where no document has one.
    """

    tokens: Integer[np.ndarray, " n"] | JoinedTokens
    starts: Int[np.ndarray, " documents"]
    stops: Int[np.ndarray, " documents"]
    size: int = 64
    stride: int = 0
    start: int | None = None
    end: int | None = None
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
        return first_chunks(self.lengths, self.size)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """Tokens of each document as it is read."""
        ends = (self.start is not None) + (self.end is not None)
        return np.asarray(self.stops - self.starts + ends, dtype=np.int64)

    @property
    def largest(self) -> int:
        """No token id is above this one."""
        return max(int(self.tokens.max(initial=0)), self.start or 0, self.end or 0)

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
        begin, length = self.starts[document][..., None], self.lengths[document][..., None]
        held = (places < length) & (ids >= 0)[..., None]
        found = np.full(held.shape, PADDING, dtype=np.int64)
        stored = held
        if self.end is not None:
            last = held & (places == length - 1)
            found[last], stored = self.end, stored & ~last
        if self.start is not None:
            begins = held & (places == 0)
            found[begins], stored = self.start, stored & ~begins
            places = places - 1
        stride = self.stride or self.size
        flat = begin + places // self.size * stride + places % self.size
        found[stored] = self.tokens[flat[stored]]
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
    first, *others = parts
    sizes = sorted({part.size for part in parts})
    if len(sizes) > 1:
        raise SettingError(
            f"chunks of {' and '.join(map(str, sizes))} tokens cannot be searched as one: prepare "
            "all databases with one chunk size"
        )
    for name in ("start", "end", "stride"):
        if any(getattr(part, name) != getattr(first, name) for part in others):
            raise SettingError(
                f"the databases' documents have other {name} tokens, or none: prepare all alike, "
                "to be searched as one"
            )
    bases = np.cumsum([0, *(len(part.tokens) for part in parts)]).tolist()
    dated = any(part.dates is not None for part in parts)
    return Chunks(
        JoinedTokens([part.tokens for part in parts]),
        np.concatenate([part.starts + base for part, base in zip(parts, bases, strict=False)]),
        np.concatenate([part.stops + base for part, base in zip(parts, bases, strict=False)]),
        first.size,
        first.stride,
        first.start,
        first.end,
        names=Told([(part.documents, part.name) for part in parts]),
        dates=Told([(part.documents, part.date) for part in parts]) if dated else None,
    )


class Told(Sequence[str]):
    """What several corpora say of their documents, one corpus after the other, when it is asked."""

    def __init__(self, parts: Sequence[tuple[int, Callable[[int], str]]]) -> None:
        self._parts = [part for _, part in parts]
        self._first = np.cumsum([0, *(count for count, _ in parts)])

    def __len__(self) -> int:
        """Documents of all."""
        return int(self._first[-1])

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        """What is said of a document."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._parts[part](number - int(self._first[part]))
