"""The keys of a segment: writing, opening, copying and checking them.

All segments share the format of their keys, and the projection and centroids that it may need.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nearest.folder import ArrayFile, open_array
from nearest.index.ids import position_dtype
from nearest.index.keys import KeyFormat, Keys, key_format
from nearest.index.neighbours import NO_ENTRY, Metric
from nearest.index.product import CENTROIDS, ProductFormat, product_parts
from nearest.index.projection import Projection
from nearest.store.manifest import KeysRecord, SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.parts.corpus import Paths
from nearest.store.records import FileRecord

if TYPE_CHECKING:
    from nearest.store.new_segment import NewSegment
    from nearest.store.segment import Segment

ARRAYS = {"keys": "keys.npy", "scales": "scales.npy"}  # of some format
LAYOUT = {**ARRAYS, "rows": "rows.npy", "weights": "weights.npy"}
SHARED = {"projection": "projection.npy", "codebooks": "codebooks.npy"}
_FLOAT = np.dtype(np.float32)
_BLOCK = 16_384  # rows that are copied at once


@dataclass(frozen=True)
class Merged:
    """Which entries of a segment share a key, where some were merged (`nearest compress`).

    Attributes:
        rows: the row of the key that each position has or shares, -1 where there is none.
        weights: how many entries each position stands for, 0 for those merged into another.
    """

    rows: Int[np.ndarray, " n"]
    weights: UInt8[np.ndarray, " n"]

    @cached_property
    def heads(self) -> Int[np.ndarray, " heads"]:
        """The entries that others have been merged into, ascending."""
        return np.flatnonzero(self.weights)

    def left(self, alive: Bool[np.ndarray, " n"]) -> "Merged":
        """Without removed entries, and without the keys that they shared with others."""
        has_key = np.append(alive[self.heads], False)  # the last is that of row -1
        rows = np.where(alive & has_key[self.rows], self.rows, NO_ENTRY).astype(self.rows.dtype)
        heads = self.heads[alive[self.heads]]
        counts = np.bincount(rows[rows >= 0], minlength=len(self.heads))
        weights = np.zeros_like(self.weights)
        weights[heads] = counts[self.rows[heads]]
        return Merged(rows, weights)


class KeyWriter:
    """Write keys of a format, a row a position; rows never written are zero."""

    def __init__(
        self,
        files: NewFiles,
        form: KeyFormat,
        dim: int,
        rows: int,
        *,
        going_on: bool = False,
    ) -> None:
        """Begin `rows` keys of `dim` dimensions; `going_on` keeps those that are there.

        Raises:
            FolderError: what is there is not of this format and size.
        """
        layout = form.layout(dim)
        if going_on:
            open_key_arrays({name: files.path(ARRAYS[name]) for name in layout}, form, dim, rows)
        self._format, self._places = form, files
        self._open = ExitStack()
        self._files: dict[str, ArrayFile] = {}
        with ExitStack() as opened:  # closes what was opened before a full disk was met
            for name, (dtype, shape) in layout.items():
                self._files[name] = opened.enter_context(
                    ArrayFile(files.path(ARRAYS[name]), dtype, shape, rows=rows, going_on=going_on)
                )
            self._open = opened.pop_all()

    def write(self, first: int, rows: Float[np.ndarray, "m dim"]) -> None:
        """Write float32 keys at the positions from `first` on."""
        for name, encoded in self._format.encode(rows).items():
            self._files[name].write(first, encoded)

    def write_stored(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        """Write rows of every array, as another file of this format holds them."""
        for name, rows in arrays.items():
            self._files[name].write(first, rows)

    def flush(self) -> None:
        """Make what was written durable."""
        for file in self._files.values():
            file.flush()

    def records(self) -> dict[str, FileRecord]:
        """Describe the files, once they are closed."""
        return {name: self._places.record(ARRAYS[name]) for name in self._files}

    def __enter__(self) -> "KeyWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        """Make the files durable, unless the writing failed."""
        self._open.__exit__(*error)


def open_keys(paths: Paths, form: KeyFormat, dim: int, rows: int, metric: Metric) -> Keys:
    """Keys over the arrays of a format; raises as `open_key_arrays`."""
    return form.open(open_key_arrays(paths, form, dim, rows), metric)


def open_key_arrays(paths: Paths, form: KeyFormat, dim: int, rows: int) -> dict[str, np.ndarray]:
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


def open_merged(paths: Paths, record: SegmentRecord) -> Merged:
    """Map the arrays of merged entries (KeyError or FolderError as `open_key_arrays`)."""
    rows = open_array(paths["rows"], position_dtype(record.tokens), (record.tokens,))
    return Merged(rows, open_array(paths["weights"], np.dtype(np.uint8), (record.tokens,)))


def open_projection(folder: Path, record: KeysRecord | None) -> Projection | None:
    """What keys and queries go through, if anything.

    Raises:
        FolderError: its file is not what the manifest says.
    """
    if record is None or record.projection is None:
        return None
    shape = (record.projection.dim, record.dim + 1)
    return Projection(open_array(folder / record.projection.file.path, _FLOAT, shape))


def write(new: "NewSegment", record: SegmentRecord) -> SegmentRecord:
    """Encode new text, or copy the stored keys of live entries from the segments being merged."""
    plan, keys = new.plan, new.plan.manifest.keys
    if keys is None:
        return record
    form, files = stored_format(new.files.root, keys), dict[str, FileRecord]()
    rows, kept = record.tokens, None
    shared = any(segment.merged is not None for segment in plan.merged)
    if shared:
        row_of, weights, kept = _shared_rows(plan.merged)
        files = {
            "rows": new.files.write(LAYOUT["rows"], row_of),
            "weights": new.files.write(LAYOUT["weights"], weights),
        }
        rows = kept
    going_on = plan.make_keys is not None and new.batches_written > 0
    with KeyWriter(new.files, form, keys.stored_dim, rows, going_on=going_on) as file:
        if plan.make_keys is not None:
            plan.make_keys(new, form, file)
        else:
            _copy(new, form, keys, shared, file)
    made_on = None if plan.make_keys is None else plan.made_on
    return record.with_files({**files, **file.records()}, kept=kept, made_on=made_on)


def _copied_rows(segment: "Segment", shared: bool) -> Int[np.ndarray, " m"]:
    """Rows of one merged segment that are copied, in their new order."""
    if not shared:
        return np.flatnonzero(segment.alive)
    return segment.searched if segment.merged is None else segment.merged.rows[segment.searched]


def _copy(
    new: "NewSegment", form: KeyFormat, keys: KeysRecord, shared: bool, file: KeyWriter
) -> None:
    first = 0
    for segment in new.plan.merged:
        record = segment.record
        stored = record.tokens if record.kept is None else record.kept
        arrays = open_key_arrays(segment.paths, form, keys.stored_dim, stored)
        chosen = _copied_rows(segment, shared)
        for start in range(0, len(chosen), _BLOCK):
            block = chosen[start : start + _BLOCK]
            file.write_stored(first, {name: array[block] for name, array in arrays.items()})
            first += len(block)
            new.plan.progress("keys", first, None)


def _shared_rows(
    merged: "Sequence[Segment]",
) -> tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, " n"], int]:
    """Rows and weights of all live positions after the merge, and the number of rows."""
    row_of, weights, first = [], [], 0
    for segment in merged:
        heads = segment.searched
        old, counts = np.arange(segment.record.tokens), np.zeros(segment.record.tokens, np.uint8)
        counts[heads] = 1
        if segment.merged is not None:
            old, counts = segment.merged.rows, segment.merged.weights
        number = np.full(int(old.max()) + 2, NO_ENTRY)  # the last is that of row -1
        number[old[heads]] = first + np.arange(len(heads))
        row_of.append(number[old[segment.alive]])
        weights.append(counts[segment.alive])
        first += len(heads)
    rows = np.concatenate(row_of)
    return rows.astype(position_dtype(len(rows))), np.concatenate(weights), first


def served(segment: "Segment") -> Int[np.ndarray, " _"]:
    """The entries that have a key."""
    return segment.keyed if segment.record.index is not None else np.empty(0, np.int64)


def check(segment: "Segment") -> list[str]:
    """Whether keys are finite, and entries that share them are counted."""
    if segment.record.index is None:
        return []
    return segment.stored_keys.problems() + _merge_problems(segment)


def _merge_problems(segment: "Segment") -> list[str]:
    """Whether each kept entry has a key of its own, and counts those that share it."""
    merged = segment.stored_merged  # has checked that each kept entry has a row of its own
    if merged is None:
        return []
    shared = merged.rows[merged.rows != NO_ENTRY]
    counts = np.bincount(shared, minlength=len(merged.heads))
    sound = np.array_equal(counts, merged.weights[merged.heads])
    return [] if sound else ["the weights of merged entries do not count those that share a key"]
