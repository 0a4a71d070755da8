"""Documents of text files, each one document, and of JSONL files, a document a line."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from nearest.corpus.compression import opened
from nearest.corpus.documents import (
    DEFAULT_FIELDS,
    LARGEST_DOCUMENT,
    Document,
    Fields,
    check_storable,
    content_id,
    document_of,
)
from nearest.errors import CorpusError

EncodingErrors = Literal["strict", "replace"]
_PIECE = 1 << 20


def read_text(path: Path, name: str, errors: EncodingErrors, fields: Fields) -> Iterator[Document]:
    """The one document of a text file.

    Args:
        path: the file.
        name: its path below the corpus.
        errors: what to do with text that is not UTF-8.

    Raises:
        CorpusError: it cannot be read, is empty, too long or not UTF-8.
    """
    data = bytearray()  # one read of so many bytes would ask for all of them at once
    try:
        with opened(path) as file:
            while piece := file.read(_PIECE):
                data += piece
                if len(data) > LARGEST_DOCUMENT:
                    raise _too_long(str(path))
    except OSError as error:
        raise _unreadable(path, error) from error
    text = _decode(data, path, 0, errors)
    del data  # it would be kept while the document is read
    yield Document(content_id(name, text), text, {"path": name}, str(path))


def read_jsonl(path: Path, name: str, errors: EncodingErrors, fields: Fields) -> Iterator[Document]:
    """The documents of a JSONL file; raises as `read_text`, and where a line is no document."""
    offset = number = lines = 0
    try:
        with opened(path) as file:
            while line := file.readline(LARGEST_DOCUMENT + 1):
                number += 1
                if len(line) > LARGEST_DOCUMENT:
                    raise _too_long(f"{path}:{number}")
                if line.removeprefix(BOM_UTF8 if offset == 0 else b"").strip():
                    lines += 1
                    text = _decode(line, path, offset, errors)
                    yield parse_line(text, name, f"{path}:{number}", fields)
                offset += len(line)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not lines:
        raise CorpusError(f"{path} is empty: remove it from the corpus, or give it documents")


def parse_line(line: str, name: str, origin: str, fields: Fields = DEFAULT_FIELDS) -> Document:
    """The document of one line of JSON (CorpusError where it is none)."""
    try:
        record: Any = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{origin} is not JSON ({error}): mend or remove the line") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{origin} is not a JSON object: write {{'text': …}} on each line")
    if "\\ud" in line.lower():
        check_storable(record, origin)
    return document_of(record, name, origin, fields)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _decode(data: bytes | bytearray, path: Path, offset: int, errors: EncodingErrors) -> str:
    r"""Text of UTF-8 bytes that start at byte `offset` of the file; \r\n becomes \n."""
    if offset == 0 and data.startswith(BOM_UTF8):
        data, offset = data[len(BOM_UTF8) :], len(BOM_UTF8)
    try:
        text = data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 at byte {offset + error.start:,}: convert it, "
            "or pass --encoding-errors replace"
        ) from error
    text = text.replace("\r\n", "\n")
    if not text:
        raise CorpusError(f"{path} is empty: remove it from the corpus, or give it text")
    return text


def _too_long(origin: str) -> CorpusError:
    return CorpusError(f"{origin} is a document of more than a gigabyte: cut it into several")


def _unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(f"{path} cannot be read ({error.strerror}): check it")
