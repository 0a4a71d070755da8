"""Documents from files, folders of them and datasets, one at a time."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nearest.corpus.compression import COMPRESSED
from nearest.corpus.documents import Document, Fields
from nearest.corpus.hub import SCHEME, read_hub
from nearest.corpus.tables import dataset_files, read_arrow, read_parquet
from nearest.corpus.text_files import EncodingErrors, read_jsonl, read_text
from nearest.errors import CorpusError

_TEXT: dict[str, Callable[[Path, str, EncodingErrors, Fields], Iterator[Document]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
}
_TABLES: dict[str, Callable[[Path, str, Fields], Iterator[Document]]] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_KINDS = f"{', '.join(_TEXT)} (or these with {', '.join(COMPRESSED)}), {', '.join(_TABLES)}"


class Corpus:
    """Documents of files, folders and datasets, read anew by every loop over them."""

    def __init__(
        self, given: Sequence[str | Path], encoding_errors: EncodingErrors, fields: Fields
    ) -> None:
        self._given = given
        self._encoding_errors = encoding_errors
        self._fields = fields

    def __iter__(self) -> Iterator[Document]:
        for given in self._given:
            if _on_hub(given):
                yield from read_hub(str(given), self._fields)
                continue
            for path, name in _files(Path(given)):
                kind = _kind(path)
                if kind in _TEXT:
                    yield from _TEXT[kind](path, name, self._encoding_errors, self._fields)
                else:
                    yield from _TABLES[kind](path, name, self._fields)

    def for_encoder(self) -> "Corpus":
        """The same corpus for an encoder–decoder, whose encoder reads `source` where no other
        field is named.
        """
        if self._fields.encoder_text is not None:
            return self
        fields = replace(self._fields, encoder_text="source")
        return Corpus(self._given, self._encoding_errors, fields)


def read_documents(
    paths: Iterable[str | Path],
    *,
    encoding_errors: EncodingErrors = "strict",
    text_field: str = "text",
    id_field: str = "id",
    encoder_field: str | None = None,
) -> Corpus:
    """Stream the documents of files, folders (recursive, in sorted order) and datasets.

    That every path exists is checked at once, what it holds when it is read.

    Args:
        paths: files (.txt, .md and .jsonl, also compressed as .gz or .zst; .parquet, .arrow),
            folders of them, folders that `datasets` saved, or hf://owner/name[:split]. Hidden files
            and folders are passed over.
        encoding_errors: "strict" refuses text that is not UTF-8; "replace" puts U+FFFD there.
        text_field, id_field: fields of rows that hold the text and the id.
        encoder_field: the field that an encoder reads, in rows without `encoder_text`.

    Raises:
        CorpusError: a path is missing, a file is empty, damaged or of an unknown kind, text is not
            UTF-8, a line or row is malformed, or nothing is found at all.
        NearestError: what reads this kind of file is not installed.
    """
    given = list(paths)
    if not given:
        raise CorpusError("no corpus was given: name at least one file or folder")
    for path in given:
        if not _on_hub(path):
            _check_exists(Path(path))
    return Corpus(given, encoding_errors, Fields(text_field, id_field, encoder_field))


def _on_hub(given: str | Path) -> bool:
    return isinstance(given, str) and given.startswith(SCHEME)


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, "" where it is of no kind that is."""
    packed = path.suffix.lower() in COMPRESSED
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return suffix if suffix in _TEXT or (suffix in _TABLES and not packed) else ""


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
        if not _kind(given):
            raise CorpusError(f"{given} is none of {_KINDS}: convert, unpack or rename it")
        yield given, given.name
    elif given.is_dir():
        found = False
        for folder, subfolders, names in os.walk(given, onerror=_refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for path in dataset_files(Path(folder)) or _named(Path(folder), names):
                found = True
                _check_name(path)
                yield path, path.relative_to(given).as_posix()
        if not found:
            raise CorpusError(f"{given} holds no {_KINDS} file: name another folder")
    else:
        raise CorpusError(f"{given} does not exist: check the path of the corpus")


def _named(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Files of kinds that are read, in sorted order, hidden ones passed over."""
    for name in sorted(names):
        if _kind(folder / name) and not name.startswith("."):
            yield folder / name


def _refuse(error: OSError) -> None:
    raise CorpusError(f"{error.filename} cannot be read ({error.strerror}): check it") from error


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{str(path)!r} has a name that is not UTF-8: rename it") from error
