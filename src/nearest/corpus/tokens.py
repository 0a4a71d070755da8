"""Documents as token ids, each starting with one context token that is never predicted.

For an encoder–decoder, the encoder reads the tokens of the document's `encoder_text`, and the
decoder predicts those of its text, tokenised as training targets are (`tokenizer(text_target=…)`),
with EOS at the end, which is predicted as any other token.

A document that mentions a special token, such as "<|im_end|>", does not hold it: to a model it
would be a command. Its characters are read as any others, unless the rules say otherwise.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from nearest.corpus.documents import Document, encoder_text_of
from nearest.corpus.long_text import LONG, tokenise_long
from nearest.errors import CorpusError

# One document's token ids; each has a length of its own.
Tokens = Integer[np.ndarray, "_"]

# A Hugging Face tokenizer: texts in, {"input_ids": lists of ids} out.
Tokenizer = Callable[..., Any]

_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TokenRules:
    """What a model asks of its tokens.

    Attributes:
        start_token: what each text begins with: BOS, EOS where there is none, or decoder-start.
        vocab_size: number of token ids that it predicts.
        encoder_vocab_size: number of token ids that its encoder reads; None without an encoder.
        encoder_positions: most tokens that the encoder reads; None for no limit.
        special_tokens: whether texts that mention special tokens hold them.
    """

    start_token: int
    vocab_size: int
    encoder_vocab_size: int | None = None
    encoder_positions: int | None = None
    special_tokens: bool = False


class SpecialTokensWarning(UserWarning):
    """Documents mention special tokens, which were read as plain text."""


@dataclass(frozen=True)
class TokenisedDocument:
    """A document and its token ids [length], the context token first; and its encoder's."""

    document: Document
    tokens: Tokens
    encoder_tokens: Tokens | None = None


def tokenise(
    documents: Iterable[Document], tokenizer: Tokenizer, rules: TokenRules
) -> Iterator[TokenisedDocument]:
    """Token ids of each document after the start token, and of its encoder text where one is read.

    Documents are tokenised in batches of about a quarter of a megabyte, so a corpus streams
    through; a long one is tokenised in pieces (`tokenise_long`) unless there is an encoder. At the
    end a SpecialTokensWarning says how many mention special tokens that they do not hold.

    Raises:
        CorpusError: the tokenizer gives an id that the model's vocabulary does not have, or an
            encoder text is missing or too long.
    """
    mentioned = _Mentioned(tokenizer, rules)
    as_text = split_special_tokens(rules)
    start = np.array([rules.start_token])
    for batch in _batches(documents):
        beside: Iterable[Tokens | None] = itertools.repeat(None, len(batch))
        texts = [document.text for document in batch]
        mentioned.look(texts)
        if rules.encoder_vocab_size is not None:
            beside = tokenise_encoder_texts(batch, tokenizer, rules)
            all_ids = tokenizer(text_target=texts, verbose=False, **as_text)["input_ids"]
        elif len(batch) == 1 and len(texts[0]) > LONG:
            all_ids = [tokenise_long(texts[0], tokenizer, **as_text)]
        else:
            all_ids = tokenizer(texts, add_special_tokens=False, verbose=False, **as_text)[
                "input_ids"
            ]
        check_vocabulary(start, rules.vocab_size, batch[0].origin)
        all_ids.reverse()
        for document, encoder_tokens in zip(batch, beside, strict=True):
            found = np.asarray(all_ids.pop())  # those of a long text are not kept for long
            check_vocabulary(found, rules.vocab_size, document.origin)
            tokens = np.empty(len(found) + 1, dtype=np.int32)
            tokens[0], tokens[1:] = rules.start_token, found
            del found
            yield TokenisedDocument(document, tokens, encoder_tokens)
    mentioned.tell()


def split_special_tokens(rules: TokenRules) -> dict[str, bool]:
    """What a tokenizer is told, so that a text holds no special tokens; nothing where it may."""
    return {} if rules.special_tokens else {"split_special_tokens": True}


def special_token_names(tokenizer: Tokenizer) -> "re.Pattern[str] | None":
    """What finds the names of a tokenizer's special tokens in a text; None where it has none."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    names = {str(token) for token in added.values() if token.special}
    names |= set(getattr(tokenizer, "all_special_tokens", []))
    found = sorted(names - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


class _Mentioned:
    """Counts texts in which special tokens are named."""

    def __init__(self, tokenizer: Tokenizer, rules: TokenRules) -> None:
        self._names = None if rules.special_tokens else special_token_names(tokenizer)
        self._texts, self._first = 0, ""

    def look(self, texts: Iterable[str]) -> None:
        """Count those that mention one."""
        for text in texts if self._names is not None else ():
            if self._names is not None and (named := self._names.search(text)):
                self._texts += 1
                self._first = self._first or named[0]

    def tell(self) -> None:
        """Warn, if any did."""
        if self._texts:
            warnings.warn(
                f"special tokens such as {self._first!r} are mentioned in {self._texts:,} "
                f"document{'' if self._texts == 1 else 's'}, and read there as plain text "
                "(built with --special-tokens, a memory reads them as tokens)",
                SpecialTokensWarning,
                stacklevel=3,
            )


def tokenise_encoder_texts(
    documents: Sequence[Document], tokenizer: Tokenizer, rules: TokenRules
) -> list[Tokens]:
    """Token ids that the encoder reads for each document, special tokens included.

    Raises:
        CorpusError: a document has no encoder text, or it does not fit the encoder.
    """
    texts = [encoder_text_of(document) for document in documents]
    found = []
    rows = tokenizer(texts, verbose=False, **split_special_tokens(rules))["input_ids"]
    for document, ids in zip(documents, rows, strict=True):
        tokens = np.asarray(ids, dtype=np.int32)
        check_vocabulary(tokens, rules.encoder_vocab_size or 0, document.origin)
        if not len(tokens):
            raise CorpusError(
                f"the encoder text of {document.origin} has no tokens: remove the document, or "
                "give it another"
            )
        if rules.encoder_positions is not None and len(tokens) > rules.encoder_positions:
            raise CorpusError(
                f"the encoder text of {document.origin} has {len(tokens):,} tokens, and the "
                f"encoder has {rules.encoder_positions:,} positions: make shorter pairs of it"
            )
        found.append(tokens)
    return found


def check_vocabulary(tokens: Tokens, vocab_size: int, origin: str) -> None:
    """Refuse token ids outside [0, vocab_size) (CorpusError)."""
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        wrong = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
        raise CorpusError(
            f"token {wrong} in {origin} is outside the model's vocabulary of {vocab_size:,}: "
            "use the model's own tokenizer, or resize its embeddings"
        )


def size_of(document: Document) -> int:
    """Characters of its text and of its encoder text."""
    return len(document.text) + len(document.encoder_text or "")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents whose texts are tokenised together; a long one is by itself."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if batch and len(document.text) > LONG:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += size_of(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
