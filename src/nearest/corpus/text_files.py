"""Documents of text files, one each; of JSON and of tables with separators, one a row."""

import csv
import hashlib
import itertools
import json
import re
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
    UnfitFileError,
    check_storable,
    document_of,
)
from nearest.corpus.report import CorpusReport
from nearest.errors import CorpusError

STANDARD_INPUT = Path("/dev/stdin")
_SEPARATORS = ",;\t|"
_EXCELS_LINE = re.compile(r"\ufeff?sep=([^\r\n]?)\s*", re.IGNORECASE)


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
            yield from _with_line_ends(
                text_pieces(file, self.origin, self.decoding, self.report, declared)
            )

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
            raise self.unreadable(error) from error

    def unreadable(self, error: OSError) -> CorpusError:
        """What to say where the file cannot be read."""
        return CorpusError(
            f"{self.origin} cannot be read ({error.strerror or error}): check it, or leave it out "
            "(--exclude)"
        )


def _with_line_ends(pieces: Iterator[str]) -> Iterator[str]:
    r"""Text where old Macs' line ends, \r alone, are \n."""
    first = next(pieces, "")
    old = "\r" in first and "\n" not in first
    for piece in itertools.chain([first], pieces):
        yield piece.replace("\r\n", "\n").replace("\r", "\n") if old else piece


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

    Raises:
        UnfitFileError: it holds no JSON, or something else than documents.
        CorpusError: as `read_jsonl`.
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
                if other.isspace():
                    continue
                try:
                    record = json.loads(other, parse_constant=_refuse_constant)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):  # or it takes several
                    yield from _json_values(file, other, lines, later)
                    return
                escaped, origin = _escaped(other), f"{file.origin}:{later}"
                yield _of_record(record, file.name, origin, file.fields, escaped=escaped)
            return
        yield from _json_values(file, before + line, lines)
        return


def _json_values(
    file: CorpusFile, beginning: str, lines: Iterator[str], first: int = 1
) -> Iterator[Document]:
    """The documents of JSON values that take several lines, from a line on."""
    where = file.origin if first == 1 else f"{file.origin} from line {first:,} on"
    parts, length = [beginning], len(beginning)
    for line in lines:
        parts.append(line)
        length += len(line)
        if length > LARGEST_DOCUMENT:
            raise CorpusError(
                f"{where} has JSON values of more than a gigabyte: write an object on each line "
                "(.jsonl)"
            )
    text, at, count = "".join(parts), 0, first - 1
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UnfitFileError(
                f"{where} is not JSON ({error}): mend it, or leave it out (--exclude)",
                "not JSON",
            ) from error
        for record in value if isinstance(value, list) else [value]:
            count += 1
            origin = f"{file.origin}:{count}"
            if isinstance(record, str):
                record = {file.fields.text: record}
            if not isinstance(record, dict):
                raise UnfitFileError(
                    f"{origin} is not a JSON object: write objects with a 'text', or leave the "
                    "file out (--exclude)",
                    "JSON without documents",
                )
            yield _of_record(record, file.name, origin, file.fields, escaped=True)


def parse_line(line: str, name: str, origin: str, fields: Fields = DEFAULT_FIELDS) -> Document:
    """The document of one line of JSON (CorpusError where it is none)."""
    try:
        record: Any = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _not_json(origin, error) from error
    return _of_record(record, name, origin, fields, escaped=_escaped(line))


def _escaped(line: str) -> bool:
    """Whether JSON may hold half of an escaped character."""
    return "\\ud" in line.lower()


def _of_record(record: Any, name: str, origin: str, fields: Fields, *, escaped: bool) -> Document:
    if not isinstance(record, dict):
        raise CorpusError(
            f"{origin} is not a JSON object: write {{'text': …}} on each line, or have an array "
            "read (--format json)"
        )
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
    first, before = "\n", -1
    separators = ("\t" if ".tsv" in _suffixes(file) else ",") + _SEPARATORS
    while first.isspace():
        first, before = next(lines, ""), before + 1
        if excels := _EXCELS_LINE.fullmatch(first):
            if excels[1] not in '"':  # which separates nothing, as none does
                separators = excels[1]
            first = "\n"
    if not first:
        return
    csv.field_size_limit(max(csv.field_size_limit(), min(LARGEST_DOCUMENT, sys.maxsize)))
    number = before + 1
    try:
        separator = _separator(first, separators, file.fields.text)
        rows = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
        columns = [column.strip() for column in next(rows)]
        while columns and not columns[-1]:  # a separator at the end of each line
            columns.pop()
        repeated = {column for column in columns if columns.count(column) > 1}
        if repeated:
            raise CorpusError(
                f"{file.origin} has the column {min(repeated)!r} more than once: rename one"
            )
        for row in rows:
            number = before + rows.line_num
            origin = f"{file.origin}:{number}"
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
            f"{file.origin} is no table after line {number:,} ({error}): mend its quotes and line "
            "ends"
        ) from error


def _suffixes(file: CorpusFile) -> list[str]:
    return [suffix.lower() for suffix in Path(file.name).suffixes]


def _separator(first: str, separators: str, text_field: str) -> str:
    """The separator by which the first line holds the column with the text."""
    for separator in separators:
        columns = [column.strip() for column in next(csv.reader([first], delimiter=separator))]
        if text_field in columns:
            return separator
    return separators[0]


def _not_json(origin: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{origin} is not JSON ({error}): mend it, leave it out, or have an array, or objects of "
        "several lines, read (--format json)"
    )


def _too_long(origin: str) -> CorpusError:
    return CorpusError(f"{origin} is a document of more than a gigabyte: cut it into several")
