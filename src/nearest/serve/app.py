"""The application: one model with its memories behind routes and guards."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nearest.build.match import common_key_layer
from nearest.encode.identity import (
    max_positions,
    model_name,
    reads_sources,
    start_token,
    vocabulary_size,
)
from nearest.encode.layers import KeyLayer, LanguageModel
from nearest.errors import ModelError, NearestError, SettingError
from nearest.memory import Memory
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.lookup import looking_up
from nearest.retro.retrofit import RetrofitForCausalLM
from nearest.serve import about, chunks, completions, living, remote_memory, retrieval
from nearest.serve.engine import Engine, Limits
from nearest.serve.errors import ApiError, of_error, of_http, of_validation
from nearest.serve.guards import (
    LOOPBACK,
    AccessLog,
    BodyLimit,
    KeyGuard,
    SlowClients,
    known_parameters,
)
from nearest.serve.library import Library
from nearest.serve.metrics import Metrics
from nearest.serve.passes import Passes
from nearest.serve.readings import NeighbourSearch, Readings
from nearest.serve.service import Service
from nearest.serve.shelf import Shelf
from nearest.serve.vocabulary import Vocabulary


@dataclass(frozen=True)
class ServeOptions:
    """How a server behaves.

    Attributes:
        model_name: what requests call the model; its own name when not given.
        method: that requests get which name none; hybrid, knn or suffix, what the memory has.
        settings: of that method; as tuned when not given.
        api_key: asked for on every route but `/health`.
        write_key: with it, documents may be added and removed; None: they may not.
        hosts: names by which the server may be called without a key.
        chat_template: in place of the tokenizer's own.
        limits: how much runs and waits.
        draft: let memories and texts draft several tokens for a pass, where that is quicker.
        timeout: seconds that a request may take.
        slow_client: seconds within which a client must send its request's body, and take each piece
            of its answer.
        max_body: bytes of a request's body.
        grace: seconds for what is under way when the server is told to stop.
        force: accept another model than the one that built the memories.
        chunks: finds the neighbours of RETRO's chunks for `/search/chunks`; None: no such route.
        retro: finds the neighbours of a served RETRO model among the memories; None: it reads none.
    """

    model_name: str | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    write_key: str | None = None
    hosts: Sequence[str] = LOOPBACK
    chat_template: str | None = None
    limits: Limits = field(default_factory=Limits)
    draft: bool = False
    timeout: float = 600.0
    slow_client: float = 60.0
    max_body: int = 8 << 20
    grace: float = 20.0
    force: bool = False
    chunks: MemoryNeighbours | None = None
    retro: NeighbourSearch | None = None


def make_service(
    model: LanguageModel, tokenizer: Any, memories: Sequence[Memory], options: ServeOptions
) -> Service:
    """A model with its memories, ready to be started.

    Raises:
        NearestError: they do not fit together.
    """
    if not memories:
        raise SettingError("there is no memory to serve: name at least one")
    if reads_sources(model):
        raise ModelError(
            f"{type(model).__name__} is an encoder–decoder, and the server continues texts: serve "
            "a causal language model"
        )
    layer, readings = _fitted(model, tokenizer, memories, options)
    name = options.model_name or model_name(model).rstrip("/").rpartition("/")[2] or "model"
    vocabulary = Vocabulary(
        tokenizer,
        vocabulary_size(model),
        _stop_tokens(model, tokenizer),
        options.chat_template,
    )
    metrics = Metrics(name)
    plain = model.base if isinstance(model, RetrofitForCausalLM) else model
    engine = Engine(Passes(plain, layer), vocabulary, metrics, options.limits, draft=options.draft)
    first = start_token(tokenizer)
    library = Library(memories, options.method, options.settings, readings, first)
    return Service(
        name,
        vocabulary,
        library,
        engine,
        metrics,
        max_positions(model),
        options.timeout,
        time.time(),
        model if options.write_key is not None else None,
    )


def _fitted(
    model: LanguageModel, tokenizer: Any, memories: Sequence[Memory], options: ServeOptions
) -> tuple[KeyLayer, Readings]:
    """Where the memories' keys are, and what may be read beside texts.

    A RETRO model's memories hold states of texts alone, or of such with neighbours.

    Raises:
        NearestError: model and memories do not fit together.
    """

    def layer() -> KeyLayer:
        return common_key_layer(memories, model, tokenizer, force=options.force)

    search = options.retro
    if search is None:
        return layer(), Readings(model)
    if not hasattr(model, "retro_config"):
        raise ModelError(
            f"{type(model).__name__} reads no neighbours: serve a RETRO or RETROfit model (--retro)"
        )
    with_neighbours = Readings(model, search, keys_alone=False)
    found = with_neighbours.neighbours(memories, with_neighbours.neighbour_settings({})).search
    try:
        return layer(), Readings(model, search)
    except ModelError as alone:
        try:
            with looking_up(model, found):
                return layer(), with_neighbours
        except ModelError:
            raise alone from None


def create_app(service: Service, options: ServeOptions) -> FastAPI:
    """The ASGI application; its engine runs while the application does."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        await service.warm_up()  # what is compiled and read at first use, is before a client waits
        yield
        service.engine.stop()

    app = FastAPI(
        title="nearest",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(known_parameters)],
        telemetry={"auto_configure": False},
    )
    app.include_router(completions.router(service))
    app.include_router(retrieval.router(service))
    app.include_router(remote_memory.router(service.library))
    if options.chunks is not None:
        app.include_router(chunks.router(options.chunks))
    app.include_router(about.router(service))
    engine = service.engine
    app.include_router(
        about.operations(
            service.metrics, service.library, lambda: engine.alive, lambda: engine.accepts
        )
    )
    if service.writer is not None:
        app.include_router(living.router(service, service.writer))
    return _guarded(app, options, service.metrics)


def create_shard_app(shelf: Shelf, options: ServeOptions) -> FastAPI:
    """Look-ups of shards of memories alone (`remote.sharded`), without a model."""
    metrics = Metrics("none")
    app = FastAPI(
        title="nearest",
        version="1",
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(known_parameters)],
        telemetry={"auto_configure": False},
    )
    app.include_router(remote_memory.router(shelf))
    app.include_router(about.operations(metrics, shelf))
    return _guarded(app, options, metrics)


def _guarded(app: FastAPI, options: ServeOptions, metrics: Metrics) -> FastAPI:
    """With errors as clients read them, and what stands before every route."""
    app.add_exception_handler(ApiError, _error)
    app.add_exception_handler(NearestError, _error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(BodyLimit, most=options.max_body, seconds=options.slow_client)
    app.add_middleware(
        KeyGuard, key=options.api_key, write_key=options.write_key, hosts=options.hosts
    )
    app.add_middleware(SlowClients, seconds=options.slow_client)
    app.add_middleware(AccessLog, metrics=metrics)
    return app


async def _error(_request: Request, error: Exception) -> Response:
    return of_error(error).response()


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return of_http(error).response()


async def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return of_validation(error).response()


def _stop_tokens(model: LanguageModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a generation: the model's, and the tokenizer's EOS."""
    config: Any = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    tokens = given if isinstance(given, list) else [given]
    return frozenset(int(t) for t in (*tokens, tokenizer.eos_token_id) if t is not None)
