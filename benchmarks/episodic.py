"""Episodic memory beside a plain dictionary with numpy: batches looked up and written.

python benchmarks/episodic.py --entries 100000 --dim 64
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from common import interleaved, machine, medians, report, timed
from nearest.episodic import EpisodicMemory, EpisodicSettings


class PlainMemory:
    """What one would write first: a dictionary in order of use, and a numpy scan for each key."""

    def __init__(self, settings: EpisodicSettings) -> None:
        self._settings = settings
        self._keys = np.zeros((settings.capacity, settings.dim), np.float32)
        self._values = np.zeros((settings.capacity, settings.value_dim))
        self._use: OrderedDict[int, None] = OrderedDict()
        self._entry_of: dict[bytes, int] = {}

    def fill(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Keys that are not near each other, without a search for each."""
        self._keys[:], self._values[:] = keys, values
        self._use = OrderedDict.fromkeys(range(len(keys)))
        self._entry_of = {key.tobytes(): entry for entry, key in enumerate(keys)}

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """The averages [q, value_dim]."""
        values = []
        for key in keys:
            found, distances = self._nearest(key, self._settings.k)
            weights = 1 / (distances + self._settings.delta)
            values.append(weights / weights.sum() @ self._values[found])
            for entry in found[::-1].tolist():
                self._use.move_to_end(entry)
        return np.array(values)

    def write(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Update, or add and evict."""
        for key, value in zip(keys, values, strict=True):
            entry = self._known(key)
            if entry is not None:
                self._values[entry] += self._settings.rate * (value - self._values[entry])
            else:
                entry = self._use.popitem(last=False)[0]
                self._entry_of.pop(self._keys[entry].tobytes(), None)
                self._keys[entry], self._values[entry] = key, value
                self._entry_of[key.tobytes()] = entry
            self._use[entry] = None
            self._use.move_to_end(entry)

    def _nearest(self, key: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances = ((self._keys - key) ** 2).sum(1)
        found = np.argpartition(distances, k - 1)[:k]
        found = found[np.argsort(distances[found])]
        return found, distances[found]

    def _known(self, key: np.ndarray) -> int | None:
        if not self._settings.near:
            return self._entry_of.get(key.tobytes())
        found, distances = self._nearest(key, 1)
        return int(found[0]) if distances[0] <= self._settings.near**2 else None


def filled(settings: EpisodicSettings) -> tuple[EpisodicMemory, PlainMemory, np.ndarray]:
    """Both sides full of the same entries, and their keys."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(settings.capacity, settings.dim)).astype(np.float32)
    values = rng.normal(size=(settings.capacity, 1))
    ours, plain = EpisodicMemory(settings), PlainMemory(settings)
    ours.write(keys, values)
    plain.fill(keys, values)
    return ours, plain, keys


def to_write(keys: np.ndarray, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Pairs of which half are known, among what was written last, and half are new and evict."""
    known = keys[len(keys) // 2 :][rng.choice(len(keys) // 2, rows)]
    new = rng.normal(size=known.shape).astype(np.float32)
    return np.where(rng.random((rows, 1)) < 0.5, known, new), rng.normal(size=(rows, 1))


def compare(
    ours: EpisodicMemory, plain: PlainMemory, keys: np.ndarray, batch: int, options: Any
) -> None:
    """Time both sides, in turn, looking up and writing the same rows in batches of one size."""
    rng = np.random.default_rng(batch)
    queries = keys[rng.choice(len(keys), options.rows)] + np.float32(0.1)
    gap = np.abs(ours.lookup(queries).values - plain.lookup(queries)).max()
    pairs = [to_write(keys, options.rows, rng) for _ in range(options.rounds + 1)]

    def in_batches(work: Callable[..., object], *arrays: np.ndarray) -> float:
        parts = [slice(start, start + batch) for start in range(0, options.rows, batch)]
        return timed(lambda: [work(*(array[part] for array in arrays)) for part in parts])[0]

    def writing(side: EpisodicMemory | PlainMemory) -> Callable[[], float]:
        rounds = iter(pairs)
        return lambda: in_batches(side.write, *next(rounds))

    sides = {
        "lookup_nearest": lambda: in_batches(ours.lookup, queries),
        "lookup_plain": lambda: in_batches(plain.lookup, queries),
        "write_nearest": writing(ours),
        "write_plain": writing(plain),
    }
    for side in sides.values():
        side()  # the first write to a full memory puts its entries in order of use
    middle = medians(interleaved(options.rounds, **sides))
    report(
        benchmark="episodic",
        batch=batch,
        microseconds_a_row={name: 1e6 * middle[name] / options.rows for name in middle},
        times_as_fast={
            name: middle[f"{name}_plain"] / middle[f"{name}_nearest"]
            for name in ("lookup", "write")
        },
        largest_difference=gap,
        settings=asdict(ours.settings),
        **machine(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"entries": 100_000, "dim": 64, "rows": 256, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--index", default="exact")
    parser.add_argument("--nprobe", type=int, default=None)
    options = parser.parse_args()
    for near in (0.0, 0.5):
        settings = EpisodicSettings(
            options.dim, options.entries, near=near, index=options.index, nprobe=options.nprobe
        )
        sides = filled(settings)
        for batch in (1, 32, 256):
            compare(*sides, batch, options)


if __name__ == "__main__":
    main()
