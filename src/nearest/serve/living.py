"""Documents added, replaced and removed over HTTP, where the server was started as writable.

Writes to one memory are made one after another, in threads of their own. A request under way keeps
the version that it began with; the next one reads the new version.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AfterValidator, Field

from nearest.build.add import IfExists
from nearest.corpus.documents import Document
from nearest.encode.layers import LanguageModel
from nearest.errors import CorpusError, FolderError, NearestError
from nearest.memory import Memory
from nearest.serve.errors import ApiError
from nearest.serve.library import Library
from nearest.serve.schema import Strict, Text
from nearest.serve.service import Service, in_thread
from nearest.serve.shelf import version_of

_AT_ONCE = 1000
_VERSIONS = 8  # of one memory, in use at once: each has its index in RAM
_PATIENCE = 60.0  # seconds that a change waits for requests that use older ones


def _not_blank(text: str) -> str:
    if not text or text.isspace():
        raise ValueError("the text is empty: leave the document out")
    return text


class NewDocument(Strict):
    """A document to add; metadata such as title, url and licence are told with sources."""

    id: Text = Field(min_length=1, max_length=4096)
    text: Annotated[Text, AfterValidator(_not_blank)]
    metadata: dict[str, Any] = Field(default_factory=dict)


class NewDocuments(Strict):
    """`POST /v1/nearest/documents/{memory}`: all are added, or none.

    With `replace`, a document takes the place of the one that has its id, where there is one.
    """

    documents: list[NewDocument] = Field(min_length=1, max_length=_AT_ONCE)
    replace: bool = False


def router(service: Service, model: LanguageModel) -> APIRouter:
    """The routes that change memories."""
    routes = APIRouter()
    tokenizer = service.vocabulary.tokenizer
    one_writer = {name: asyncio.Lock() for name in service.library.names}

    def known(memory: Memory, ids: Sequence[str]) -> list[str]:
        found = service.library.stored_ids(memory).find(ids)
        return [name for name, stored in zip(ids, found, strict=True) if stored is not None]

    async def changed(name: str, change: Callable[[Memory], Memory]) -> dict[str, Any]:
        if name not in one_writer:
            await in_thread(service.library.memory, name)  # says which there are
        async with one_writer[name]:
            await _until_few_versions(service.library, name)
            memory = await in_thread(service.library.memory, name)
            try:
                after = await in_thread(change, memory)
            except FolderError as error:
                raise ApiError(409, str(error), code="not_writable") from error
            except CorpusError as error:
                raise ApiError(400, str(error), param="documents") from error
            except NearestError as error:
                raise ApiError(400, str(error)) from error
            await in_thread(service.library.take_over, name, after)
        return {"memory": name, "version": version_of(after), "documents": after.documents}

    @routes.post("/v1/nearest/documents/{memory}")
    async def add(memory: str, body: NewDocuments) -> dict[str, Any]:
        documents = [Document(one.id, one.text, one.metadata, one.id) for one in body.documents]

        def added(old: Memory) -> Memory:
            there = known(old, [one.id for one in documents])
            if there and not body.replace:
                raise ApiError(
                    409,
                    f"memory {memory!r} has a document {there[0]!r} already: send replace: true, "
                    "or give the new one another id",
                    param="documents",
                    code="document_exists",
                )
            if_exists: IfExists = "replace" if body.replace else "error"
            return old.add(model, tokenizer, documents, if_exists=if_exists)

        return await changed(memory, added)

    @routes.delete("/v1/nearest/documents/{memory}")
    async def remove(
        memory: str,
        document_ids: Annotated[list[str], Query(alias="id", min_length=1, max_length=_AT_ONCE)],
    ) -> dict[str, Any]:
        def removed(old: Memory) -> Memory:
            there = set(known(old, document_ids))
            if gone := [name for name in document_ids if name not in there]:
                raise ApiError(
                    404,
                    f"memory {memory!r} has no document {gone[0]!r}: nothing was removed",
                    param="id",
                )
            return old.remove(document_ids)

        return await changed(memory, removed)

    @routes.post("/v1/nearest/compact/{memory}")
    async def compact(memory: str) -> dict[str, Any]:
        return await changed(memory, lambda old: old.compact())

    return routes


async def _until_few_versions(library: Library, name: str) -> None:
    """Wait while requests under way use too many versions of a memory (ApiError after a while)."""
    until = time.monotonic() + _PATIENCE
    while library.versions_in_use(name) >= _VERSIONS:
        if time.monotonic() > until:
            raise ApiError(
                503,
                f"{_VERSIONS} versions of {name!r} are in use by requests under way, and each is "
                "in RAM: send the change again when some have ended, or several documents at once",
                code="too_many_versions",
                headers={"Retry-After": "5"},
            )
        await asyncio.sleep(0.05)
