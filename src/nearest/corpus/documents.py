"""What a document is, and what it may hold.

A document's id is the one given with it, or else made of its path below the corpus and a hash of
its text (and of its source), so that the same file gives the same id on every machine.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nearest.errors import CorpusError

# Bytes of one document's text, or of the line it stands on: what is ever held of it at once.
LARGEST_DOCUMENT = 1 << 30


@dataclass(frozen=True)
class Document:
    """One text with its identity; `origin` is the place that messages name.

    What an encoder reads for it is its metadata's `source`; models without one need none.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "given in memory"


def as_documents(documents: Iterable[Document | str]) -> Iterator[Document]:
    """Let plain strings stand for documents; their ids are made of their text."""
    for document in documents:
        if isinstance(document, str):
            document = Document("", document)
        if not document.text:
            raise CorpusError("a document is empty: leave it out, or give it text")
        check_storable(document.text, document.origin)
        check_storable([document.id, dict(document.metadata)], document.origin)
        if not document.id:
            document = replace(document, id=content_id("text", document.text, document.metadata))
        yield document


def document_of(record: dict[str, Any], name: str, origin: str) -> Document:
    """A document from its fields: `text`, perhaps `id`, and metadata.

    Args:
        record: the fields; it is taken apart.
        name: of the file below the corpus, for an id that is not given.
        origin: the place that messages name.

    Raises:
        CorpusError: there is no text, or the id is neither text nor a whole number.
    """
    text = record.pop("text", None)
    if not isinstance(text, str):
        raise CorpusError(f"{origin} has no 'text' string: every document needs one")
    if not text:
        raise CorpusError(f"{origin} has an empty 'text': remove the document, or give it text")
    given = record.pop("id", None)
    if given is not None and not isinstance(given, str | int):
        raise CorpusError(f"{origin} has an id that is neither text nor a whole number: change it")
    document_id = content_id(name, text, record) if given is None else str(given)
    return Document(document_id, text, record, origin)


def source_of(document: Document) -> str:
    """What an encoder–decoder reads before it writes the document's text.

    Raises:
        CorpusError: there is none.
    """
    source = document.metadata.get("source")
    if not isinstance(source, str):
        raise CorpusError(
            f"{document.origin} has no 'source' string, and this model is an encoder–decoder: give "
            "each document, beside its 'text', the 'source' that the encoder reads"
        )
    if not source:
        raise CorpusError(
            f"{document.origin} has an empty 'source': remove the document, or give it one"
        )
    return source


def check_storable(value: Any, origin: str) -> None:
    """Refuse what JSON or UTF-8 cannot hold: sets, NaN, half of an escaped character."""
    if isinstance(value, str) and value.isascii():
        return
    try:
        text = (
            value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False, allow_nan=False)
        )
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{origin} has a lone surrogate (half of an escaped character): mend the escape"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{origin} has metadata that JSON cannot hold ({error}): change it"
        ) from error


def content_id(name: str, text: str, metadata: Mapping[str, Any] | None = None) -> str:
    """An id made of a name and of the text; also of the source, for sources may share a text."""
    digest = hashlib.sha256(text.encode())
    source = (metadata or {}).get("source")
    if isinstance(source, str):
        digest.update(b"\0" + source.encode())
    return f"{name}#{digest.hexdigest()[:16]}"
