"""What encoders read with a memory's documents: which documents are nearest to another.

A memory of translations can be searched among those of like sentences alone, as fast kNN-MT and
SK-MT do (arXiv:2105.14528, arXiv:2302.12188): few keys are measured then, however large the memory.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.errors import SettingError
from nearest.index.bm25 import Bm25
from nearest.index.neighbours import NO_ENTRY

if TYPE_CHECKING:
    from nearest.store.snapshot import Snapshot

_PADDING = -1
_REMEMBERED = 1024  # sources: one is asked for at every token that is written


class EncoderTexts:
    """The encoder's tokens of every document of a memory, compared by BM25."""

    def __init__(self, memory: "Snapshot") -> None:
        """Read them all.

        Raises:
            SettingError: the memory has none, or entries stand for some of other documents.
        """
        if not memory.manifest.model.reads_sources:
            raise SettingError(
                f"{memory.path} is of a model without an encoder, so that its documents have no "
                "encoder texts to compare: leave encoder_texts out"
            )
        if memory.has_weights:
            raise SettingError(
                f"entries of {memory.path} were merged into others, so that a document's own are "
                "not known: leave encoder_texts out, or use the memory from before "
                "`nearest compress --merge`"
            )
        self._texts = [memory.encoder_tokens(number) for number in range(memory.documents)]
        self._entries = [memory.entries_of(number) for number in range(memory.documents)]
        self._bm25 = Bm25(self)
        self._found = lru_cache(_REMEMBERED)(self._find)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def largest(self) -> int:
        """The largest token id; −1 where there is none."""
        return max((int(text.max()) for text in self._texts if len(text)), default=_PADDING)

    def rows(self, ids: Int[np.ndarray, " q"]) -> Int[np.ndarray, "q width"]:
        """The tokens of some; −1 fills a row."""
        texts = [self._texts[number] for number in ids.tolist()]
        rows = np.full((len(texts), max(map(len, texts), default=0)), _PADDING, np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = text
        return rows

    def entries(self, sources: Sequence[Tokens], most: int) -> Int[np.ndarray, "sources entries"]:
        """The entries of the `most` documents whose encoder texts are nearest to each of these.

        They ascend; −1 fills a row. Documents that share no token with it are not found.

        Args:
            sources: token ids, as the encoder reads them.
            most: number of documents.

        Raises:
            NearestError: bm25s is not installed.
        """
        found = [self._found(np.asarray(tokens, np.int64).tobytes(), most) for tokens in sources]
        entries = np.full((len(found), max(map(len, found), default=0)), NO_ENTRY, np.int64)
        for row, ids in zip(entries, found, strict=True):
            row[: len(ids)] = ids
        return entries

    def _find(self, source: bytes, most: int) -> Int[np.ndarray, " entries"]:
        query = np.frombuffer(source, np.int64)
        numbers = self._bm25.search(query[None], most).ids[0]
        ranges = [self._entries[number] for number in np.sort(numbers[numbers >= 0]).tolist()]
        return np.concatenate(
            [np.empty(0, np.int64), *(np.arange(r.start, r.stop) for r in ranges)]
        )
