"""A tiny embedder and databases for tests of RETRO's data."""

import zlib
from pathlib import Path

import numpy as np

from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.embedders import Embedder

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


def database(
    path: Path, texts: list[list[int]], *, indexed: bool = True, dim: int = 8, dates: bool = False
) -> ChunkDatabase:
    named = [
        (f"doc-{number}", f"2020-01-{number + 1:02d}" if dates else "", np.array(text, int))
        for number, text in enumerate(texts)
    ]
    made = ChunkDatabase.create(path, named, M, {"tokenizer": "t"}, np.dtype(np.uint16))
    if indexed:
        assert made.embed(embedder(dim), words)
        made.build_index()
    return made
