"""A tiny embedder and databases for tests of RETRO's data."""

import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nearest.corpus.documents import Document
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.embedders import Embedder
from nearest.retro.data.stages import chunk_documents

VOCAB, M = 40, 4


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def embedder(dim: int = 8, version: str = "1") -> Embedder:
    """A text's vector is the sum of a random one for each of its words, of length 1."""

    def encode(texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), dim))
        for row, text in zip(vectors, texts, strict=True):
            for word in text.split():
                row += np.random.default_rng(zlib.crc32(word.encode())).normal(size=dim)
        return vectors

    return Embedder.of(encode, "words", dim, version=version, normalise=True, batch_size=5)


def documents(
    count: int = 6, seed: int = 0, longest: int = 30, vocab: int = VOCAB
) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, vocab, random.integers(1, longest)).tolist() for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A number is its own token; none of them is written 0."""
    vocabulary = {"<s>" if number == 0 else str(number): number for number in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def stored(texts: list[list[int]], *, dates: bool = False, first: int = 0) -> list[Document]:
    return [
        Document(
            f"doc-{number}", words(text), {"date": f"2020-01-{number + 1:02d}"} if dates else {}
        )
        for number, text in enumerate(texts, first)
    ]


def database(
    path: Path, texts: list[list[int]], *, indexed: bool = True, dim: int = 8, dates: bool = False
) -> ChunkDatabase:
    made = chunk_documents(stored(texts, dates=dates), tokenizer(), path, M)
    if indexed:
        assert made.embed(embedder(dim), words)
        made.build_index()
    return made
