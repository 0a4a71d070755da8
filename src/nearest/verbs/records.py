"""One record a token and method: what each predicted, and what of it was the memory's.

Records stream by in tables of columns, and to disk as Parquet, whole or not at all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nearest.corpus.text import Text
from nearest.errors import FolderError, require
from nearest.folder import disk_errors_explained, whole_file
from nearest.index.neighbours import NO_ENTRY
from nearest.memory import Memory
from nearest.models.method_run import Details
from nearest.models.scoring import ScoredBlock
from nearest.verbs.results import data_frame

# Columns of equal length by name; takes what it is given, or writes it.
Records = Callable[[Mapping[str, np.ndarray]], None]

_PARQUET = b"PAR1"  # what every Parquet file begins with


def records_of(
    text: Text,
    memories: Sequence[Memory],
    method: str,
    block: ScoredBlock,
    log_probs: Float[Tensor, " n"],
    details: Details,
) -> dict[str, np.ndarray]:
    """The columns of one method's predictions of a block, nll and entropy in nats.

    `document` and `position` are those of the token in the text, `source` and `source_position`
    those of the entry with the largest weight in the memory: None and -1 where there is none.
    `memory` is the number of that entry's memory, of several.
    `distance` is NaN without a candidate, or without keys.
    """
    n = len(block.targets)
    distances = details.distances
    if all(memory.manifest.keys is None for memory in memories):
        distances = np.full(n, np.inf, dtype=np.float32)
    sources, positions = _sources(memories, details)
    assert block.queries.lm is not None  # it was asked for
    return {
        "method": np.full(n, method, dtype=object),
        "document": np.array(text.ids, dtype=object)[block.documents],
        "position": block.positions.astype(np.int64),
        "token": block.targets.astype(np.int64),
        "nll": -log_probs.float().numpy(),
        "base_nll": -block.lm_log_probs.float().numpy(),
        "lam": details.lams.astype(np.float32),
        "entropy": block.queries.lm.entropy.astype(np.float32),
        "distance": np.where(np.isinf(distances), np.float32(np.nan), distances),
        "source": sources,
        "source_position": positions,
        "memory": details.memories,
    }


def _sources(memories: Sequence[Memory], details: Details) -> tuple[np.ndarray, np.ndarray]:
    """Document id and position of each strongest entry."""
    names = np.full(len(details.entries), None, dtype=object)
    positions = np.full(len(names), NO_ENTRY, dtype=np.int64)
    for number, memory in enumerate(memories):
        found = (details.entries >= 0) & (details.memories == number)
        if found.any():
            documents, positions[found] = memory.places(details.entries[found])
            read, at = np.unique(documents, return_inverse=True)  # in order: a frame is read once
            ids = [memory.document(document).id for document in read.tolist()]
            names[found] = np.array(ids, dtype=object)[at]
    return names, positions


class RecordTable:
    """Takes records into memory: `evaluate(…, records=table)`, then `table.to_pandas()`."""

    def __init__(self) -> None:
        self._parts: list[Mapping[str, np.ndarray]] = []

    def __call__(self, records: Mapping[str, np.ndarray]) -> None:
        """Add rows."""
        self._parts.append(records)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row a token and method; columns as in `records_of`.

        Raises:
            NearestError: pandas is not installed.
        """
        names = self._parts[0] if self._parts else ()
        return data_frame({n: np.concatenate([p[n] for p in self._parts]) for n in names})


def check_records_path(path: Path) -> None:
    """Refuse a place that records cannot be written to, before anything is computed.

    An earlier file of records is replaced when the new one is whole; nothing else is.

    Raises:
        NearestError: pyarrow is missing, the folder is, or something else stands there.
    """
    require("pyarrow", "data")
    if not path.parent.is_dir():
        raise FolderError(f"the folder {path.parent} does not exist: make it, or choose another")
    if path.is_dir():
        raise FolderError(f"{path} is a folder: give the records a file in it")
    if path.exists() and _beginning(path) != _PARQUET:
        raise FolderError(f"{path} exists and is no Parquet file: choose another name for records")


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_PARQUET))
    except OSError as error:
        raise FolderError(f"{path} cannot be read ({error.strerror}): choose another") from error


@contextmanager
def record_file(path: Path) -> Iterator[Records]:
    """Writes records to a Parquet file, which appears whole when the context ends without error."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = _schema()

    def write(records: Mapping[str, np.ndarray]) -> None:
        arrays = []
        for column in schema:
            values = records[column.name]
            # NaN and None are missing by themselves
            missing = values == NO_ENTRY if column.name == "source_position" else None
            arrays.append(pa.array(values, column.type, mask=missing, from_pandas=True))
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    with disk_errors_explained(path.parent), whole_file(path) as file:
        writer = parquet.ParquetWriter(file, schema)
        try:
            yield write
            writer.close()
        finally:
            writer.is_open = False  # else it tries to write when it is collected


def _schema() -> Any:
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float32()
    types = {"method": text, "document": text, "position": whole, "token": whole}
    types |= dict.fromkeys(("nll", "base_nll", "lam", "entropy", "distance"), number)
    return pa.schema(types | {"source": text, "source_position": whole, "memory": whole})
