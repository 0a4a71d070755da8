"""A text to be scored: its documents as tokens, with the counts that perplexities divide by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Int

from nearest.corpus.incoming import Documents, incoming_documents
from nearest.corpus.tokens import (
    Tokenizer,
    TokenRules,
    Tokens,
    check_vocabulary,
    tokenise,
)
from nearest.errors import CorpusError, SettingError

_GIVEN = "the token arrays given"


@dataclass(frozen=True)
class Text:
    """Documents as int64 token ids, the context token first; no words or bytes for bare tokens.

    A document is one sequence, unless the text is a stream: then all documents are one, with the
    first one's context token at its beginning and nothing between them. Bare tokens have their
    number as id. `encoder_tokens` are what an encoder reads for each document, where there is one.
    """

    documents: list[Tokens]
    ids: list[str]
    words: int | None
    utf8_bytes: int | None
    ended: bool = False  # each document ends with a token that is not its own, EOS
    stream: bool = False
    encoder_tokens: list[Tokens] | None = None

    @property
    def predictions(self) -> int:
        """Number of tokens that are predicted: all but the first of each document."""
        return sum(len(tokens) - 1 for tokens in self.documents)

    @cached_property
    def sequences(self) -> list[Tokens]:
        """What a model reads, each from its beginning: the documents, or all of them as one."""
        if not self.stream:
            return self.documents
        context = self.documents[0][:1]
        return [np.concatenate([context, *(tokens[1:] for tokens in self.documents)])]

    def places(
        self, sequences: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Document and position in it of tokens, given by sequence and position there (≥ 1)."""
        if not self.stream:
            return sequences, positions
        documents = np.searchsorted(self._before, positions, side="left") - 1
        return documents, positions - self._before[documents]

    @cached_property
    def _before(self) -> Int[np.ndarray, " documents_plus_1"]:
        """Predictions before each document, and of all."""
        return np.cumsum([0, *(len(tokens) - 1 for tokens in self.documents)])

    @property
    def own_tokens(self) -> list[Tokens]:
        """The documents as a memory would hold them, without EOS."""
        return [tokens[: len(tokens) - self.ended] for tokens in self.documents]

    def as_stream(self) -> "Text":
        """The same documents as one sequence.

        Raises:
            SettingError: each has an encoder text of its own.
        """
        if self.encoder_tokens is not None:
            raise SettingError(
                "a stream is one sequence, and an encoder–decoder reads a text of its own for each "
                "document: leave stream out"
            )
        return replace(self, stream=True)

    @classmethod
    def from_documents(
        cls,
        documents: Documents,
        tokenizer: Tokenizer,
        rules: TokenRules,
        end_token: int | None = None,
    ) -> "Text":
        """Tokenise documents; `end_token`, where given, is predicted at the end of each."""
        arrays, ids, beside = [], [], []
        words = utf8_bytes = 0
        for item in tokenise(incoming_documents(documents, rules), tokenizer, rules):
            end = [] if end_token is None else [end_token]
            arrays.append(np.append(item.tokens, end).astype(np.int64))
            ids.append(item.document.id)
            if item.encoder_tokens is not None:
                beside.append(item.encoder_tokens)
            words += len(item.document.text.split())
            utf8_bytes += len(item.document.text.encode())
        ended = end_token is not None
        return cls(arrays, ids, words, utf8_bytes, ended, encoder_tokens=beside or None)._checked()

    @classmethod
    def from_tokens(cls, arrays: Sequence[Tokens], vocab_size: int) -> "Text":
        """Take documents that are token ids already; the first token of each is context only."""
        for tokens in arrays:
            check_vocabulary(tokens, vocab_size, _GIVEN)
            if not len(tokens):
                raise CorpusError(
                    "a token array is empty: leave it out, or begin it with a context token"
                )
        documents = [np.asarray(tokens, dtype=np.int64) for tokens in arrays]
        ids = [str(number) for number in range(len(documents))]
        return cls(documents, ids, None, None)._checked()

    def _checked(self) -> "Text":
        if self.predictions < 1:
            raise CorpusError("the text holds no token to predict: give it longer documents")
        return self
