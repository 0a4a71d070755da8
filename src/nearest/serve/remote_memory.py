"""What `RemoteMemory` asks: the look-ups of a memory, one route each, arrays in and arrays out.

A request may name the snapshot that it means (the checksum of the manifest). If the memory has
changed since it is refused with 409, since ids of one snapshot mean nothing in another.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import numpy as np
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from nearest.errors import CorpusError, SettingError
from nearest.memory import Memory
from nearest.remote.wire import unpacked
from nearest.serve.errors import ApiError
from nearest.serve.library import version_of
from nearest.serve.retrieval import MOST_NEIGHBOURS, zipped
from nearest.serve.service import Service, in_thread

_MOST_NUMBERS = 1 << 22  # of one array in an answer

Arrays = Mapping[str, np.ndarray]
Distances = Literal["keys", "index"]


class _Options(NamedTuple):
    """What a look-up takes beside arrays; each uses those that it needs."""

    k: int
    distances: Distances
    rerank: int
    ordered: bool
    length: int


class _Call(NamedTuple):
    """A look-up: the arrays that it takes, with their dimensions, and what it answers."""

    takes: Mapping[str, int]
    answer: Callable[[Memory, Arrays, _Options], dict[str, np.ndarray]]


def router(service: Service) -> APIRouter:
    """The routes that `RemoteMemory` uses."""
    routes = APIRouter()

    def meant(name: str | None, snapshot: str | None) -> tuple[str, Memory]:
        name, memory = service.library.chosen(name)
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
            found = service.library.document(opened, number)
            return {"id": found.id, "text": found.text, "metadata": dict(found.metadata)}

        return await in_thread(work)

    @routes.get("/search/memory/number")
    async def number_of(
        document_id: Annotated[str, Query(alias="id", max_length=4096)],
        memory: str | None = None,
        snapshot: str | None = None,
    ) -> dict[str, Any]:
        _, opened = await in_thread(meant, memory, snapshot)
        return {"number": await in_thread(service.library.number, opened, document_id)}

    @routes.post("/search/memory/{call}", include_in_schema=False)
    async def look_up(
        call: str,
        request: Request,
        memory: str | None = None,
        snapshot: str | None = None,
        k: Annotated[int, Query(ge=1, le=MOST_NEIGHBOURS)] = 16,
        distances: Distances = "keys",
        rerank: Annotated[int, Query(ge=0, le=MOST_NEIGHBOURS)] = 0,
        ordered: bool = True,
        length: Annotated[int, Query(ge=1, le=512)] = 1,
    ) -> Response:
        if call not in _CALLS:
            raise ApiError(404, f"there is no look-up {call!r}: choose {', '.join(_CALLS)}")
        body = await request.body()
        options = _Options(k, distances, rerank, ordered, length)

        def work() -> Response:
            _, opened = meant(memory, snapshot)
            arrays = _checked(body, _CALLS[call].takes, opened)
            rows = max((len(arrays[name]) for name in arrays if name != "context"), default=0)
            if rows * k > _MOST_NUMBERS:
                raise ApiError(400, "this asks for too much at once", param="k")
            try:
                return zipped(_CALLS[call].answer(opened, arrays, options), opened)
            except SettingError as error:
                raise ApiError(400, str(error)) from error

        return await in_thread(work)

    return routes


def _checked(body: bytes, takes: Mapping[str, int], memory: Memory) -> dict[str, np.ndarray]:
    """The arrays of a body, each what a look-up may be given (ApiError)."""
    try:
        arrays = unpacked(body) if body else {}
    except CorpusError as error:
        raise ApiError(400, f"the body is no zip of .npy files: {error}") from error
    if set(arrays) != set(takes):
        raise ApiError(400, f"send the arrays {', '.join(takes)}, got {', '.join(arrays)}")
    for name, dims in takes.items():
        array = arrays[name]
        if array.ndim != dims or array.dtype.kind not in ("f" if name == "queries" else "iu"):
            raise ApiError(400, f"{name} must be {dims}-dimensional numbers", param=name)
        if name == "queries":
            arrays[name] = array.astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise ApiError(400, "queries must be finite", param=name)
            continue
        arrays[name] = array.astype(np.int64)
        least, limit = _range_of(name, arrays, memory)
        if array.size and not (arrays[name].min() >= least and arrays[name].max() < limit):
            raise ApiError(400, f"{name} must lie in [{least}, {limit})", param=name)
    rows = {len(arrays[name]) for name in takes if name in ("queries", "ids", "ends")}
    if len(rows) > 1:
        raise ApiError(400, "the arrays have different numbers of rows")
    return arrays


def _range_of(name: str, arrays: Arrays, memory: Memory) -> tuple[int, int]:
    if name == "ids":
        return -1, memory.positions
    if name == "ends":
        return 0, len(arrays["context"]) + 1
    return -1, 2**32  # tokens; -1 stands between contexts


def _search(memory: Memory, given: Arrays, options: _Options) -> dict[str, np.ndarray]:
    k, distances, rerank, ordered, _ = options
    found = memory.search(given["queries"], k, distances, rerank, ordered=ordered)
    return {**found._asdict(), "values": memory.values(found.ids)}


def _distances(memory: Memory, given: Arrays, options: _Options) -> dict[str, np.ndarray]:
    measured = memory.key_distances if options.distances == "keys" else memory.index_distances
    ids = given["ids"]
    return {"distances": measured(given["queries"], ids), "values": memory.values(ids)}


def _longest_matches(memory: Memory, given: Arrays, options: _Options) -> dict[str, np.ndarray]:
    found = memory.longest_matches(*_text(given), options.k)
    return {**found._asdict(), "values": memory.values(found.ids)}


def _equal_documents(memory: Memory, given: Arrays, _: _Options) -> dict[str, np.ndarray]:
    documents = np.split(given["context"], given["ends"])[:-1]
    return {"ids": memory.equal_documents(list(documents))}


def _spans_stand(memory: Memory, given: Arrays, options: _Options) -> dict[str, np.ndarray]:
    if options.length < 2 or given["ends"].min(initial=options.length) < options.length - 1:
        raise SettingError("spans have at least 2 tokens, and begin inside the context")
    return {"stand": memory.spans_stand(*_text(given), options.length)}


def _places(memory: Memory, given: Arrays, _: _Options) -> dict[str, np.ndarray]:
    if (given["ids"] < 0).any():
        raise SettingError("entries must be at least 0")
    documents, positions = memory.places(given["ids"])
    return {"documents": documents, "positions": positions}


def _document_tokens(memory: Memory, given: Arrays, _: _Options) -> dict[str, np.ndarray]:
    numbers = given["ids"].tolist()
    if len(numbers) != 1 or not 0 <= numbers[0] < memory.documents:
        raise SettingError("give the number of one document")
    return {"tokens": memory.document_tokens(numbers[0])}


def _clusters(memory: Memory, _given: Arrays, _: _Options) -> dict[str, np.ndarray]:
    if memory.clusters is None:
        raise SettingError("the memory has no clusters")
    return cast(dict[str, np.ndarray], vars(memory.clusters))


def _text(given: Arrays) -> tuple[np.ndarray, np.ndarray]:
    if given["ends"].size and given["ends"].max() >= len(given["context"]):
        raise SettingError("ends must lie inside the context")
    return given["context"], given["ends"]


_CALLS = {
    "search": _Call({"queries": 2}, _search),
    "distances": _Call({"queries": 2, "ids": 2}, _distances),
    "values": _Call({"ids": 1}, lambda m, given, _: {"values": m.values(given["ids"])}),
    "successors": _Call({"ids": 1}, lambda m, given, _: {"successors": m.successors(given["ids"])}),
    "log_weights": _Call(
        {"ids": 1}, lambda m, given, _: {"log_weights": m.log_weights(given["ids"])}
    ),
    "longest_matches": _Call({"context": 1, "ends": 1}, _longest_matches),
    "match_lengths": _Call(
        {"context": 1, "ends": 1, "ids": 2},
        lambda m, given, _: {"lengths": m.match_lengths(given["ids"], *_text(given))},
    ),
    "ngrams": _Call(
        {"context": 1, "ends": 1},
        lambda m, given, options: m.ngrams(*_text(given), options.length)._asdict(),
    ),
    "spans_stand": _Call({"context": 1, "ends": 1}, _spans_stand),
    "equal_documents": _Call({"context": 1, "ends": 1}, _equal_documents),
    "places": _Call({"ids": 1}, _places),
    "document_tokens": _Call({"ids": 1}, _document_tokens),
    "clusters": _Call({}, _clusters),
}
