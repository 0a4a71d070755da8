"""The arrays of keys in a segment's folder: written in any order of rows, and opened."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float

from nearest.folder import ArrayFile, open_array
from nearest.index.keys import KeyFormat, Keys
from nearest.index.neighbours import Metric


def key_paths(folder: Path, form: KeyFormat, dim: int, prefix: str = "") -> dict[str, Path]:
    """Where each array of a format goes."""
    return {name: folder / f"{prefix}{name}.npy" for name in form.layout(dim)}


class KeyWriter:
    """Write keys of a format, a row a position; rows never written are zero."""

    def __init__(self, paths: Mapping[str, Path], form: KeyFormat, dim: int, rows: int) -> None:
        """`paths` says where each array of the format goes."""
        self._format = form
        self._open = ExitStack()
        self._files: dict[str, ArrayFile] = {}
        with ExitStack() as opened:  # closes what was opened before a full disk was met
            for name, (dtype, shape) in form.layout(dim).items():
                self._files[name] = opened.enter_context(
                    ArrayFile(paths[name], dtype, shape, rows=rows)
                )
            self._open = opened.pop_all()

    def write(self, first: int, rows: Float[np.ndarray, "m dim"]) -> None:
        """Write float32 keys at the positions from `first` on."""
        for name, encoded in self._format.encode(rows).items():
            self._files[name].write(first, encoded)

    def __enter__(self) -> "KeyWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Make the files durable, unless the writing failed."""
        self._open.__exit__(kind, error, tb)


def open_keys(
    paths: Mapping[str, Path], form: KeyFormat, dim: int, rows: int, metric: Metric
) -> Keys:
    """Map the arrays of a format.

    Raises:
        KeyError: `paths` lacks one of them.
        FolderError: one is not what it must be.
    """
    arrays = {
        name: open_array(paths[name], dtype, (rows, *shape))
        for name, (dtype, shape) in form.layout(dim).items()
    }
    return form.open(arrays, metric)
