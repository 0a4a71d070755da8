"""`/search/chunks`: the neighbours of chunks, for RETRO models elsewhere (`RemoteNeighbours`)."""

import asyncio
import base64
import binascii
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from nearest.errors import CorpusError, FolderError, SettingError
from nearest.remote.wire import SNAPSHOT_HEADER, npy, packed, read_npy
from nearest.retro.data.live import MemoryNeighbours
from nearest.serve.beside import SearchedChunks
from nearest.serve.errors import ApiError
from nearest.serve.schema import Strict
from nearest.serve.service import in_thread
from nearest.serve.shelf import stamp_of

_MOST_CHUNKS = 4096
_MOST_NEIGHBOURS = 64
_MOST_CONTINUATION = 16
Neighbours = Annotated[int, Query(ge=1, le=_MOST_NEIGHBOURS)]
Continuation = Annotated[int, Query(ge=0, le=_MOST_CONTINUATION)]


class ChunkSearch(Strict):
    """`POST /search/chunks` as JSON.

    `queries` are a `.npy` in base64: token ids [n, chunk size], negative ones are padding, which
    the server embeds; or their vectors [n, dim].
    """

    queries: str
    k: int = Field(2, ge=1, le=_MOST_NEIGHBOURS)
    continuation: int = Field(1, ge=0, le=_MOST_CONTINUATION)


class NewestChunks:
    """The chunks of the newest snapshots of some memories; for one thread at a time.

    Documents that were removed are gone; those that were added, and whose chunks are not indexed
    yet, are not found.
    """

    def __init__(self, chunks: MemoryNeighbours) -> None:
        self._memories = [database.memory for database in chunks.databases]
        self._stamps = [stamp_of(memory) for memory in self._memories]
        self._use(chunks)

    def get(self) -> tuple[MemoryNeighbours, str]:
        """What finds them, and the name of their snapshot.

        Raises:
            FolderError: a memory cannot be read, or has no chunks any more.
        """
        stamps = [stamp_of(memory) for memory in self._memories]
        if stamps != self._stamps:
            memories = [memory.refresh() for memory in self._memories]
            by_words = self._chunks.by_words
            found = [
                SearchedChunks.of(memory, number, by_words=by_words)
                for number, memory in enumerate(memories)
            ]
            databases = [one.database for one in found if one is not None]
            if len(databases) < len(memories):
                raise FolderError("a memory has no chunks any more: run `nearest retro prepare`")
            self._use(self._chunks.among(databases))
            self._memories, self._stamps = memories, stamps
        return self._chunks, self._snapshot

    def _use(self, chunks: MemoryNeighbours) -> None:
        self._chunks, self._snapshot = chunks, chunks.digest


def router(chunks: MemoryNeighbours) -> APIRouter:
    """The routes; `chunks` finds the neighbours."""
    routes = APIRouter()
    newest = NewestChunks(chunks)
    one_at_a_time = asyncio.Lock()  # an embedder is no place for several threads

    async def found(content: bytes, k: int, continuation: int) -> tuple[str, dict[str, np.ndarray]]:
        async with one_at_a_time:
            return await in_thread(looked_up, content, k, continuation)

    def looked_up(content: bytes, k: int, continuation: int) -> tuple[str, dict[str, np.ndarray]]:
        chunks, snapshot = newest.get()
        tokens, vectors = _queries(content, chunks.chunk_size)
        try:
            passages = chunks.look_up(tokens, vectors, k, continuation)
        except SettingError as error:
            raise ApiError(400, str(error), param="queries") from error
        sources = passages.sources
        return snapshot, {
            "ids": passages.ids,
            "distances": passages.distances,
            "tokens": passages.tokens,
            "documents": np.array([[one.document for one in row] for row in sources], np.str_),
            "positions": np.array([[one.position for one in row] for row in sources], np.int64),
        }

    @routes.get("/search/chunks")
    async def described() -> dict[str, Any]:
        async with one_at_a_time:
            chunks, snapshot = await in_thread(newest.get)
        first = chunks.databases[0]
        models = [database.memory.manifest.model for database in chunks.databases]
        return {
            "version": snapshot,
            "chunk_size": chunks.chunk_size,
            "start": first.cut.start,
            "tokenizers": [[model.reads_sources, model.tokenizer_fingerprint] for model in models],
        }

    @routes.post("/search/chunks/npy", include_in_schema=False)
    async def binary(
        request: Request, k: Neighbours = 2, continuation: Continuation = 1
    ) -> Response:
        snapshot, arrays = await found(await request.body(), k, continuation)
        headers = {SNAPSHOT_HEADER: snapshot}
        return Response(packed(arrays), media_type="application/zip", headers=headers)

    @routes.post("/search/chunks")
    async def as_json(body: ChunkSearch) -> dict[str, Any]:
        try:
            content = base64.b64decode(body.queries, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, "queries is no base64", param="queries") from error
        snapshot, arrays = await found(content, body.k, body.continuation)
        encoded = {name: base64.b64encode(npy(array)).decode() for name, array in arrays.items()}
        return {"version": snapshot, **encoded, "documents": arrays["documents"].tolist()}

    return routes


def _queries(content: bytes, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids [n, size] and, where they were sent in their place, vectors [n, dim]."""
    try:
        array = read_npy(content)
    except CorpusError as error:
        raise ApiError(400, f"queries: {error}", param="queries") from error
    if array.ndim != 2 or not 1 <= len(array) <= _MOST_CHUNKS or array.dtype.kind not in "iuf":
        raise ApiError(
            400,
            f"queries must be a .npy file with token ids [n, {size}] or vectors [n, dims], n at "
            f"most {_MOST_CHUNKS}",
            param="queries",
        )
    if array.dtype.kind in "iu":
        tokens = array.astype(np.int64)
        if tokens.max(initial=0) >= 2**32:
            raise ApiError(400, "queries hold numbers that are no token ids", param="queries")
        return tokens, None
    vectors = array.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ApiError(400, "queries must be finite", param="queries")
    return np.full((len(vectors), size), -1, np.int64), vectors
