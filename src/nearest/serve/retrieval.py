"""Searches over HTTP, without the model: entries near hidden states, and places of a text.

Arrays are `.npy`, as they are or in base64 inside JSON. Every answer names the memory's version,
since ids of one version mean nothing in another.
"""

import base64
import binascii
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query
from jaxtyping import Float
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from nearest.errors import CorpusError, SettingError
from nearest.memory import Memory
from nearest.remote.memory import RemoteMemory
from nearest.remote.wire import SNAPSHOT_HEADER, VERSION_HEADER, npy, packed, read_npy
from nearest.serve.errors import ApiError
from nearest.serve.schema import Strict, Text
from nearest.serve.service import Service, in_thread
from nearest.serve.shelf import version_of

MOST_NEIGHBOURS = 4096
_MOST_NUMBERS = 1 << 24  # in an answer: 64 MB of float32
Neighbours = Annotated[int, Query(ge=1, le=MOST_NEIGHBOURS)]


class TokenSearch(Strict):
    """`POST /search/tokens` as JSON: `queries` are a float32 `.npy` [q, dim] in base64."""

    queries: str
    memory: Text | None = None
    k: int = Field(16, ge=1, le=MOST_NEIGHBOURS)
    distances: Literal["keys", "index"] = "keys"


class TextSearch(Strict):
    """`POST /search/text`: where the end of a text stands in a memory."""

    text: Text = Field(min_length=1)
    memory: Text | None = None
    k: int = Field(10, ge=1, le=100)


def router(service: Service) -> APIRouter:
    """The routes of the retrieval service."""
    routes = APIRouter()

    def searched(
        name: str | None, queries: Float[np.ndarray, "q dim"], k: int, distances: str
    ) -> tuple[Memory, dict[str, Any]]:
        _, memory = service.library.chosen(name)
        if len(queries) * k > _MOST_NUMBERS:
            raise ApiError(400, "this asks for too many neighbours at once", param="k")
        try:
            found = memory.search(queries, k, distances)
        except SettingError as error:
            raise ApiError(400, str(error), param="queries") from error
        return memory, {
            "ids": found.ids,
            "distances": found.distances,
            "values": memory.values(found.ids),
        }

    @routes.post("/search/tokens/npy", include_in_schema=False)
    async def tokens_binary(
        request: Request,
        k: Neighbours = 16,
        memory: str | None = None,
        distances: Literal["keys", "index"] = "keys",
    ) -> Response:
        queries = queries_of(await request.body(), "body")
        opened, arrays = await in_thread(searched, memory, queries, k, distances)
        return zipped(arrays, opened)

    @routes.post("/search/tokens")
    async def tokens(body: TokenSearch) -> dict[str, Any]:
        try:
            raw = base64.b64decode(body.queries, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, "queries is no base64", param="queries") from error
        queries = queries_of(raw, "queries")
        opened, arrays = await in_thread(searched, body.memory, queries, body.k, body.distances)
        encoded = {name: base64.b64encode(npy(array)).decode() for name, array in arrays.items()}
        return {"version": version_of(opened), **encoded}

    @routes.post("/search/text")
    async def text(body: TextSearch) -> dict[str, Any]:
        return await in_thread(_text, service, body)

    @routes.post("/query", include_in_schema=False)
    async def query(request: Request, k: Neighbours = 4, memory: str | None = None) -> Response:
        queries = queries_of(await request.body(), "body")

        def work() -> Response:
            if len(queries) * k * queries.shape[1] > _MOST_NUMBERS:
                raise ApiError(400, "this asks for too many neighbours at once", param="k")
            if isinstance(service.library.chosen(memory)[1], RemoteMemory):
                raise ApiError(
                    400,
                    "this memory is held by another server, and its keys are read there: ask that "
                    "server, or /search/tokens here",
                    param="memory",
                )
            opened, arrays = searched(memory, queries, k, "keys")
            ids = _wide(arrays["ids"], k, -1)
            embeddings = np.zeros((*ids.shape, queries.shape[1]), np.float32)
            found = ids >= 0
            embeddings[found] = opened.keys.rows(ids[found])
            distances = _wide(arrays["distances"], k, np.inf).astype(np.float32)
            told = {"distances": distances, "indices": ids, "embeddings": embeddings}
            return zipped(told, opened, suffix=False)

        return await in_thread(work)

    return routes


def _wide(array: np.ndarray, k: int, fill: float) -> np.ndarray:
    """With k columns, where a memory has fewer entries."""
    return np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=fill)


def _text(service: Service, body: TextSearch) -> dict[str, Any]:
    name, memory = service.library.chosen(body.memory)
    rules = memory.manifest.model
    read = service.vocabulary.prompt(
        body.text, rules.start_token, special_tokens=rules.special_tokens
    )
    tokens = np.array(read, np.int64)
    found = memory.longest_matches(tokens, np.array([len(tokens) - 1]), body.k)
    ids, lengths = found.ids[0], found.lengths[0]
    some = (ids >= 0) & (lengths > 0)
    documents, positions = memory.places(ids[some])
    matches = []
    for number, position, length in zip(
        documents.tolist(), positions.tolist(), lengths[some].tolist(), strict=True
    ):
        heading = service.library.heading(memory, number)
        matches.append(
            {
                "document": heading.id,
                "title": heading.title,
                "position": position,
                "length": length,
            }
        )
    return {"memory": name, "version": version_of(memory), "matches": matches}


def queries_of(content: bytes, param: str) -> Float[np.ndarray, "q dim"]:
    """Queries from the bytes of a `.npy` file, one of them or several (ApiError)."""
    wrong = ApiError(
        400, "the queries must be a .npy file with floats [queries, dims], all finite", param=param
    )
    try:
        queries = read_npy(content)
    except CorpusError as error:
        raise wrong from error
    queries = queries[None] if queries.ndim == 1 else queries
    if queries.ndim != 2 or queries.dtype.kind != "f" or not queries.size:
        raise wrong
    queries = queries.astype(np.float32)
    if not np.isfinite(queries).all():
        raise wrong
    return queries


def zipped(arrays: dict[str, np.ndarray], memory: Memory, *, suffix: bool = True) -> Response:
    """Arrays as a stored zip, with the memory's version."""
    return Response(
        packed(arrays, suffix=suffix),
        media_type="application/zip",
        headers={
            VERSION_HEADER: str(version_of(memory)),
            SNAPSHOT_HEADER: memory.manifest.checksum,
        },
    )
