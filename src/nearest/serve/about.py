"""Routes that tell about the server: models, tokens, documents, health, metrics and the viewer."""

import base64
import hashlib
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Query
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from nearest.errors import NearestError
from nearest.retrieval.settings import BASE
from nearest.serve.errors import ApiError
from nearest.serve.extension import schemas
from nearest.serve.metrics import Metrics
from nearest.serve.schema import DetokenizeRequest, TokenizeRequest
from nearest.serve.service import Service, in_thread
from nearest.serve.shelf import Heading, Shelf, version_of

log = logging.getLogger(__name__)

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = resources.files("nearest.serve").joinpath("page")
# The page loads nothing from elsewhere, runs no script but its own, and can be in no frame.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {styles}; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DOCUMENTS_A_PAGE = 100


def operations(
    metrics: Metrics,
    shelf: Shelf,
    alive: Callable[[], bool] = lambda: True,
    accepts: Callable[[], bool] = lambda: True,
) -> APIRouter:
    """The routes that those who run the server ask."""
    routes = APIRouter()

    @routes.get("/health")
    async def health(request: Request) -> Response:
        word, status = ("ok", 200) if alive() else ("dead", 503)
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse({"status": word}, status)
        return PlainTextResponse(word, status)  # what IndexServiceClient of nitin966/retro expects

    @routes.get("/ready")
    async def ready() -> Response:
        if accepts():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, 503, {"Retry-After": "1"})

    @routes.get("/metrics")
    async def told() -> Response:
        await in_thread(_count, metrics, shelf)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes


def _count(metrics: Metrics, shelf: Shelf) -> None:
    """Note what the memories hold now, as far as they can be read."""
    for name in shelf.names:
        try:
            memory = shelf.memory(name)
        except NearestError as error:
            log.warning("%s", error)
            continue
        metrics.documents.labels(name).set(memory.documents)
        metrics.version.labels(name).set(version_of(memory))


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    vocabulary = service.vocabulary

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, n) for n in service.model_names]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.method(name)
        return _model(service, name)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            service.method(body.model)
        tokens = await in_thread(vocabulary.encode, body.prompt, body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.positions}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            service.method(body.model)
        vocabulary.check(body.tokens, "tokens")
        tokens = body.tokens
        return {"prompt": await in_thread(lambda: vocabulary.decode(tokens, special=True))}

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = vocabulary.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "chat_template": vocabulary.chat_template,
            "vocab_size": vocabulary.size,
        }

    @routes.get("/v1/nearest")
    async def about() -> dict[str, Any]:
        return await in_thread(_about, service)

    @routes.get("/v1/nearest/schema")
    async def schema() -> dict[str, Any]:
        return schemas()

    @routes.get("/v1/nearest/documents/{memory}")
    async def documents(
        memory: str,
        document_id: Annotated[str | None, Query(alias="id", max_length=4096)] = None,
        start: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    ) -> dict[str, Any]:
        if document_id is None:
            return await in_thread(_listed, service, memory, start)
        return await in_thread(_document, service, memory, document_id)

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return await in_thread(_page_file, "index.html")

    @routes.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return await in_thread(_page_file, name)

    return routes


def _page_file(name: str) -> Response:
    """A file of the viewer."""
    kind = _KINDS.get(PurePosixPath(name).suffix)
    content = None if kind is None else _content(name)
    if content is None:
        raise ApiError(404, f"the viewer has no file {name!r}")
    styles = "'self'"
    if name == "index.html":
        content, styles = _with_styles()
    headers = {
        "Content-Security-Policy": _PAGE_POLICY.format(styles=styles),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)


@lru_cache(1)
def _with_styles() -> tuple[bytes, str]:
    """The page with its style sheet inside, so that it is painted at once; the sheet's hash."""
    page, sheet = _content("index.html"), _content("viewer.css")
    assert page is not None
    assert sheet is not None
    link = b'<link rel="stylesheet" href="/page/viewer.css">'
    digest = base64.b64encode(hashlib.sha256(sheet).digest()).decode()
    return page.replace(link, b"<style>%b</style>" % sheet), f"'sha256-{digest}'"


@lru_cache(64)  # more names than there are files: a stranger may ask for any
def _content(name: str) -> bytes | None:
    file = _PAGE.joinpath(name)
    return file.read_bytes() if file.is_file() else None


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "nearest",
        "max_model_len": service.positions,
    }


def _about(service: Service) -> dict[str, Any]:
    """What a viewer needs to begin with."""
    library = service.library
    return {
        "version": 1,
        "model": service.model_name,
        "methods": library.methods,
        "method": library.method,
        "settings": {
            method: {} if method == BASE else library.settings_of(method)
            for method in library.methods
        },
        "chat": service.vocabulary.chat_template is not None,
        "max_model_len": service.positions,
        "writable": service.writer is not None,
        "uptime": time.time() - service.started,
        "memories": [
            {
                "name": name,
                "version": version_of(memory),
                "documents": memory.documents,
                "entries": memory.entries,
            }
            for name, memory in ((n, library.memory(n)) for n in library.names)
        ],
    }


def _listed(service: Service, name: str, start: int) -> dict[str, Any]:
    """Documents of a memory, some at a time."""
    memory = service.library.memory(name)
    numbers = range(start, min(memory.documents, start + _DOCUMENTS_A_PAGE))
    documents = (memory.document(number) for number in numbers)
    return {
        "memory": name,
        "version": version_of(memory),
        "total": memory.documents,
        "documents": [
            {
                "id": one.id,
                "title": Heading.of(one).title,
                "metadata": dict(one.metadata),
                "characters": len(one.text),
            }
            for one in documents
        ],
    }


def _document(service: Service, name: str, document_id: str) -> dict[str, Any]:
    """A whole document, with the place in the text of every token."""
    memory = service.library.memory(name)
    number = service.library.number(memory, document_id)
    if number is None:
        raise ApiError(404, f"memory {name!r} has no document {document_id!r}", param="id")
    document = memory.document(number)
    tokens = memory.document_tokens(number).tolist()
    return {
        "memory": name,
        "version": version_of(memory),
        "id": document.id,
        "title": Heading.of(document).title,
        "metadata": dict(document.metadata),
        "text": document.text,
        "pieces": service.vocabulary.pieces(tokens),
    }
