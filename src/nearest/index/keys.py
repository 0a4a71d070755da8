"""Stored keys: a class for each format, all used alike, and how each is written.

Whatever the format, an entry's key can be looked at (`rows`) and measured (`distances`); everything
above asks for no more. A format turns rows into the arrays that are stored, and those into keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int8

from nearest.errors import SettingError
from nearest.index.distances import WHOLE, Part, key_distances, scaled_key_distances
from nearest.index.neighbours import NO_ENTRY, Metric

_BLOCK = 65_536  # rows

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
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        part: Part = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Distance of query i to the key of ids[i, j] (float32); what is no id gives +inf."""

    def problems(self) -> list[str]:
        """What is wrong with what is stored, one sentence each."""


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


class Float32Keys:
    """Keys as they are, float32 [n, dim], in memory only."""

    def __init__(self, keys: Float[np.ndarray, "n dim"], metric: Metric) -> None:
        self._keys = keys
        self.metric = metric
        self.dim = keys.shape[1]

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """The keys of entries."""
        rows: Float[np.ndarray, "m dim"] = self._keys[ids]
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        part: Part = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Distances in one pass over the chosen rows."""
        return key_distances(self._keys, queries, ids, self.metric, part)

    def problems(self) -> list[str]:
        """None that could be seen here."""
        return []


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
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        part: Part = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Distances in one pass over the chosen rows."""
        return key_distances(self._keys, queries, ids, self.metric, part)

    def problems(self) -> list[str]:
        """Values that are not finite."""
        return [
            f"a key between rows {start} and {start + _BLOCK} is not finite"
            for start in range(0, len(self._keys), _BLOCK)
            if not np.isfinite(self._keys[start : start + _BLOCK]).all()
        ]


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


class Int8Keys:
    """Keys as int8 codes [n, dim], each row with a scale of its own [n]."""

    def __init__(
        self, codes: Int8[np.ndarray, "n dim"], scales: Float[np.ndarray, " n"], metric: Metric
    ) -> None:
        self._codes, self._scales = np.asarray(codes), np.asarray(scales)
        self.metric = metric
        self.dim = codes.shape[1]

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """The keys of entries as float32."""
        rows: Float[np.ndarray, "m dim"] = self._codes[ids].astype(np.float32)
        rows *= self._scales[ids, None]
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        part: Part = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Distances in one pass over the chosen codes."""
        return scaled_key_distances(self._codes, self._scales, queries, ids, self.metric, part)

    def problems(self) -> list[str]:
        """Scales that are not finite and positive, but for those of rows of zeros."""
        problems = []
        for start in range(0, len(self._codes), _BLOCK):
            scales = self._scales[start : start + _BLOCK]
            zero = ~self._codes[start : start + _BLOCK].any(axis=1)
            if not (np.isfinite(scales) & np.where(zero, scales == 0, scales > 0)).all():
                problems.append(f"a scale between rows {start} and {start + _BLOCK} is wrong")
        return problems


@dataclass(frozen=True)
class Int8Format:
    """Every row divided by its largest value and rounded to ±127: a byte a dimension, and 4."""

    name: str = "int8"
    largest: float = 1e15  # the squares of larger ones might not add up in float32

    def layout(self, dim: int) -> Layout:
        """Codes, and the scale of each row."""
        return {"keys": (np.dtype(np.int8), (dim,)), "scales": (np.dtype(np.float32), ())}

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        """Scale and round; a row of zeros has scale 0."""
        scales = (np.abs(rows).max(axis=1) / np.float32(127)).astype(np.float32)
        codes = np.zeros(rows.shape, np.float32)
        np.divide(rows, scales[:, None], out=codes, where=scales[:, None] > 0)
        return {"keys": np.rint(codes).clip(-127, 127).astype(np.int8), "scales": scales}

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> Keys:
        """Keys over the arrays."""
        return Int8Keys(arrays["keys"], arrays["scales"], metric)


class JoinedKeys:
    """The keys of several parts as if they were one, with ids that count through them."""

    def __init__(self, parts: Sequence[Keys], first: Sequence[int]) -> None:
        """Part i holds the entries from first[i] on, up to first[i + 1]."""
        self._parts = list(zip(parts, first[:-1], first[1:], strict=True))
        self.metric = parts[0].metric
        self.dim = parts[0].dim

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """The keys of entries as float32."""
        rows = np.empty((len(ids), self.dim), np.float32)
        for part, first, stop in self._parts:
            inside = (ids >= first) & (ids < stop)
            rows[inside] = part.rows(ids[inside] - first)
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        part: Part = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Each part measures its own entries."""
        distances = part.into
        if distances is None:
            distances = np.full(ids.shape, np.inf, np.float32)
        for keys, first, _ in self._parts:
            keys.distances(queries, ids, Part(part.first + first, distances))
        return distances

    def problems(self) -> list[str]:
        """Those of all parts."""
        return [problem for part, _, _ in self._parts for problem in part.problems()]


class MergedKeys:
    """Keys of which several positions may share one: position i has row number row_of[i]."""

    def __init__(self, keys: Keys, row_of: Int[np.ndarray, " n"]) -> None:
        self._keys, self._row_of = keys, np.asarray(row_of)
        self.metric = keys.metric
        self.dim = keys.dim

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """The keys of entries as float32."""
        return self._keys.rows(self._row_of[ids])

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        part: Part = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Distances to the keys that entries share."""
        local = ids - part.first
        own = (local >= 0) & (local < len(self._row_of))
        rows = np.where(own, self._row_of[np.where(own, local, 0)], NO_ENTRY).astype(np.int64)
        return self._keys.distances(queries, rows, Part(0, part.into))

    def problems(self) -> list[str]:
        """Those of the shared keys."""
        return self._keys.problems()


FORMATS: tuple[KeyFormat, ...] = (Float16Format(), Int8Format())


def key_format(name: str) -> KeyFormat:
    """The format of this name (SettingError when there is none)."""
    for form in FORMATS:
        if form.name == name:
            return form
    names = ", ".join(form.name for form in FORMATS)
    raise SettingError(f"key format {name!r} is unknown: choose among {names}")
