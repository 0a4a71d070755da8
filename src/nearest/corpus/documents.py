"""Documents from `.txt`, `.md` and `.jsonl` files and folders of them, one at a time.

A document's id is the one given in JSONL, or else made of its path below the corpus and a hash of
its text, so that the same file gives the same id on every machine.
"""

import hashlib
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nearest.errors import CorpusError

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
EncodingErrors = Literal["strict", "replace"]


@dataclass(frozen=True)
class Document:
    """One text with its identity; `origin` is the place that messages name."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "given in memory"


def read_documents(
    paths: Iterable[str | Path], *, encoding_errors: EncodingErrors = "strict"
) -> Iterator[Document]:
    """Stream the documents of files and folders (recursive, in sorted order).

    That every path exists is checked at once, what it holds when it is read.

    Args:
        paths: files (.txt, .md, .jsonl) or folders; hidden files and folders are passed over.
        encoding_errors: "strict" refuses text that is not UTF-8; "replace" puts U+FFFD there.

    Raises:
        CorpusError: a path is missing, a file is empty or of an unknown kind, text is not UTF-8, a
            JSONL line is malformed, or nothing is found at all.
    """
    given = [Path(path) for path in paths]
    if not given:
        raise CorpusError("no corpus was given: name at least one file or folder")
    for path in given:
        _check_exists(path)
    return _read(given, encoding_errors)


def _read(paths: Iterable[Path], encoding_errors: EncodingErrors) -> Iterator[Document]:
    for given in paths:
        for path, name in _files(given):
            if path.suffix.lower() == ".jsonl":
                yield from _read_jsonl(path, name, encoding_errors)
            else:
                text = _decode(_read_bytes(path), path, 0, encoding_errors)
                yield Document(_content_id(name, text), text, {"path": name}, str(path))


def with_unique_ids(documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents through, refusing the second of two that share an id, with both places."""
    origins: dict[str, str] = {}
    for document in documents:
        if document.id in origins:
            raise CorpusError(
                f"document id {document.id!r} stands twice, in {origins[document.id]} and in "
                f"{document.origin}: ids must be unique; give them ids of their own, or remove one"
            )
        origins[document.id] = document.origin
        yield document


def as_documents(documents: Iterable[Document | str]) -> Iterator[Document]:
    """Let plain strings stand for documents; their ids are made of their text."""
    for document in documents:
        if isinstance(document, str):
            document = Document("", document)
        if not document.text:
            raise CorpusError("a document is empty: leave it out, or give it text")
        _check_storable([document.id, document.text, dict(document.metadata)], document.origin)
        yield document if document.id else replace(document, id=_content_id("text", document.text))


def _check_exists(given: Path) -> None:
    try:
        given.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorpusError(f"{given} does not exist: check the path of the corpus") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"{given} cannot be read ({reason}): check its path") from error


def _files(given: Path) -> Iterator[tuple[Path, str]]:
    """(path, name below the corpus) of a file itself or of a folder's files in sorted order."""
    if given.is_file():
        if given.suffix.lower() not in SUFFIXES:
            raise CorpusError(f"{given} is none of {', '.join(SUFFIXES)}: convert or rename it")
        yield given, given.name
    elif given.is_dir():
        found = False
        for folder, subfolders, names in os.walk(given, onerror=_refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                    found = True
                    _check_name(path)
                    yield path, path.relative_to(given).as_posix()
        if not found:
            raise CorpusError(f"{given} holds no {', '.join(SUFFIXES)} file: name another folder")
    else:
        raise CorpusError(f"{given} does not exist: check the path of the corpus")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _refuse(error: OSError) -> None:
    raise CorpusError(f"{error.filename} cannot be read ({error.strerror}): check it") from error


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{str(path)!r} has a name that is not UTF-8: rename it") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}): check it") from error


def _decode(data: bytes, path: Path, offset: int, errors: EncodingErrors) -> str:
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


def _read_jsonl(path: Path, name: str, errors: EncodingErrors) -> Iterator[Document]:
    offset = 0
    lines = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(BOM_UTF8 if offset == 0 else b"").strip():
                    lines += 1
                    text = _decode(line, path, offset, errors)
                    yield _parse_line(text, name, f"{path}:{number}")
                offset += len(line)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}): check it") from error
    if not lines:
        raise CorpusError(f"{path} is empty: remove it from the corpus, or give it documents")


def _parse_line(line: str, name: str, origin: str) -> Document:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{origin} is not JSON ({error}): mend or remove the line") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{origin} is not a JSON object: write {{'text': …}} on each line")
    text = record.pop("text", None)
    if not isinstance(text, str):
        raise CorpusError(f"{origin} has no 'text' string: every line needs one")
    if not text:
        raise CorpusError(f"{origin} has an empty 'text': remove the line, or give it text")
    if "\\ud" in line.lower():
        _check_storable([text, record], origin)
    given = record.pop("id", None)
    if given is not None and not isinstance(given, str | int):
        raise CorpusError(f"{origin} has an id that is neither text nor a whole number: change it")
    return Document(_content_id(name, text) if given is None else str(given), text, record, origin)


def _check_storable(value: Any, origin: str) -> None:
    """Refuse what JSON or UTF-8 cannot hold: sets, NaN, half of an escaped character."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{origin} has a lone surrogate (half of an escaped character): mend the escape"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{origin} has metadata that JSON cannot hold ({error}): change it"
        ) from (error)


def _content_id(name: str, text: str) -> str:
    return f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:16]}"
