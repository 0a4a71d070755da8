"""Documents on their way in: from whatever a caller gives to what is tokenised."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nearest.corpus.documents import Document, check_storable, content_id
from nearest.corpus.reading import Corpus, read_documents
from nearest.corpus.report import CorpusReport
from nearest.corpus.settled import settled
from nearest.corpus.tables import row_document
from nearest.corpus.tokens import TokenRules, Tokens, size_of
from nearest.errors import CorpusError

# What is taken as documents: a corpus that `read_documents` opened; documents, texts and rows in
# any iterable, such as a list, a `datasets.Dataset` or a column; a DataFrame; a path.
Documents = Iterable[Document | str | Mapping[str, Any]] | Path


def incoming_documents(
    documents: Documents, rules: TokenRules, out: Path | None = None
) -> Iterator[Document]:
    """Take what a caller gives as documents, and check them one by one as they are read.

    Empty documents are left out, and ids that the library makes are numbered where they are
    repeated; a CorpusWarning says so at the end.

    Args:
        documents: a corpus; an iterable of documents, texts or rows (mappings with a `text`); a
            DataFrame or an Arrow table; or a path.
        rules: of the model; for an encoder–decoder, rows of a corpus give what its encoder reads.
        out: the folder that is being written, which is no part of a corpus around it.

    Raises:
        CorpusError: it is none of these, a document cannot be stored, or an id that was given is
            repeated.
    """
    if isinstance(documents, Path):
        documents = read_documents(documents)
    if isinstance(documents, Corpus):
        if out is not None:
            documents.leave_out(out)
        return documents.read(for_encoder=rules.encoder_vocab_size is not None)
    rows = _rows(documents)
    again = rows if isinstance(rows, list | tuple) else ()
    return settled(_documents(rows), CorpusReport(), lambda: _documents(again))


def in_batches(
    documents: Iterable[Document], most: int = 1024, characters: int = 1 << 22
) -> Iterator[list[Document]]:
    """Some documents at a time: so many, or of so many characters."""
    some: list[Document] = []
    size = 0
    for document in documents:
        some.append(document)
        size += size_of(document)
        if len(some) == most or size >= characters:
            yield some
            some, size = [], 0
    if some:
        yield some


def token_arrays(given: Any) -> "tuple[list[Tokens], Documents]":
    """Sequences of token ids (arrays, tensors, lists), or documents; the other is empty.

    Raises:
        CorpusError: both are given, or something that is neither a list of the one nor the other.
    """
    if isinstance(given, Corpus | Path):
        return [], given
    rows = list(_rows(given))
    found = [_token_ids(row, number) for number, row in enumerate(rows, 1)]
    arrays = [ids for ids in found if ids is not None]
    if arrays and len(arrays) < len(rows):
        raise CorpusError("documents and token arrays are mixed: give all as one or the other")
    return arrays, () if arrays else rows


def _token_ids(row: Any, number: int) -> Tokens | None:
    if isinstance(row, int | np.integer):
        raise CorpusError("one sequence of token ids is given: give a list of them")
    if isinstance(row, str | Mapping | Document):
        return None
    try:
        found = np.asarray(row.cpu() if hasattr(row, "cpu") else row)  # a tensor may be on a GPU
    except (TypeError, ValueError) as error:
        raise CorpusError(
            f"document {number:,} is no sequence of token ids ({error}): give a list of whole "
            "numbers for each document"
        ) from error
    ids = found.ndim == 1 and (not len(found) or np.issubdtype(found.dtype, np.integer))
    return found.astype(np.int64) if ids else None


def _rows(given: Any) -> Iterable[Any]:
    """What stands for one document each."""
    kind = type(given).__name__
    if isinstance(given, str | bytes):
        raise CorpusError(
            "the documents are given as one string: give a list, [text], for a text, or "
            "read_documents(path) for a file or folder"
        )
    if isinstance(given, Document):
        raise CorpusError("one document is given: give a list of documents")
    if isinstance(given, Mapping):
        names = ", ".join(map(repr, given)) or "nothing"
        raise CorpusError(
            f"the documents are given as a {kind} of {names}: give one of its values (of a dataset "
            "one split), or a list of rows"
        )
    if hasattr(given, "iter_rows"):  # polars
        return list(given.iter_rows(named=True))
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # pandas
        return [
            {
                name: None if _missing(value) else value
                for name, value in row.items()
                if name == "text" or not _missing(value)
            }
            for row in given.to_dict("records")
        ]
    if hasattr(given, "to_pylist"):  # Arrow
        found: list[Any] = given.to_pylist()
        return found
    if not isinstance(given, Iterable):
        raise CorpusError(f"the documents are given as {kind}: give a list of them")
    return given


def _missing(value: Any) -> bool:
    """Whether a cell of a DataFrame is empty: NaN, or what pandas has for it."""
    return type(value).__name__ in ("NAType", "NaTType") or (
        isinstance(value, float) and value != value
    )


def _documents(rows: Iterable[Any]) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        yield _document(row, f"document {number:,}")


def _document(row: Any, origin: str) -> Document:
    if isinstance(row, str):
        check_storable(row, origin)
        return Document(content_id("text", row), str(row), origin=origin, made_id=True)
    if isinstance(row, Mapping):
        return row_document(dict(row), "row", origin)
    if not isinstance(row, Document):
        raise CorpusError(
            f"{origin} is given as {type(row).__name__}: give a Document, a string, or a row (a "
            "dictionary with 'text')"
        )
    if not isinstance(row.text, str):
        raise CorpusError(f"{origin} has a text of type {type(row.text).__name__}: give a string")
    check_storable(row.text, row.origin)
    check_storable(row.encoder_text or "", row.origin)
    check_storable([row.id, dict(row.metadata)], row.origin)
    if row.id:
        return row
    return replace(row, id=content_id("text", row.text, row.encoder_text), made_id=True)
