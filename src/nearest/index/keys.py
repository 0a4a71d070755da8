"""Stored keys: one class for each format, behind one protocol.

`Keys` decodes entries (`rows`) and measures them (`distances`), whatever the format. A `KeyFormat`
encodes rows into the arrays that are stored, and opens those arrays as `Keys`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int8

from nearest.errors import SettingError
from nearest.index.distances import WHOLE, Shard, key_distances, scaled_key_distances
from nearest.index.neighbours import NO_ENTRY, Metric

_BLOCK = 65_536  # rows

# For each array of a format, the dtype and shape of one row; a row for every position.
Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


@runtime_checkable
class Keys(Protocol):
    """One key for each position; ids are row numbers."""

    @property
    def dim(self) -> int:
        """Dimension of keys and queries."""

    @property
    def metric(self) -> Metric:
        """What `distances` measures."""

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        """Decode the keys of entries to float32; each id must be a row."""

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        shard: Shard = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        """Distance of query i to the key of ids[i, j] (float32); +inf for an id that is no row."""

    def problems(self) -> list[str]:
        """Faults in the stored arrays, one sentence each."""


@runtime_checkable
class KeyFormat(Protocol):
    """How keys are stored."""

    @property
    def name(self) -> str:
        """Its name in the manifest and on the command line."""

    @property
    def largest(self) -> float:
        """The largest absolute value that can be stored."""

    def layout(self, dim: int) -> Layout:
        """The arrays that store keys of this dimension."""

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        """Encode float32 keys into rows of every array."""

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> Keys:
        """Open stored arrays as keys."""


class FloatKeys:
    """float16 keys [n, dim], as they are stored, or float32 ones, which are in RAM only."""

    def __init__(self, keys: Float[np.ndarray, "n dim"], metric: Metric) -> None:
        self._keys = np.asarray(keys)  # a plain array: views of a memory map are slow to make
        self.metric = metric
        self.dim = keys.shape[1]

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        rows: Float[np.ndarray, "m dim"] = self._keys[ids].astype(np.float32, copy=False)
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        shard: Shard = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        return key_distances(self._keys, queries, ids, self.metric, shard)

    def problems(self) -> list[str]:
        return [
            f"a key between rows {start} and {start + _BLOCK} is not finite"
            for start in range(0, len(self._keys), _BLOCK)
            if not np.isfinite(self._keys[start : start + _BLOCK]).all()
        ]


@dataclass(frozen=True)
class Float16Format:
    """Values rounded to float16: 2 bytes a dimension."""

    name: str = "fp16"
    largest: float = float(np.finfo(np.float16).max)

    def layout(self, dim: int) -> Layout:
        return {"keys": (np.dtype(np.float16), (dim,))}

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        return {"keys": rows.astype(np.float16)}

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> Keys:
        return FloatKeys(arrays["keys"], metric)


class Int8Keys:
    """int8 codes [n, dim] and one float32 scale for each row [n]."""

    def __init__(
        self, codes: Int8[np.ndarray, "n dim"], scales: Float[np.ndarray, " n"], metric: Metric
    ) -> None:
        self._codes, self._scales = np.asarray(codes), np.asarray(scales)
        self.metric = metric
        self.dim = codes.shape[1]

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        rows: Float[np.ndarray, "m dim"] = self._codes[ids].astype(np.float32)
        rows *= self._scales[ids, None]
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        shard: Shard = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        return scaled_key_distances(self._codes, self._scales, queries, ids, self.metric, shard)

    def problems(self) -> list[str]:
        problems = []
        for start in range(0, len(self._codes), _BLOCK):
            scales = self._scales[start : start + _BLOCK]
            zero = ~self._codes[start : start + _BLOCK].any(axis=1)
            if not (np.isfinite(scales) & np.where(zero, scales == 0, scales > 0)).all():
                problems.append(f"a scale between rows {start} and {start + _BLOCK} is wrong")
        return problems


@dataclass(frozen=True)
class Int8Format:
    """Each row scaled to ±127 and rounded: a byte a dimension, and 4 for the scale."""

    name: str = "int8"
    largest: float = 1e15  # sums of larger squares might overflow float32

    def layout(self, dim: int) -> Layout:
        return {"keys": (np.dtype(np.int8), (dim,)), "scales": (np.dtype(np.float32), ())}

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        """Scale and round. A row of zeros has scale 0."""
        scales = (np.abs(rows).max(axis=1) / np.float32(127)).astype(np.float32)
        codes = np.zeros(rows.shape, np.float32)
        np.divide(rows, scales[:, None], out=codes, where=scales[:, None] > 0)
        return {"keys": np.rint(codes).clip(-127, 127).astype(np.int8), "scales": scales}

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> Keys:
        return Int8Keys(arrays["keys"], arrays["scales"], metric)


class JoinedKeys:
    """The keys of several shards as one, with ids that count through them."""

    def __init__(self, parts: Sequence[Keys], first: Sequence[int]) -> None:
        """Shard i holds the ids from first[i] to first[i + 1] − 1."""
        self._parts = list(zip(parts, first[:-1], first[1:], strict=True))
        self.metric = parts[0].metric
        self.dim = parts[0].dim

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        rows = np.empty((len(ids), self.dim), np.float32)
        for part, first, stop in self._parts:
            inside = (ids >= first) & (ids < stop)
            rows[inside] = part.rows(ids[inside] - first)
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        shard: Shard = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        distances = shard.into
        if distances is None:
            distances = np.full(ids.shape, np.inf, np.float32)
        for keys, first, _ in self._parts:
            keys.distances(queries, ids, Shard(shard.first + first, distances))
        return distances

    def problems(self) -> list[str]:
        return [problem for part, _, _ in self._parts for problem in part.problems()]


class MergedKeys:
    """Keys that positions may share: position i has the key in row row_of[i]."""

    def __init__(self, keys: Keys, row_of: Int[np.ndarray, " n"]) -> None:
        self._keys, self._row_of = keys, np.asarray(row_of)
        self.metric = keys.metric
        self.dim = keys.dim

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        return self._keys.rows(self._row_of[ids])

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        shard: Shard = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        local = ids - shard.first
        own = (local >= 0) & (local < len(self._row_of))
        rows = np.where(own, self._row_of[np.where(own, local, 0)], NO_ENTRY).astype(np.int64)
        return self._keys.distances(queries, rows, Shard(0, shard.into))

    def problems(self) -> list[str]:
        return self._keys.problems()


FORMATS: tuple[KeyFormat, ...] = (Float16Format(), Int8Format())


def key_format(name: str) -> KeyFormat:
    """The format of this name (SettingError if there is none)."""
    for form in FORMATS:
        if form.name == name:
            return form
    names = ", ".join(form.name for form in FORMATS)
    raise SettingError(f"key format {name!r} is unknown: choose among {names}")
