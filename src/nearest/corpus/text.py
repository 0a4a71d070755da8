"""A text to be scored: its documents as tokens, with the counts that perplexities divide by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nearest.corpus.documents import Document, as_documents, with_unique_ids
from nearest.corpus.tokens import Tokenizer, Tokens, check_vocabulary, tokenise
from nearest.errors import CorpusError

_GIVEN = "the token arrays given"


@dataclass(frozen=True)
class Text:
    """Documents as int64 token ids, the context token first; no words or bytes for bare tokens."""

    documents: list[Tokens]
    words: int | None
    utf8_bytes: int | None

    @property
    def predictions(self) -> int:
        """Number of tokens that are predicted: all but the first of each document."""
        return sum(len(tokens) - 1 for tokens in self.documents)

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document | str],
        tokenizer: Tokenizer,
        start_token: int,
        vocab_size: int,
        end_token: int | None = None,
    ) -> "Text":
        """Tokenise documents; `end_token`, where given, is predicted at the end of each."""
        arrays = []
        words = utf8_bytes = 0
        unique = with_unique_ids(as_documents(documents))
        for item in tokenise(unique, tokenizer, start_token, vocab_size):
            end = [] if end_token is None else [end_token]
            arrays.append(np.append(item.tokens, end).astype(np.int64))
            words += len(item.document.text.split())
            utf8_bytes += len(item.document.text.encode())
        return cls(arrays, words, utf8_bytes)._checked()

    @classmethod
    def from_tokens(cls, arrays: Sequence[Tokens], vocab_size: int) -> "Text":
        """Take documents that are token ids already; the first token of each is context only."""
        for tokens in arrays:
            check_vocabulary(tokens, vocab_size, _GIVEN)
        return cls([np.asarray(tokens, dtype=np.int64) for tokens in arrays], None, None)._checked()

    def _checked(self) -> "Text":
        if self.predictions < 1:
            raise CorpusError("the text holds no token to predict: give it longer documents")
        return self
