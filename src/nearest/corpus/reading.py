"""Documents from files, folders of them, pipes and datasets, one at a time."""

import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from nearest.corpus.compression import COMPRESSED
from nearest.corpus.decoding import Decoding, EncodingErrors, refuse_pointer
from nearest.corpus.documents import Document, Fields, UnfitFileError
from nearest.corpus.folders import Entry, files_of, memory_around
from nearest.corpus.hub import SCHEME, read_hub
from nearest.corpus.pages import read_docx, read_html, read_notebook, read_pdf
from nearest.corpus.report import CorpusReport
from nearest.corpus.settled import settled
from nearest.corpus.tables import read_arrow, read_parquet
from nearest.corpus.text_files import (
    STANDARD_INPUT,
    CorpusFile,
    read_json,
    read_jsonl,
    read_separated,
    read_text,
    shown,
)
from nearest.errors import CorpusError, SettingError

Format = Literal["text", "jsonl", "json", "csv", "tsv", "html"]
_FORMATS: dict[str, str] = {"text": ".txt", **{name: f".{name}" for name in get_args(Format)[1:]}}

Reader = Callable[[CorpusFile], Iterator[Document]]
_TEXT: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), read_text),
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
    ".json": read_json,
    **dict.fromkeys((".csv", ".tsv"), read_separated),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    ".ipynb": read_notebook,
}
_BINARY: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".pdf": read_pdf,
    ".docx": read_docx,
}
_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_KINDS = f"{' '.join(_TEXT)} (also with {' '.join(COMPRESSED)}), {' '.join(_BINARY)}"
_STANDARD_INPUT = "-"
_WITHOUT = "without a suffix"
_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/", re.IGNORECASE)
_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[\[{\"])")  # what begins so is read as JSON


class Corpus:
    """Documents of files, folders, pipes and datasets; every loop over it reads them anew.

    `report` tells what the last loop took and left out; it is whole when the loop has ended.
    """

    def __init__(
        self,
        given: Sequence[str | Path],
        *,
        fields: Fields,
        decoding: Decoding,
        suffixes: Sequence[str],
        exclude: Sequence[str],
        file_format: Format | None,
    ) -> None:
        self.report = CorpusReport()
        self._given = given
        self._fields = fields
        self._decoding = decoding
        self._text_suffixes = {
            _with_dot(suffix) for several in suffixes for suffix in several.split(",")
        }
        self._exclude = exclude
        self._format = file_format
        self._writing: list[Path] = []
        self._piped: set[str | Path] = set()

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    def leave_out(self, folder: str | Path) -> None:
        """Never read this folder: it is being written."""
        self._writing.append(Path(folder).resolve())

    def read(self, *, for_encoder: bool = False) -> Iterator[Document]:
        """The documents, once.

        Args:
            for_encoder: the model has an encoder; in rows without `encoder_text` it reads the field
                `source`, unless another was named.

        Raises:
            CorpusError: something cannot be read, or an id that the corpus gives is repeated.
        """
        fields = self._fields
        if for_encoder and fields.encoder_text is None:
            fields = replace(fields, encoder_text="source")
        self.report = report = CorpusReport()
        report.encoder_field = fields.encoder_text
        report.unmatched = set(self._exclude)
        yield from settled(
            self._documents(fields, report),
            report,
            lambda: self._documents(fields, CorpusReport()) if not self._piped else (),
        )
        if not report.documents:
            places = ", ".join(shown(str(given)) for given in self._given)
            left = f" (skipped: {report.left_out})" if report.skipped else ""
            raise CorpusError(f"{places} holds no documents{left}: name another corpus")

    def _documents(self, fields: Fields, report: CorpusReport) -> Iterator[Document]:
        seen: set[str] = set()
        for given in self._given:
            if _on_hub(given):
                yield from read_hub(str(given), fields)
                continue
            for entry, reader, explicit in self._files(given, report):
                if len(self._given) > 1 and (real := _real(entry.path)) is not None:
                    if real in seen:
                        report.skip("named twice", entry.name)
                        continue
                    seen.add(real)
                file = CorpusFile(entry.path, entry.name, fields, self._decoding, report)
                before, number = _version(entry.path), 0
                try:
                    for number, document in enumerate(reader(file), 1):  # noqa: B007  counted
                        yield document
                    if not number:
                        report.skip("empty", entry.name)
                except UnfitFileError as error:
                    if explicit or number:
                        raise
                    report.skip(error.reason, entry.name)
                    report.unread.add(entry.name)
                    report.unread_rows |= self._kind(entry.path) in _ROWS
                report.changed += before != _version(entry.path)

    def _files(
        self, given: str | Path, report: CorpusReport
    ) -> Iterator[tuple[Entry, Reader, bool]]:
        """Files of what was given, how each is read, and whether it was named itself."""
        path = Path(given)
        if given == _STANDARD_INPUT or _is_stream(path):
            yield self._stream(given)
        elif path.is_file():
            if (memory := memory_around(path.resolve())) is not None:
                raise _is_own(path, memory)
            yield Entry(path, (path.name,)), self._reader_of(path), True
        elif path.is_dir():
            if (memory := memory_around(path.resolve())) is not None:
                raise _is_own(path, memory)
            files = files_of(path, self._kind, self._exclude, self._writing, report)
            if not files:
                left = f" (skipped: {report.left_out})" if report.skipped else ""
                raise CorpusError(
                    f"{shown(str(path))} holds no file of a kind that is read: {_KINDS}{left}; "
                    "name another folder, or more suffixes (--suffix)"
                )
            for entry in files:
                yield entry, self._reader(self._kind(entry.path)), False
        else:
            raise CorpusError(f"{shown(str(path))} does not exist: check the path of the corpus")

    def _kind(self, path: Path) -> str:
        """The suffix that says how a file is read; "" where it is of no kind that is."""
        packed = path.suffix.lower() in COMPRESSED
        plain = path.with_suffix("") if packed else path
        suffix, name = plain.suffix.lower(), plain.name.lower()
        if longer := next((one for one in self._text_suffixes if one and name.endswith(one)), ""):
            return longer
        if suffix in _TEXT:
            return suffix
        if not suffix and "" in self._text_suffixes:
            return _WITHOUT
        return suffix if suffix in _BINARY and not packed else ""

    def _reader(self, kind: str) -> Reader:
        if kind == _WITHOUT or kind in self._text_suffixes:
            return read_text
        return _TEXT[kind] if kind in _TEXT else _fetched(_BINARY[kind])

    def _reader_of(self, path: Path) -> Reader:
        """How a file is read that was named itself."""
        if self._format is not None:
            return _TEXT[_FORMATS[self._format]]
        if kind := self._kind(path):
            return self._reader(kind)
        suffix = f"pass --suffix {path.suffix} or " if path.suffix else "pass "
        raise CorpusError(
            f"{shown(str(path))} is of no kind that is read ({_KINDS}): {suffix}--format text to "
            "read it as plain text, or convert it"
        )

    def _stream(self, given: str | Path) -> tuple[Entry, Reader, bool]:
        """A pipe or standard input: it has no suffix, and can be read but once."""
        if given in self._piped:
            raise CorpusError(
                f"{given} is a pipe, which can be read only once: write it to a file first"
            )
        self._piped.add(given)
        standard = given == _STANDARD_INPUT
        name = "standard input" if standard else Path(given).name
        path = STANDARD_INPUT if standard else Path(given)
        return Entry(path, (name,)), self._stream_reader, True

    def _stream_reader(self, file: CorpusFile) -> Iterator[Document]:
        if self._format is not None:
            yield from _TEXT[_FORMATS[self._format]](file)
            return
        pieces = file.pieces()
        first = next(pieces, "")
        reader = read_json if _JSON.match(first) else read_text
        yield from reader(replace(file, begun=itertools.chain([first], pieces)))


def read_documents(
    paths: Iterable[str | Path] | str | Path,
    *,
    text_field: str = "text",
    id_field: str = "id",
    encoder_field: str | None = None,
    suffixes: Iterable[str] = (),
    exclude: Iterable[str] = (),
    format: Format | None = None,  # noqa: A002  as the command calls it
    encoding: str = "utf-8",
    encoding_errors: EncodingErrors = "strict",
) -> Corpus:
    """Open files, folders (recursive, in sorted order), pipes and datasets as one corpus.

    That every path exists is checked at once, what it holds when it is read. Empty documents, and
    what a folder holds beside documents, are left out and counted in the corpus's `report`.

    Args:
        paths: one or several of: text (.txt .text .md .markdown .rst), rows (.jsonl .ndjson .json
            .csv .tsv), pages (.html .htm .xhtml .ipynb), all these also as .gz or .zst; .parquet
            .arrow; .pdf .docx; folders of them, folders that `datasets` saved, hf://owner/name[:split],
            pipes, or "-" for standard input.
        text_field, id_field: fields of rows that hold the text and the id.
        encoder_field: the field that an encoder reads, in rows without `encoder_text`.
        suffixes: further suffixes of files that are read as plain text, such as ".py"; "" for
            files without one.
        exclude: patterns of names, or of paths, of files and folders that are left out.
        format: how files and pipes that are named themselves are read, whatever their suffix.
        encoding: of text files without a byte-order mark; "auto" detects what is not UTF-8.
        encoding_errors: "strict" refuses other bytes; "replace" puts U+FFFD there.

    Raises:
        CorpusError: a path is missing or cannot be used.
        SettingError: an option has no meaning.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise CorpusError("no corpus was given: name at least one file or folder")
    for path in given:
        if not isinstance(path, str | os.PathLike):
            raise CorpusError(f"a path of the corpus is given as {type(path).__name__}: give text")
        if not os.fspath(path):
            raise CorpusError("a path of the corpus is empty: name a file or a folder")
        if path != _STANDARD_INPUT and not _on_hub(path):
            _check_exists(Path(path))
    if format is not None and format not in _FORMATS:
        raise SettingError(f"there is no format {format!r}: choose of {', '.join(_FORMATS)}")
    if isinstance(suffixes, str) or isinstance(exclude, str):
        raise SettingError("suffixes and exclude are lists: put the one in a list")
    return Corpus(
        given,
        fields=Fields(text_field, id_field, encoder_field),
        decoding=Decoding(encoding, encoding_errors),
        suffixes=list(suffixes),
        exclude=list(exclude),
        file_format=format,
    )


def _with_dot(suffix: str) -> str:
    """A suffix with its dot; "" for files without one."""
    bare = suffix.strip().lstrip("*.").lower()
    return f".{bare}" if bare else ""


def _fetched(reader: Reader) -> Reader:
    """A reader of files that are not text, which may be empty, or not fetched by Git LFS."""

    def read(file: CorpusFile) -> Iterator[Document]:
        try:
            with file.path.open("rb") as opened:
                head = opened.read(64)
        except OSError as error:
            raise file.unreadable(error) from error
        refuse_pointer(head, file.origin)
        if head:
            yield from reader(file)

    return read


def _real(path: Path) -> str | None:
    """The file that a path leads to; None for what is no file, such as a pipe."""
    return os.path.realpath(path) if path.is_file() else None


def _on_hub(given: str | Path) -> bool:
    return isinstance(given, str) and given.startswith(SCHEME)


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe, a terminal or a number of an open file, which may be either."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    descriptor = str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))
    return descriptor or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _version(path: Path) -> tuple[int, int] | None:
    """What changes with a file's content; None for what is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return (state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else None


def _is_own(path: Path, memory: Path) -> CorpusError:
    where = "a memory" if path.resolve() == memory else f"a part of the memory {shown(str(memory))}"
    return CorpusError(
        f"{shown(str(path))} is {where}, and no corpus: name the files or folders that hold the "
        "documents"
    )


def _check_exists(given: Path) -> None:
    try:
        mode = given.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if _ADDRESS.match(str(given)):
            address = re.sub(":/+", "://", shown(str(given)), count=1)  # `Path` left one slash
            raise CorpusError(
                f"{address} is an address, of which only hf:// is read: download it, and name "
                "the file"
            ) from error
        raise CorpusError(
            f"{shown(str(given))} does not exist: check the path of the corpus"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(
            f"{shown(str(given))} cannot be read ({reason}): check its path"
        ) from error
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        kind = "a socket" if stat.S_ISSOCK(mode) else "a block device"
        raise CorpusError(f"{shown(str(given))} is {kind}: name a file, a folder or a pipe")
