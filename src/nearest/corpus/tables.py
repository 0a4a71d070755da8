"""Documents of Parquet and Arrow files, a row each: `text`, perhaps `id`, and metadata.

pyarrow is imported where such a file is met: who has only text does not need it.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from nearest.corpus.documents import (
    DEFAULT_FIELDS,
    Document,
    Fields,
    UnfitFileError,
    check_storable,
    document_of,
)
from nearest.corpus.text_files import CorpusFile
from nearest.errors import CorpusError, require

_ROWS = 64  # of Parquet, decoded at once
_BUFFER = 1 << 20  # of each column, instead of a whole row group
_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def read_parquet(file: CorpusFile) -> Iterator[Document]:
    """The documents of a Parquet file, row by row.

    Raises:
        UnfitFileError: it has no column with the text.
        CorpusError: it is damaged, or has a row that is no document.
        NearestError: pyarrow is not installed.
    """
    require("pyarrow", "data")
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            file.path, buffer_size=_BUFFER, pre_buffer=False
        ) as parquet:
            _check_columns(parquet.schema_arrow.names, file)
            yield from _documents(parquet.iter_batches(_ROWS), file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def read_arrow(file: CorpusFile) -> Iterator[Document]:
    """The documents of an Arrow file, as `datasets` saves them or as pyarrow does; see above."""
    require("pyarrow", "data")
    import pyarrow

    try:
        with pyarrow.memory_map(str(file.path)) as source:
            stream = source.read(6) != b"ARROW1"
            source.seek(0)
            if stream:
                with pyarrow.ipc.open_stream(source) as reader:
                    _check_columns(reader.schema.names, file)
                    yield from _documents(_valid(reader), file)
            else:
                with pyarrow.ipc.open_file(source) as reader:
                    _check_columns(reader.schema.names, file)
                    batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
                    yield from _documents(_valid(batches), file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def dataset_files(folder: Path) -> list[Path] | None:
    """The files of a dataset that `datasets` saved in this folder, in order; None where it is none.

    Raises:
        CorpusError: it holds several splits, or does not say which files are its own.
    """
    if (folder / _SPLITS).is_file():
        splits = _strings(folder / _SPLITS, lambda found: found["splits"])
        raise CorpusError(
            f"{folder} holds the splits {', '.join(splits)}: name one of them, "
            f"such as {folder / splits[0]}"
        )
    if not ((folder / _STATE).is_file() and (folder / "dataset_info.json").is_file()):
        return None
    names = _strings(folder / _STATE, lambda found: [f["filename"] for f in found["_data_files"]])
    return [folder / name for name in names]


def row_document(
    row: dict[str, Any], name: str, origin: str, fields: Fields = DEFAULT_FIELDS
) -> Document:
    """The document of a row, what JSON has no word for (times, exact decimals) as text."""
    plain = {key: _plain(value) for key, value in row.items()}
    document = document_of(plain, name, origin, fields)
    check_storable(dict(document.metadata), origin)
    return document


def _documents(batches: Iterable[Any], file: CorpusFile) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for index in range(batch.num_rows):
            number += 1
            origin = f"{file.origin}:{number}"
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except (UnicodeDecodeError, ValueError, OverflowError) as error:
                raise CorpusError(f"{origin} cannot be read ({error}): mend the row") from error
            yield row_document(row, file.name, origin, file.fields)


def _valid(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches whose offsets lie in range: Arrow itself follows whatever a file says."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _check_columns(names: list[str], file: CorpusFile) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise CorpusError(
            f"{file.origin} has the column {min(repeated)!r} more than once: rename one"
        )
    wanted = file.fields.text
    if wanted not in names and wanted.partition(".")[0] not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise UnfitFileError(
            f"{file.origin} has no column {wanted!r} (it has {found}): name the column that holds "
            "the text (--text-field; in Python text_field)",
            f"without a field {wanted!r}",
        )


def _plain(value: Any) -> Any:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _strings(path: Path, choose: Any) -> list[str]:
    """Names of files or folders beside `path` that it lists."""
    try:
        names = choose(json.loads(path.read_bytes()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("names of files or folders are missing or lead elsewhere")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorpusError(
            f"{path} does not say which files are the dataset's ({error}): save it again"
        ) from error
    return list(names)


def _damaged(file: CorpusFile, error: Exception) -> CorpusError:
    reason = str(error).strip().partition("\n")[0]
    return CorpusError(f"{file.origin} is damaged or cut short ({reason}): fetch or save it again")
