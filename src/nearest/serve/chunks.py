"""`/search/chunks`: the neighbours of chunks, for RETRO models elsewhere (`RemoteNeighbours`)."""

import base64
import binascii
import threading
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from nearest.errors import CorpusError, NearestError
from nearest.remote.wire import SNAPSHOT_HEADER, npy, packed, read_npy
from nearest.retro.data.live import MemoryNeighbours
from nearest.serve.errors import ApiError
from nearest.serve.schema import Strict
from nearest.serve.service import in_thread

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


def router(chunks: MemoryNeighbours) -> APIRouter:
    """The routes; `chunks` finds the neighbours."""
    routes = APIRouter()
    one_at_a_time = threading.Lock()  # an embedder is no place for several threads
    snapshot = chunks.digest

    def found(content: bytes, k: int, continuation: int) -> dict[str, np.ndarray]:
        tokens, vectors = _queries(content, chunks.chunk_size)
        try:
            with one_at_a_time:
                passages = chunks.look_up(tokens, vectors, k, continuation)
        except NearestError as error:
            raise ApiError(400, str(error), param="queries") from error
        sources = passages.sources
        return {
            "ids": passages.ids,
            "distances": passages.distances,
            "tokens": passages.tokens,
            "documents": np.array([[one.document for one in row] for row in sources], np.str_),
            "positions": np.array([[one.position for one in row] for row in sources], np.int64),
        }

    @routes.post("/search/chunks/npy", include_in_schema=False)
    async def binary(
        request: Request, k: Neighbours = 2, continuation: Continuation = 1
    ) -> Response:
        arrays = await in_thread(found, await request.body(), k, continuation)
        headers = {SNAPSHOT_HEADER: snapshot}
        return Response(packed(arrays), media_type="application/zip", headers=headers)

    @routes.post("/search/chunks")
    async def as_json(body: ChunkSearch) -> dict[str, Any]:
        try:
            content = base64.b64decode(body.queries, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, "queries is no base64", param="queries") from error
        arrays = await in_thread(found, content, body.k, body.continuation)
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
