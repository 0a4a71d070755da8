"""Stored keys: a class for each format, all used alike, and how each is written.

Whatever the format, an entry's key can be looked at (`rows`) and measured (`distances`); everything
above asks for no more. A format turns rows into the arrays that are stored, and those into keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.index.distances import key_distances
from nearest.index.neighbours import Metric

# The arrays of a format: dtype and shape of the row that each holds for every position.
Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


@runtime_checkable
class Keys(Protocol):
    """One key a position; ids are row numbers."""

    @property
    def dim(self) -> int:
        """Dimension of keys and queries."""

    @property
    def metric(self) -> Metric:
        """What distances are."""

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """The keys of entries as float32; each id must be a row."""

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distance of query i to the key of ids[i, j] (float32); id -1 gives +inf."""


@runtime_checkable
class KeyFormat(Protocol):
    """How keys are stored."""

    @property
    def name(self) -> str:
        """As in the manifest and on the command line."""

    @property
    def largest(self) -> float:
        """The largest value that can be stored."""

    def layout(self, dim: int) -> Layout:
        """The arrays that hold keys of so many dims."""

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        """Rows of every array for float32 keys."""

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> Keys:
        """Keys that are stored in these arrays."""


class Float16Keys:
    """Keys as float16 [n, dim]."""

    def __init__(self, keys: Float[np.ndarray, "n dim"], metric: Metric) -> None:
        self._keys = np.asarray(keys)  # a plain array: views of a memory map are slow to make
        self.metric = metric
        self.dim = keys.shape[1]

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """The keys of entries as float32."""
        rows: Float[np.ndarray, "m dim"] = self._keys[ids].astype(np.float32)
        return rows

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances in one pass over the chosen rows."""
        return key_distances(self._keys, queries, ids, self.metric)


@dataclass(frozen=True)
class Float16Format:
    """Every value rounded to float16: 2 bytes a dimension."""

    name: str = "fp16"
    largest: float = float(np.finfo(np.float16).max)

    def layout(self, dim: int) -> Layout:
        """Keys alone."""
        return {"keys": (np.dtype(np.float16), (dim,))}

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        """Round."""
        return {"keys": rows.astype(np.float16)}

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> Keys:
        """Keys over the array."""
        return Float16Keys(arrays["keys"], metric)


def key_format(name: str) -> KeyFormat:
    """The format of this name (SettingError when there is none)."""
    if name == "fp16":
        return Float16Format()
    raise SettingError(f"key format {name!r} is unknown: choose fp16")
