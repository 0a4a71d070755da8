"""The arrays of keys in a memory's folder: written in any order of rows, and opened."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.folder import ArrayFile, open_array
from nearest.index.keys import KeyFormat, Keys, key_format
from nearest.index.neighbours import Metric
from nearest.index.product import CENTROIDS, ProductFormat, product_parts
from nearest.index.projection import Projection
from nearest.store.manifest import KeysRecord

KEY_ARRAYS = {"keys", "scales"}  # of any format
_FLOAT = np.dtype(np.float32)


def key_paths(folder: Path, form: KeyFormat, dim: int, prefix: str = "") -> dict[str, Path]:
    """Where each array of a format goes."""
    return {name: folder / f"{prefix}{name}.npy" for name in form.layout(dim)}


class KeyWriter:
    """Write keys of a format, a row a position; rows never written are zero."""

    def __init__(
        self,
        paths: Mapping[str, Path],
        form: KeyFormat,
        dim: int,
        rows: int,
        *,
        going_on: bool = False,
    ) -> None:
        """`paths` says where each array of the format goes; `going_on` keeps what is there.

        Raises:
            FolderError: what is there is not of this format and size.
        """
        if going_on:
            open_key_arrays(paths, form, dim, rows)
        self._format = form
        self._open = ExitStack()
        self._files: dict[str, ArrayFile] = {}
        with ExitStack() as opened:  # closes what was opened before a full disk was met
            for name, (dtype, shape) in form.layout(dim).items():
                self._files[name] = opened.enter_context(
                    ArrayFile(paths[name], dtype, shape, rows=rows, going_on=going_on)
                )
            self._open = opened.pop_all()

    def write(self, first: int, rows: Float[np.ndarray, "m dim"]) -> None:
        """Write float32 keys at the positions from `first` on."""
        for name, encoded in self._format.encode(rows).items():
            self._files[name].write(first, encoded)

    def write_stored(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write rows of every array, as another file of this format holds them."""
        for name, rows in arrays.items():
            self._files[name].write(first, rows)

    def flush(self) -> None:
        """Make what was written durable."""
        for file in self._files.values():
            file.flush()

    def __enter__(self) -> "KeyWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        """Make the files durable, unless the writing failed."""
        self._open.__exit__(*error)


def open_keys(
    paths: Mapping[str, Path], form: KeyFormat, dim: int, rows: int, metric: Metric
) -> Keys:
    """Keys over the arrays of a format; raises as `open_key_arrays`."""
    return form.open(open_key_arrays(paths, form, dim, rows), metric)


def open_key_arrays(
    paths: Mapping[str, Path], form: KeyFormat, dim: int, rows: int
) -> dict[str, np.ndarray]:
    """Map the arrays of a format, by name.

    Raises:
        KeyError: `paths` lacks one of them.
        FolderError: one is not what it must be.
    """
    return {
        name: open_array(paths[name], dtype, (rows, *shape))
        for name, (dtype, shape) in form.layout(dim).items()
    }


def stored_format(folder: Path, record: KeysRecord) -> KeyFormat:
    """The format of a memory's keys, with what all segments share.

    Raises:
        FolderError: the centroids of product-quantised keys are not what the manifest says.
    """
    parts = product_parts(record.format)
    if parts is None or record.codebooks is None:
        return key_format(record.format)
    shape = (parts, CENTROIDS, record.stored_dim // parts)
    return ProductFormat(open_array(folder / record.codebooks.path, _FLOAT, shape))


def open_projection(folder: Path, record: KeysRecord | None) -> Projection | None:
    """What keys and queries go through, if anything.

    Raises:
        FolderError: its file is not what the manifest says.
    """
    if record is None or record.projection is None:
        return None
    shape = (record.projection.dim, record.dim + 1)
    return Projection(open_array(folder / record.projection.file.path, _FLOAT, shape))
