"""Passages of a memory for a language model to read before a text (arXiv:2302.00083).

The memory's documents are cut into passages of so many tokens; those with the highest BM25 for the
last tokens of a text are its best.
"""

import threading
from collections import OrderedDict
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.bm25 import Bm25
from nearest.memory import Memory

_PADDING = -1
NO_DOCUMENT = -1
_KEPT = 2  # ways to cut a memory's documents
_cuts: WeakKeyDictionary[Memory, OrderedDict[int, "Passages"]] = WeakKeyDictionary()
_cutting = threading.Lock()


class Passages:
    """All passages of a memory, and which of them are best before a text.

    Attributes:
        documents: the number of the document of each passage, ascending.
    """

    def __init__(self, memory: Memory, size: int) -> None:
        """Cut the documents of a memory into passages of `size` tokens, start tokens left out."""
        parts: list[Tokens] = []
        documents: list[int] = []
        for number in range(memory.documents):
            tokens = memory.document_tokens(number)[1:]
            cut = [tokens[at : at + size] for at in range(0, len(tokens), size)]
            parts += cut
            documents += [number] * len(cut)
        self._rows = np.full((len(parts), size), _PADDING, dtype=np.int32)
        for row, part in zip(self._rows, parts, strict=True):
            row[: len(part)] = part
        self.documents = np.array(documents, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def largest(self) -> int:
        """The largest token id; −1 where there is none."""
        return int(self._rows.max(initial=_PADDING))

    def rows(self, ids: Int[np.ndarray, " q"]) -> Int[np.ndarray, "q size"]:
        """The tokens of some passages; −1 fills a row."""
        rows: Int[np.ndarray, "q size"] = self._rows[ids]
        return rows

    def tokens(self, passage: int) -> Tokens:
        """The tokens of one."""
        row = self._rows[passage]
        tokens: Tokens = row[row != _PADDING].astype(np.int64)
        return tokens

    def best(self, query: Tokens, most: int, without: int = NO_DOCUMENT) -> list[int]:
        """The passages with the highest BM25 for a query's tokens, best first.

        Args:
            query: token ids; a token that it holds twice counts twice.
            most: passages, at most; those that share no token with the query are not found.
            without: the number of a document whose passages are left out.

        Raises:
            NearestError: bm25s is not installed.
        """
        if not len(query) or not len(self):
            return []
        first, last = np.searchsorted(self.documents, [without, without + 1])
        found = self._bm25.search(query[None], most + int(last - first)).ids[0]
        left = found[(found >= 0) & ~((found >= first) & (found < last))]
        chosen: list[int] = left[:most].tolist()
        return chosen

    @cached_property
    def _bm25(self) -> Bm25:
        return Bm25(self)


def cut_passages(memory: Memory, size: int) -> Passages:
    """The passages of a memory, cut and indexed once while it is open, for any thread.

    Raises:
        NearestError: bm25s is not installed.
    """
    with _cutting:
        cuts = _cuts.setdefault(memory, OrderedDict())
        if size not in cuts:
            passages = Passages(memory, size)
            passages.best(np.zeros(1, dtype=np.int64), 1)  # makes the index
            cuts[size] = passages
            if len(cuts) > _KEPT:
                cuts.popitem(last=False)
        return cuts[size]
