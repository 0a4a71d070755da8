"""Episodic memory: a dictionary whose keys are vectors and whose answers are averages.

The differentiable neural dictionary of Neural Episodic Control (Pritzel et al., 2017,
arXiv:1703.01988, §3.1): a lookup averages the values of the nearest keys, a write updates the value
of a known key or adds a new one, and the entry unused for longest gives way. The memory alone: no
agent, no game.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from nearest.errors import FolderError, NearestError, SettingError
from nearest.index.choice import AUTO
from nearest.index.mutable import MutableIndex
from nearest.index.neighbours import NO_ENTRY, Neighbours
from nearest.tensors import load_tensors, save_tensors

_KIND = "episodic memory"
_SEARCHED_AT_ONCE = 64  # keys written after one search, which are compared with each other too
_HASHED_AT_ONCE = 1024  # keys written together where no search is needed
_EVICTIONS_AT_ONCE = 1024  # entries put in order of use in one pass over all


@dataclass(frozen=True)
class EpisodicSettings:
    """Settings of an episodic memory; the defaults are the paper's.

    Attributes:
        dim: dimension of keys.
        capacity: largest number of entries; a new one then replaces the least recently used.
        value_dim: dimension of values.
        k: number of neighbours that a lookup averages.
        delta: δ of the kernel 1/(‖h − h_i‖² + δ).
        near: a key within this distance (not squared) of a stored one counts as the same key.
        rate: α of the moving average, value ← value + α·(new − value).
        index: "exact", "auto" (exact below 50,000 entries), or a FAISS index_factory string.
        nprobe: lists that an IVF index probes; FAISS's default is 1.

    Raises:
        SettingError: a value is outside its range.
    """

    dim: int
    capacity: int
    value_dim: int = 1
    k: int = 50
    delta: float = 1e-3
    near: float = 0.0
    rate: float = 0.1
    index: str = AUTO
    nprobe: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "capacity", "value_dim", "k"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.nprobe is not None and self.nprobe < 1:
            raise SettingError(f"nprobe must be at least 1, got {self.nprobe}")
        if not (self.delta > 0 and math.isfinite(self.delta)):
            raise SettingError(f"delta must be positive and finite, got {self.delta}")
        if not (self.near >= 0 and math.isfinite(self.near)):
            raise SettingError(f"near must be a distance, 0 or more, got {self.near}")
        if not 0 < self.rate <= 1:
            raise SettingError(f"rate must lie in (0, 1], got {self.rate}; 1 replaces the value")


class Lookup(NamedTuple):
    """The result of a lookup.

    Missing neighbours have id -1, distance +inf and weight 0. A query for which an approximate
    index finds no neighbour at all gets the value 0.
    """

    values: Float[np.ndarray, "q value_dim"]  # float64, weighted averages
    neighbours: Neighbours  # ids are rows of memory.keys; squared distances, float64
    weights: Float[
        np.ndarray, "q k"
    ]  # float64; a row sums to 1, or to 0 if all neighbours are missing


def inverse_distance_weights(
    distances: Float[np.ndarray, "q k"], delta: float
) -> Float[np.ndarray, "q k"]:
    """Kernel 1/(distance + δ) of squared distances, normalised over each query's neighbours.

    >>> inverse_distance_weights(np.array([[0.0, 1.0, np.inf]]), delta=1.0)
    array([[0.66666667, 0.33333333, 0.        ]])
    """
    kernel = 1 / (distances + delta)
    total = kernel.sum(axis=1, keepdims=True)
    weights: Float[np.ndarray, "q k"] = kernel / np.where(total > 0, total, 1)
    return weights


class EpisodicMemory:
    """A dictionary from float32 vectors to float64 vectors, looked up by nearness.

    >>> memory = EpisodicMemory(EpisodicSettings(dim=2, capacity=1000, k=2, delta=1.0))
    >>> memory.write(np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[10.0], [40.0]]))
    array([0, 1])
    >>> memory.lookup(np.array([[0.0, 0.0]])).values  # weights 2/3 and 1/3
    array([[20.]])
    >>> memory.write(np.array([[1.0, 0.0]]), np.array([[50.0]]))  # known: 40 + 0.1·(50 − 40)
    array([1])
    >>> memory.values[1]
    array([41.])

    A batch has the same effect as its rows one after another. A lookup counts as a use of its
    neighbours, of the nearest last; a write counts as a use of its entry.
    """

    def __init__(self, settings: EpisodicSettings) -> None:
        """An empty memory.

        Raises:
            SettingError: the index does not fit the dimension or the capacity.
        """
        self.settings = settings
        self._keys = np.zeros((settings.capacity, settings.dim), dtype=np.float32)
        self._values = np.zeros((settings.capacity, settings.value_dim))
        self._used = np.zeros(settings.capacity, dtype=np.int64)  # time of the last use
        self._size = 0
        self._time = 0
        self._index = MutableIndex(self._keys, settings.index, settings.nprobe)
        self._entry_of: dict[bytes, int] = {}  # of each key, when only equal keys are the same
        self._oldest: list[tuple[int, int]] = []  # (entry, time of use then), the oldest last

    def __len__(self) -> int:
        return self._size

    @property
    def keys(self) -> Float[np.ndarray, "n dim"]:
        """The stored keys, float32, read-only."""
        return _read_only(self._keys[: self._size])

    @property
    def values(self) -> Float[np.ndarray, "n value_dim"]:
        """The stored values, float64, read-only."""
        return _read_only(self._values[: self._size])

    def lookup(self, keys: Float[np.ndarray, "..."], *, touch: bool = True) -> Lookup:
        """Average the values of each key's k nearest entries by the inverse-distance kernel.

        Args:
            keys: [q, dim].
            touch: count the neighbours as used. False leaves the memory unchanged.

        Raises:
            SettingError: the keys are of another shape, or not finite.
            NearestError: the memory is empty.
        """
        queries = _checked(keys, "keys", (None, self.settings.dim), np.dtype(np.float32))
        if not self._size:
            raise NearestError(
                "the episodic memory is empty, so there is nothing to average: write to it first"
            )
        found = self._index.search(queries, self._size, self.settings.k)
        weights = inverse_distance_weights(found.distances, self.settings.delta)
        values = np.einsum("qk,qkv->qv", weights, self._values[found.ids])
        if touch:
            farthest_first = found.ids[:, ::-1]
            self._touch(farthest_first[farthest_first != NO_ENTRY])
        return Lookup(values, found, weights)

    def write(
        self, keys: Float[np.ndarray, "..."], values: Float[np.ndarray, "..."]
    ) -> Int[np.ndarray, " n"]:
        """Update the entry nearest to each key if it is within `near`, else add one.

        An update moves the value and keeps the stored key. A full memory drops the least recently
        used entry.

        Args:
            keys: [n, dim].
            values: [n, value_dim].

        Returns:
            The row of `memory.keys` that each pair was written to; a later pair may replace it.

        Raises:
            SettingError: the arrays are of another shape, or not finite; nothing is written then.
        """
        rows = _checked(keys, "keys", (None, self.settings.dim), np.dtype(np.float32))
        wanted = (len(rows), self.settings.value_dim)
        new_values = _checked(values, "values", wanted, np.dtype(np.float64))
        find = self._entries_near if self.settings.near else self._entries_equal
        at_once = _SEARCHED_AT_ONCE if self.settings.near else _HASHED_AT_ONCE
        # At most the capacity, so that no row drops an entry that another row of its batch used.
        at_once = min(at_once, self.settings.capacity)
        written: list[int] = []
        while len(written) < len(rows):
            batch = slice(len(written), len(written) + at_once)
            entries, new = find(rows[batch])
            self._store(rows[batch], new_values[batch], np.array(entries), np.array(new))
            written += entries
        return np.array(written, dtype=np.int64)

    def _entries_equal(self, keys: Float[np.ndarray, "n dim"]) -> tuple[list[int], list[bool]]:
        """The entry of each key, found by hash, and whether it is new."""
        entries: list[int] = []
        new: list[bool] = []
        in_use: set[int] = set()
        data, size = keys.tobytes(), keys[0].nbytes
        for key in (data[start : start + size] for start in range(0, len(data), size)):
            entry = self._entry_of.get(key, NO_ENTRY)
            new.append(entry == NO_ENTRY)
            if entry == NO_ENTRY:
                entry = self._entry_of[key] = self._free_entry(in_use)
            in_use.add(entry)
            entries.append(entry)
        return entries, new

    def _entries_near(self, keys: Float[np.ndarray, "n dim"]) -> tuple[list[int], list[bool]]:
        """The same by one search, for the keys before the first that depends on an earlier one."""
        limit = self.settings.near**2
        found = self._index.search(keys, self._size, 1)
        known = np.where(found.distances[:, 0] <= limit, found.ids[:, 0], NO_ENTRY).tolist()
        gaps = keys[:, None].astype(np.float64) - keys
        close = np.einsum("nmd,nmd->nm", gaps, gaps) <= limit
        entries: list[int] = []
        new = np.zeros(len(keys), dtype=bool)
        in_use: set[int] = set()
        replaced: set[int] = set()  # entries whose keys are no longer those that the search saw
        for row, entry in enumerate(known):
            if entry in replaced or (close[row] & new).any():
                break
            if entry == NO_ENTRY:
                entry = self._free_entry(in_use)
                new[row] = True
                replaced.add(entry)
            in_use.add(entry)
            entries.append(entry)
        return entries, new[: len(entries)].tolist()

    def _store(
        self,
        keys: Float[np.ndarray, "_ dim"],
        values: Float[np.ndarray, "_ value_dim"],
        entries: Int[np.ndarray, " n"],
        new: Bool[np.ndarray, " n"],
    ) -> None:
        """Fill new entries, then update known ones, which may be among the new."""
        rows = np.flatnonzero(new)
        self._keys[entries[rows]] = keys[rows]
        self._values[entries[rows]] = values[rows]
        self._index.wrote(entries[rows])
        for row in np.flatnonzero(~new):
            entry = entries[row]
            self._values[entry] += self.settings.rate * (values[row] - self._values[entry])
        self._touch(entries)

    def _free_entry(self, in_use: set[int]) -> int:
        """An entry for a new key: an empty one, or the least recently used one outside `in_use`."""
        if self._size < self.settings.capacity:
            self._size += 1
            return self._size - 1
        entry = self._least_recently_used(in_use)
        self._entry_of.pop(self._keys[entry].tobytes(), None)
        return entry

    def _least_recently_used(self, in_use: set[int]) -> int:
        """The least recently used entry outside `in_use`; many are sorted at a time.

        Times only grow: entries outside the sorted ones were used later than all of them, and
        sorted ones that were used since are skipped.
        """
        while True:
            while self._oldest:
                entry, time = self._oldest.pop()
                if self._used[entry] == time and entry not in in_use:
                    return entry
            count = min(len(in_use) + _EVICTIONS_AT_ONCE, self._size)
            oldest = np.argpartition(self._used[: self._size], count - 1)[:count]
            oldest = oldest[np.argsort(-self._used[oldest])]
            times = self._used[oldest]
            self._oldest = list(zip(oldest.tolist(), times.tolist(), strict=True))

    def _touch(self, entries: Int[np.ndarray, " n"]) -> None:
        """Count entries as used, one after another."""
        self._used[entries] = self._time + np.arange(len(entries))  # of a repeated entry, the last
        self._time += len(entries)

    def save(self, path: Path | str) -> None:
        """Write the memory to one safetensors file, atomically.

        Raises:
            FolderError: it cannot be written.
        """
        arrays: dict[str, np.ndarray] = {
            "keys": self._keys,
            "values": self._values,
            "used": self._used,
        }
        tensors = {name: torch.from_numpy(array[: self._size]) for name, array in arrays.items()}
        save_tensors(Path(path), _KIND, tensors, asdict(self.settings))

    @classmethod
    def load(cls, path: Path | str) -> "EpisodicMemory":
        """Read what `save` wrote; the memory behaves as the saved one did.

        Raises:
            FolderError: the file is missing, damaged, or of another kind.
        """
        tensors, settings = load_tensors(Path(path), _KIND)
        try:
            memory = cls(EpisodicSettings(**settings))
            memory._restore(**{name: tensor.numpy() for name, tensor in tensors.items()})
        except (TypeError, ValueError) as error:
            raise FolderError(
                f"{path} was written by another version of nearest ({error}): write it again"
            ) from error
        return memory

    def _restore(self, keys: Any, values: Any, used: Any) -> None:
        self._size = len(keys)
        self._keys[: self._size], self._values[: self._size] = keys, values
        self._used[: self._size] = used
        self._time = int(used.max(initial=-1)) + 1
        if not self.settings.near:
            self._entry_of = {key.tobytes(): entry for entry, key in enumerate(keys)}


def _checked(
    array: Float[np.ndarray, "..."],
    name: str,
    shape: tuple[int | None, int],
    dtype: "np.dtype[np.floating]",
) -> Float[np.ndarray, "n dim"]:
    """Finite rows in `dtype`, without negative zeros, which equal zero but hash differently."""
    wanted = f"[{'n' if shape[0] is None else shape[0]}, {shape[1]}]"
    if array.ndim != 2 or array.shape[1] != shape[1] or shape[0] not in (None, len(array)):
        raise SettingError(
            f"the {name} are {list(array.shape)}, and {wanted} is needed: give one row for each"
        )
    with np.errstate(over="ignore"):
        rows: Float[np.ndarray, "n dim"] = array.astype(dtype, order="C") + dtype.type(0)
        # Squared distances are at most 4 times the larger squared norm and must not overflow.
        sound = np.isfinite(4 * np.square(rows).sum(axis=1))
    if not sound.all():
        raise SettingError(
            f"row {int(np.argmin(sound))} of the {name} is not finite, or too large for distances "
            f"in {dtype}: leave it out, or check what made it"
        )
    return rows


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
