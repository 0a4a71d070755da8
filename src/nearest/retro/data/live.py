"""Neighbours that are looked up while a model reads or writes, with their sources."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.errors import SettingError
from nearest.retro.data.chunks import PADDING
from nearest.retro.data.database import ChunkDatabase, Decode
from nearest.retro.data.embedders import Embedder
from nearest.retro.data.opening import decoder, embedder_of, tokenizer_of
from nearest.retro.data.stages import METHODS, AnyDatabase, Databases, Method


@dataclass(frozen=True)
class PassageSource:
    """Where a neighbour stands.

    Attributes:
        chunk: its id, −1 where there is none.
        document: the document's id.
        position: of its first token in the document.
        distance: to the chunk that it was found for.
    """

    chunk: int
    document: str
    position: int
    distance: float


class Passages(NamedTuple):
    """Neighbours of n chunks: ids and distances, their tokens with what follows, their places."""

    ids: Int[np.ndarray, "n neighbours"]  # −1 where there is none
    distances: Float[np.ndarray, "n neighbours"]
    tokens: Int[np.ndarray, "n neighbours length"]  # −1 pads
    sources: list[list[PassageSource]]


def _versions(databases: Sequence[ChunkDatabase]) -> tuple[int, ...]:
    return tuple(database.memory.manifest.version for database in databases)


class MemoryNeighbours:
    """What `generate` takes as `neighbours`: (n, m) token ids → (n, neighbours, length).

    A neighbour is a chunk and the chunks that follow it in its document, never past its end; −1
    pads. The last answer's places are in `sources`, a list for each chunk that was asked for. The
    chunks are those of the snapshots that were opened, or looked at by `refresh`.
    """

    def __init__(
        self,
        databases: AnyDatabase | Sequence[AnyDatabase],
        embedder: Embedder | None = None,
        decode: Decode | None = None,
        *,
        neighbours: int = 2,
        continuation: int = 1,
        method: Method = "dense",
    ) -> None:
        """Neighbours from the chunks of a memory, or of several.

        Args:
            databases: memories that `nearest retro prepare` has prepared, or their folders.
            embedder: the one that made their vectors; None loads it by its name.
            decode: of the tokenizer that the model and the memories share; None loads it.
            neighbours: of each chunk.
            continuation: chunks that follow each neighbour.
            method: as in `TableOptions`.

        Raises:
            ModelError: another embedder made the vectors.
            SettingError: a number is out of its range.
            FolderError: a memory has no chunks, vectors or index.
        """
        if neighbours < 1 or continuation < 0:
            raise SettingError(
                f"neighbours {neighbours} must be at least 1, continuation {continuation} 0"
            )
        if method not in METHODS:
            raise SettingError(f"method {method!r} is unknown: choose {', '.join(METHODS)}")
        self._searched = Databases.open(databases)
        self.version = _versions(self.databases)
        first = self._searched.databases[0]
        if method == "bm25":
            embedder = None
        elif embedder is None:
            embedder = embedder_of(first)
        if embedder is not None:
            for database in self._searched.databases:
                embedder.identity.check_same(database.embedder, str(database.path))
                _ = database.index  # says what is missing
        if decode is None:
            decode = decoder(tokenizer_of(first))
        self._embedder = embedder
        self._decode = decode
        self._method: Method = method
        self.neighbours = neighbours
        self.continuation = continuation
        self.sources: list[list[PassageSource]] = []

    @property
    def databases(self) -> Sequence[ChunkDatabase]:
        """What is searched."""
        return self._searched.databases

    @property
    def by_words(self) -> bool:
        """Whether no vectors are needed."""
        return self._embedder is None

    def among(self, databases: Sequence[ChunkDatabase]) -> "MemoryNeighbours":
        """The same search among other chunks, such as a later snapshot's (errors as above)."""
        return MemoryNeighbours(
            databases,
            self._embedder,
            self._decode,
            neighbours=self.neighbours,
            continuation=self.continuation,
            method=self._method,
        )

    def refresh(self) -> None:
        """Search the newest snapshots of the memories from now on; `version` tells of them.

        Raises:
            FolderError: a memory is gone, or has chunks without vectors or index.
        """
        memories = [database.memory.refresh() for database in self.databases]
        if tuple(memory.manifest.version for memory in memories) != self.version:
            newest = self.among([ChunkDatabase(memory) for memory in memories])
            self._searched, self.version = newest._searched, newest.version

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk, as the model's must be."""
        return self._searched.chunks.size

    def __call__(self, chunks: Int[Tensor, "n m"]) -> Int[Tensor, "n neighbours length"]:
        """Neighbours of chunks of token ids; negative ids are padding.

        Raises:
            SettingError: the chunks are of another size than the database's.
        """
        found = self.look_up(chunks.detach().cpu().numpy().astype(np.int64))
        self.sources = found.sources
        return torch.from_numpy(found.tokens).to(chunks.device)

    def look_up(
        self,
        tokens: Int[np.ndarray, "n m"],
        vectors: Float[np.ndarray, "n dim"] | None = None,
        neighbours: int | None = None,
        continuation: int | None = None,
    ) -> Passages:
        """Neighbours of chunks; any thread may ask.

        Args:
            tokens: of the chunks; negative ones are padding.
            vectors: of the chunks, by the database's embedder; made here when not given.
            neighbours, continuation: as of the object when not given.

        Raises:
            SettingError: the chunks are of another size than the database's.
        """
        if tokens.shape[1] != self.chunk_size:
            raise SettingError(
                f"the model reads chunks of {tokens.shape[1]} tokens, the database holds chunks of "
                f"{self.chunk_size}: prepare one with --chunk-size {tokens.shape[1]}"
            )
        if vectors is None and self._embedder is not None:
            vectors = self._embedder([self._decode(row[row >= 0].tolist()) for row in tokens])
        k = neighbours or self.neighbours
        after = self.continuation if continuation is None else continuation
        search = self._searched.search(self._method, tokens, vectors)
        found = search(np.arange(len(tokens)), k).padded(k)
        sources = [
            [self._source(int(i), float(far)) for i, far in zip(ids, distances, strict=True)]
            for ids, distances in zip(found.ids, found.distances, strict=True)
        ]
        rows = self._searched.chunks.rows(found.ids, after)
        return Passages(found.ids, found.distances, rows, sources)

    def place(self, chunk: int) -> tuple[int, int]:
        """Of which of the memories a chunk is, by its number, and of which document there."""
        return self._searched.place(chunk)

    @property
    def digest(self) -> str:
        """Another one where the chunks, their order or their embedder are others."""
        parts = [database.chunks.digest for database in self._searched.databases]
        if self._method != "bm25":
            parts += [database.embedder.weights for database in self._searched.databases]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _source(self, chunk: int, distance: float) -> PassageSource:
        if chunk == PADDING:
            return PassageSource(PADDING, "", 0, distance)
        chunks = self._searched.chunks
        document = int(chunks.document_of(np.array(chunk)))
        position = (chunk - int(chunks.first[document])) * chunks.size
        return PassageSource(chunk, chunks.name(document), position, distance)
