"""What a document is, and what it may hold.

The id of a text file is its path below the corpus; a row without an id gets one made of its file's
path and a hash of its texts. So the same corpus gives the same ids on every machine.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nearest.errors import CorpusError

_as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

# Bytes of one document's text, or of the line it stands on: what is ever held of it at once.
LARGEST_DOCUMENT = 1 << 30


class UnfitFileError(CorpusError):
    """A whole file that is no document; a folder may hold it, and it is left out and counted.

    `reason` is a few words for the count.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


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
        made_id: whether the library made the id, and may number it where it is repeated.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "given in memory"
    encoder_text: str | None = None
    made_id: bool = field(default=False, compare=False, repr=False)


@dataclass(frozen=True)
class Fields:
    """Which fields of a row become what; every other field becomes metadata.

    A dotted name, such as "message.content", reaches into nested objects.

    Attributes:
        text: the field with the text.
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

    A text that is null becomes "", as a document without text.

    Args:
        record: the row.
        name: path of its file below the corpus, for an id made here.
        origin: the place that messages name.
        fields: which of them become what.

    Raises:
        CorpusError: there is no such text field, or a field has a wrong type.
    """
    names = ", ".join(map(repr, record)) or "none"
    found, text = _taken(record, fields.text)
    if not found:
        raise UnfitFileError(
            f"{origin} has no field {fields.text!r} (it has {names}): name the field that holds "
            "the text (--text-field; in Python text_field)",
            f"without a field {fields.text!r}",
        )
    if not isinstance(text, str | None):
        raise CorpusError(
            f"{origin} has no text in its field {fields.text!r}, but {_kind(text)}: change it, or "
            "name another field (--text-field)"
        )
    _, given = _taken(record, fields.id)
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise CorpusError(
            f"{origin} has in its field {fields.id!r} neither text nor a whole number, but "
            f"{_kind(given)}: change it, or name another field (--id-field)"
        )
    encoder_text = record.pop("encoder_text", None)
    if encoder_text is None and fields.encoder_text is not None:
        _, encoder_text = _taken(record, fields.encoder_text)
    if not isinstance(encoder_text, str | None):
        raise CorpusError(
            f"{origin} has no text in its field {fields.encoder_text or 'encoder_text'!r}, but "
            f"{_kind(encoder_text)}: change it"
        )
    for part in (given, text, encoder_text):
        check_storable(part, origin)
    text = text or ""
    if given is None or given == "":
        made = content_id(name, text, encoder_text)
        return Document(made, text, record, origin, encoder_text, made_id=True)
    return Document(str(given), text, record, origin, encoder_text)


def _taken(record: dict[str, Any], field_name: str) -> tuple[bool, Any]:
    """Whether there is such a field, and its value, which leaves the record."""
    if field_name in record:
        return True, record.pop(field_name)
    outer, dot, inner = field_name.partition(".")
    if not dot or not isinstance(record.get(outer), dict):
        return False, None
    record[outer] = nested = dict(record[outer])
    return _taken(nested, inner)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", bytes: "bytes"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "another value")


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
        text = value if isinstance(value, str) else _as_json(value)
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
