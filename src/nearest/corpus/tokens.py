"""Documents as token ids, each starting with one context token that is never predicted."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from nearest.corpus.documents import Document
from nearest.corpus.long_text import LONG, tokenise_long
from nearest.errors import CorpusError

# One document's token ids; each has a length of its own.
Tokens = Integer[np.ndarray, "_"]

# A Hugging Face tokenizer: texts in, {"input_ids": lists of ids} out.
Tokenizer = Callable[..., Any]

_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TokenisedDocument:
    """A document and its token ids [length], the context token first."""

    document: Document
    tokens: Tokens


def tokenise(
    documents: Iterable[Document], tokenizer: Tokenizer, start_token: int, vocab_size: int
) -> Iterator[TokenisedDocument]:
    """Token ids of each document, `start_token` in front (BOS, or EOS where there is none).

    Documents are tokenised in batches of about a quarter of a megabyte, so a corpus streams
    through; a long one is tokenised in pieces (`tokenise_long`).

    Raises:
        CorpusError: the tokenizer gives an id that the model's vocabulary does not have.
    """
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        if len(batch) == 1 and len(texts[0]) > LONG:
            all_ids = [tokenise_long(texts[0], tokenizer)]
        else:
            all_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        all_ids.reverse()
        for document in batch:
            found = np.asarray(all_ids.pop())  # those of a long text are not kept for long
            for part in (np.array([start_token]), found):
                check_vocabulary(part, vocab_size, document.origin)
            tokens = np.empty(len(found) + 1, dtype=np.int32)
            tokens[0], tokens[1:] = start_token, found
            del found
            yield TokenisedDocument(document, tokens)


def check_vocabulary(tokens: Tokens, vocab_size: int, origin: str) -> None:
    """Refuse token ids outside [0, vocab_size) (CorpusError)."""
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        wrong = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
        raise CorpusError(
            f"token {wrong} in {origin} is outside the model's vocabulary of {vocab_size:,}: "
            "use the model's own tokenizer, or resize its embeddings"
        )


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
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
