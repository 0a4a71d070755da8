"""What `RemoteMemory` asks: the look-ups of a memory, one route each, arrays in and arrays out.

A request may name the snapshot that it means (the checksum of the manifest). If the memory has
changed since it is refused with 409, since ids of one snapshot mean nothing in another.
"""

import base64
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from nearest.errors import CorpusError, SettingError
from nearest.memory import Memory
from nearest.remote import calls
from nearest.remote.wire import unpacked
from nearest.serve.errors import ApiError
from nearest.serve.retrieval import MOST_NEIGHBOURS, zipped
from nearest.serve.service import in_thread
from nearest.serve.shelf import Shelf, version_of


def router(shelf: Shelf) -> APIRouter:
    """The routes that `RemoteMemory` uses."""
    routes = APIRouter()

    def meant(name: str | None, snapshot: str | None) -> tuple[str, Memory]:
        name, memory = shelf.chosen(name)
        if snapshot not in (None, memory.manifest.checksum):
            raise ApiError(
                409,
                f"memory {name!r} has changed: it is now at version {version_of(memory)}. Ask what "
                "it is again, and go on with that",
                param="snapshot",
                code="another_version",
            )
        return name, memory

    def about(name: str | None) -> dict[str, Any]:
        name, memory = meant(name, None)
        return {
            "name": name,
            "version": version_of(memory),
            "snapshot": memory.manifest.checksum,
            "documents": memory.documents,
            "entries": memory.entries,
            "positions": memory.positions,
            "has_weights": memory.has_weights,
            "shard": None if memory.shard is None else str(memory.shard),
            "groups": {} if memory.shard is None else _groups(memory),
            "manifest": msgspec.to_builtins(memory.manifest),
            "gates": {
                method: base64.b64encode(file.data).decode()
                for method in memory.manifest.gates
                if (file := memory.gate(method)) is not None
            },
        }

    @routes.get("/search/memory")
    async def memory_about(memory: str | None = None) -> dict[str, Any]:
        return await in_thread(about, memory)

    @routes.get("/search/memory/document")
    async def document(
        number: Annotated[int, Query(ge=0, lt=2**63)],
        memory: str | None = None,
        snapshot: str | None = None,
    ) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            name, opened = meant(memory, snapshot)
            if number >= opened.documents:
                raise ApiError(404, f"memory {name!r} has {opened.documents:,} documents")
            found = opened.document(number)
            return {"id": found.id, "text": found.text, "metadata": dict(found.metadata)}

        return await in_thread(work)

    @routes.get("/search/memory/number")
    async def number_of(
        document_id: Annotated[str, Query(alias="id", max_length=4096)],
        memory: str | None = None,
        snapshot: str | None = None,
    ) -> dict[str, Any]:
        _, opened = await in_thread(meant, memory, snapshot)
        return {"number": await in_thread(shelf.number, opened, document_id)}

    @routes.post("/search/memory/{call}", include_in_schema=False)
    async def look_up(
        call: str,
        request: Request,
        memory: str | None = None,
        snapshot: str | None = None,
        k: Annotated[int, Query(ge=1, le=MOST_NEIGHBOURS)] = 16,
        distances: Literal["keys", "index"] = "keys",
        rerank: Annotated[int, Query(ge=0, le=MOST_NEIGHBOURS)] = 0,
        ordered: bool = True,
        length: Annotated[int, Query(ge=1, le=512)] = 1,
    ) -> Response:
        if call not in calls.names():
            raise ApiError(404, f"there is no look-up {call!r}: choose {', '.join(calls.names())}")
        body = await request.body()
        options = calls.Options(k, distances, rerank, ordered, length)

        def work() -> Response:
            _, opened = meant(memory, snapshot)
            try:
                arrays = unpacked(body) if body else {}
                return zipped(calls.answered(opened, call, arrays, options), opened)
            except CorpusError as error:
                raise ApiError(400, f"the body is no zip of .npy files: {error}") from error
            except SettingError as error:
                raise ApiError(400, str(error)) from error

        return await in_thread(work)

    return routes


def _groups(memory: Memory) -> dict[str, Any]:
    """What a shard searches, for whoever puts shards together."""
    if memory.manifest.keys is None or not memory.segments:
        return {}
    searcher = memory.searcher
    return {
        one.name: msgspec.to_builtins(group)
        for one, group in zip(searcher.searched, searcher.groups, strict=True)
    }
