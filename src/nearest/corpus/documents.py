"""What a document is, and what it may hold.

A document's id is the one given with it, or else made of its path below the corpus and a hash of
its text (and of its encoder text), so that the same file gives the same id on every machine.
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
    """One text with its identity.

    Attributes:
        id: unique in a memory; "" for one made of the text.
        text: what is predicted.
        metadata: anything that JSON holds; returned with search results.
        origin: where the document was read, for messages.
        encoder_text: what an encoder–decoder's encoder reads before `text` is predicted; other
            models ignore it.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "given in memory"
    encoder_text: str | None = None


def as_documents(documents: Iterable[Document | str]) -> Iterator[Document]:
    """Let plain strings stand for documents; their ids are made of their text."""
    for document in documents:
        if isinstance(document, str):
            document = Document("", document)
        if not document.text:
            raise CorpusError("a document is empty: leave it out, or give it text")
        check_storable(document.text, document.origin)
        check_storable(document.encoder_text or "", document.origin)
        check_storable([document.id, dict(document.metadata)], document.origin)
        if not document.id:
            made = content_id("text", document.text, document.encoder_text)
            document = replace(document, id=made)
        yield document


@dataclass(frozen=True)
class Fields:
    """Which fields of a row become what; every other field becomes metadata.

    Attributes:
        text: the field with the text. A dotted name reaches into nested objects.
        id: the field with the id.
        encoder_text: the field that an encoder reads, in rows without `encoder_text`.
    """

    text: str = "text"
    id: str = "id"
    encoder_text: str | None = None


DEFAULT_FIELDS = Fields()


def document_of(
    record: dict[str, Any], name: str, origin: str, fields: Fields = DEFAULT_FIELDS
) -> Document:
    """A document from the fields of a row; `record` is emptied of what is not metadata.

    Args:
        record: the row.
        name: path of its file below the corpus, for an id made here.
        origin: the place that messages name.
        fields: which of them become what.

    Raises:
        CorpusError: there is no text, or a field has a wrong type.
    """
    text = record.pop(fields.text, None)
    if not isinstance(text, str):
        raise CorpusError(f"{origin} has no {fields.text!r} string: every document needs one")
    if not text:
        raise CorpusError(f"{origin} has an empty {fields.text!r}: remove it, or give it text")
    given = record.pop(fields.id, None)
    if given is not None and not isinstance(given, str | int):
        raise CorpusError(f"{origin} has an id that is neither text nor a whole number: change it")
    encoder_text = record.pop("encoder_text", None)
    if encoder_text is None and fields.encoder_text is not None:
        encoder_text = record.pop(fields.encoder_text, None)
    if not isinstance(encoder_text, str | None):
        field = fields.encoder_text or "encoder_text"
        raise CorpusError(f"{origin} has a field {field!r} that is not text: change it")
    document_id = content_id(name, text, encoder_text) if given is None else str(given)
    return Document(document_id, text, record, origin, encoder_text)


def encoder_text_of(document: Document) -> str:
    """What an encoder–decoder's encoder reads for a document.

    Raises:
        CorpusError: there is none.
    """
    if not document.encoder_text:
        raise CorpusError(
            f"{document.origin} has no text for the encoder, and this model is an encoder–decoder: "
            "give each document an 'encoder_text' beside its 'text', or name the field that holds "
            "it (--encoder-field; in Python encoder_field)"
        )
    return document.encoder_text


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


def content_id(name: str, text: str, encoder_text: str | None = None) -> str:
    """An id made of a name and a hash of the text and of the encoder text."""
    digest = hashlib.sha256(text.encode())
    if encoder_text is not None:
        digest.update(b"\0" + encoder_text.encode())
    return f"{name}#{digest.hexdigest()[:16]}"
