"""Documents of text files, one each; of JSON and of tables with separators, one a row."""

import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from nearest.corpus.compression import opened
from nearest.corpus.decoding import Decoding, text_pieces
from nearest.corpus.documents import (
    DEFAULT_FIELDS,
    LARGEST_DOCUMENT,
    Document,
    Fields,
    check_storable,
    document_of,
)
from nearest.corpus.report import CorpusReport
from nearest.errors import CorpusError

STANDARD_INPUT = Path("/dev/stdin")
_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class CorpusFile:
    """A file to be read, and how.

    Attributes:
        path: where it is.
        name: its path below the corpus.
        fields: which fields of rows become what.
        decoding: how its bytes become text.
        report: told what is left out.
        begun: its text, where it was begun to be read already.
    """

    path: Path
    name: str
    fields: Fields
    decoding: Decoding
    report: CorpusReport
    begun: Iterator[str] | None = None

    @property
    def origin(self) -> str:
        """The path as messages name it, also where its name is not UTF-8."""
        return shown(str(self.path))

    def pieces(self, declared: Callable[[bytes], str | None] = lambda _: None) -> Iterator[str]:
        """Its text, piece by piece; raises as `text_pieces`, and where it cannot be read."""
        if self.begun is not None:
            yield from self.begun
            return
        with self._readable(), self._opened() as file:
            yield from text_pieces(file, self.origin, self.decoding, self.report, declared)

    def text(self, declared: Callable[[bytes], str | None] = lambda _: None) -> str:
        r"""Its whole text; \r\n becomes \n."""
        pieces, length = [], 0
        for piece in self.pieces(declared):
            pieces.append(piece)
            length += len(piece)
            if length > LARGEST_DOCUMENT:
                raise _too_long(self.origin)
        whole = "".join(pieces)
        del pieces
        return whole.replace("\r\n", "\n")

    def lines(self) -> Iterator[str]:
        r"""Its lines, \n included."""
        held: list[str] = []
        length = number = 0
        for piece in self.pieces():
            start = 0
            while end := piece.find("\n", start) + 1:
                held.append(piece[start:end])
                number += 1
                yield "".join(held)
                held, length, start = [], 0, end
            held.append(piece[start:])
            length += len(held[-1])
            if length > LARGEST_DOCUMENT:
                raise _too_long(f"{self.origin}:{number + 1}")
        if last := "".join(held):
            yield last

    def _opened(self) -> BufferedReader:
        if self.path == STANDARD_INPUT:  # which may be a socket, that cannot be opened by its name
            return open(0, "rb", closefd=False)
        return opened(self.path)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CorpusError(
                f"{self.origin} cannot be read ({error.strerror or error}): check it, or leave it "
                "out (--exclude)"
            ) from error


def shown(name: str) -> str:
    r"""A path as UTF-8; bytes that are not are written as \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_document(file: CorpusFile, text: str, **metadata: Any) -> Iterator[Document]:
    """The one document of a file: its path is its id."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = {"path": file.name, "sha256": digest, **metadata}
    yield Document(file.name, text, found, file.origin, made_id=True)


def read_text(file: CorpusFile) -> Iterator[Document]:
    """The one document of a text file.

    Raises:
        CorpusError: it cannot be read, is too long or not of its encoding.
    """
    return text_document(file, file.text())


def read_jsonl(file: CorpusFile) -> Iterator[Document]:
    """The documents of JSON lines; raises as `read_text`, and where a line is no document."""
    for number, line in enumerate(file.lines(), 1):
        if not line.isspace():
            yield parse_line(line, file.name, f"{file.origin}:{number}", file.fields)


def read_json(file: CorpusFile) -> Iterator[Document]:
    """The documents of a JSON file: objects, one a line or one after another, or an array of them.

    A string in an array is the text of a document.
    """
    lines = file.lines()
    before = ""
    for number, line in enumerate(lines, 1):
        if line.isspace():
            before += line
            continue
        try:
            first = json.loads(line)
        except (ValueError, RecursionError):
            first = None
        if isinstance(first, dict):  # an object a line: a file of any size
            yield parse_line(line, file.name, f"{file.origin}:{number}", file.fields)
            for later, other in enumerate(lines, number + 1):
                if not other.isspace():
                    yield parse_line(other, file.name, f"{file.origin}:{later}", file.fields)
            return
        yield from _json_values(file, before + line, lines)
        return


def _json_values(file: CorpusFile, beginning: str, lines: Iterator[str]) -> Iterator[Document]:
    """The documents of JSON values that take several lines."""
    parts, length = [beginning], len(beginning)
    for line in lines:
        parts.append(line)
        length += len(line)
        if length > LARGEST_DOCUMENT:
            raise CorpusError(
                f"{file.origin} has JSON values of more than a gigabyte: write an object on each "
                "line (.jsonl)"
            )
    text, at, count = "".join(parts), 0, 0
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(file.origin, error) from error
        for record in value if isinstance(value, list) else [value]:
            count += 1
            origin = f"{file.origin}:{count}"
            if isinstance(record, str):
                record = {file.fields.text: record}
            yield _of_record(record, file.name, origin, file.fields, escaped=True)


def parse_line(line: str, name: str, origin: str, fields: Fields = DEFAULT_FIELDS) -> Document:
    """The document of one line of JSON (CorpusError where it is none)."""
    try:
        record: Any = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _not_json(origin, error) from error
    return _of_record(record, name, origin, fields, escaped="\\ud" in line.lower())


def _of_record(record: Any, name: str, origin: str, fields: Fields, *, escaped: bool) -> Document:
    if not isinstance(record, dict):
        raise CorpusError(f"{origin} is not a JSON object: write {{'text': …}} on each line")
    if escaped:
        check_storable(record, origin)
    return document_of(record, name, origin, fields)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_separated(file: CorpusFile) -> Iterator[Document]:
    """The documents of a table with separators (CSV, TSV): its first line names the columns.

    Raises:
        UnfitFileError: there is no column with the text.
        CorpusError: as `read_text`, or a row does not fit the columns.
    """
    lines = file.lines()
    first = next(lines, "")
    if first.isspace() or not first:
        return
    separator = _separator(first, file)
    csv.field_size_limit(max(csv.field_size_limit(), min(LARGEST_DOCUMENT, sys.maxsize)))
    rows = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
    try:
        columns = [column.strip() for column in next(rows)]
        while columns and not columns[-1]:  # a separator at the end of each line
            columns.pop()
        repeated = {column for column in columns if columns.count(column) > 1}
        if repeated:
            raise CorpusError(
                f"{file.origin} has the column {min(repeated)!r} more than once: rename one"
            )
        for row in rows:
            origin = f"{file.origin}:{rows.line_num}"
            if not row:
                continue
            if any(row[len(columns) :]):
                raise CorpusError(
                    f"{origin} has {len(row)} cells and the table {len(columns)} columns: mend the "
                    "row, or quote its text"
                )
            record: dict[str, Any] = dict(zip(columns, row, strict=False))
            if file.fields.text in columns:
                record.setdefault(file.fields.text, None)  # a short row
            yield document_of(record, file.name, origin, file.fields)
    except csv.Error as error:
        raise CorpusError(
            f"{file.origin}:{rows.line_num} is no row of a table ({error}): mend its quotes and "
            "line ends"
        ) from error


def _separator(first: str, file: CorpusFile) -> str:
    """The separator by which the first line holds the column with the text."""
    own = "\t" if ".tsv" in [suffix.lower() for suffix in Path(file.name).suffixes] else ","
    for separator in own + _SEPARATORS:
        columns = [column.strip() for column in next(csv.reader([first], delimiter=separator))]
        if file.fields.text in columns:
            return separator
    return own


def _not_json(origin: str, error: Exception) -> CorpusError:
    return CorpusError(f"{origin} is not JSON ({error}): mend it, or leave it out")


def _too_long(origin: str) -> CorpusError:
    return CorpusError(f"{origin} is a document of more than a gigabyte: cut it into several")
