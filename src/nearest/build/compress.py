"""Make a memory's keys smaller, as a new snapshot: fewer dims, coarser codes, merged entries.

After He et al. (arXiv:2109.04212). Tokens, documents, suffix arrays and clusters stay what they
are; the index is built anew over what is stored then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float, Int, Integer

from nearest.errors import SettingError
from nearest.index.building import check_spec
from nearest.index.clusters import check_neighbours, greedy_merge
from nearest.index.ids import position_dtype
from nearest.index.keys import KeyFormat, key_format
from nearest.index.neighbours import NO_ENTRY
from nearest.index.product import ProductFormat, product_parts, train_codebooks
from nearest.index.projection import Projection
from nearest.progress import Progress, no_progress
from nearest.store.change import Change, changing
from nearest.store.manifest import (
    KeysRecord,
    Manifest,
    ProjectionRecord,
    SegmentRecord,
)
from nearest.store.new_files import NewFiles
from nearest.store.parts.index import IndexChoice, write_all
from nearest.store.parts.keys import (
    ARRAYS,
    LAYOUT,
    SHARED,
    KeyWriter,
    open_projection,
    stored_format,
)
from nearest.store.records import FileRecord
from nearest.store.segment import Segment

_SEED = 0
_SAMPLE = 32_768  # keys that principal components and centroids are found in
_BLOCK = 16_384  # keys that are rewritten at once
_NEIGHBOURS = 9  # as in the paper


@dataclass(frozen=True)
class Compression:
    """What to do to the keys; None and False leave them as they are.

    Attributes:
        keys: fp16, int8, or pqM: a byte for each of M parts.
        pca: dimensions to keep.
        merge: join near entries of the same value into one that counts for all of them.
        neighbours: of each entry, that may be merged into it; 9 when None.
        index: a FAISS factory string, exact or auto; None builds what was asked for before.
        recall: to tune the index to; None: what it was tuned to.
    """

    keys: str | None = None
    pca: int | None = None
    merge: bool = False
    neighbours: int | None = None
    index: str | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        if self.keys is None and self.pca is None and not self.merge:
            raise SettingError("nothing is to be compressed: say how (--keys, --pca, --merge)")
        if self.keys is not None and product_parts(self.keys) is None:
            key_format(self.keys)
        if self.neighbours is not None:
            check_neighbours(self.neighbours)
            if not self.merge:
                raise SettingError("neighbours are for merging: ask for it too (--merge)")


class _Plan(NamedTuple):
    """How all segments' keys are to be stored: the map they go through first, and the format."""

    step: Projection | None
    form: KeyFormat
    record: KeysRecord


def compress_memory(path: Path, compression: Compression, progress: Progress = no_progress) -> None:
    """Rewrite the keys of every segment, and its index.

    Raises:
        SettingError: the settings do not fit the memory, or it has no keys.
        FolderError: the folder is no memory, or cannot be written.
    """
    with changing(path) as change:
        memory, manifest = change.snapshot, change.manifest
        if compression.merge and all(record.kept is not None for record in manifest.segments):
            raise SettingError(
                f"the entries of {path} have been merged already, and what was merged is gone: "
                "leave merging out, or build the memory anew"
            )
        dim = compression.pca or memory.keys_record.stored_dim
        choice = _index_choice(manifest, compression)
        check_spec(choice.spec, dim, None)  # before anything is written for nothing
        plan = _plan(change, compression)
        rewritten = []
        for segment in change.segments:
            files = change.files(segment.record.name)
            record = _rewrite(files, segment, plan, compression, progress)
            changed = msgspec.structs.replace(manifest, keys=plan.record)
            rewritten.append((files, Segment(path, changed, record)))
        segments, keys = write_all(rewritten, choice, progress), plan.record
        if compression.index is not None:
            keys = msgspec.structs.replace(keys, index=compression.index)
        change.publish(keys=keys, segments=segments, keys_of=change.number)


def _plan(change: Change, compression: Compression) -> _Plan:
    """Fit projection and centroids to a sample of the stored keys, and write them."""
    memory, path, files = change.snapshot, change.path, change.files()
    record = memory.keys_record
    if compression.keys is None and compression.pca is None:
        return _Plan(None, stored_format(path, record), record)
    rng = np.random.default_rng(_SEED)
    entries = memory.keyed_entries()
    chosen = rng.choice(entries, size=min(_SAMPLE, len(entries)), replace=False)
    sample = memory.keys.rows(np.sort(chosen))
    step, projection, codebooks = None, record.projection, None
    if compression.pca is not None:
        step = Projection.fit(sample, compression.pca, record.metric)
        sample = step.apply(sample)
        whole = step.after(open_projection(path, record))
        projection = ProjectionRecord(step.dim, files.write(SHARED["projection"], whole.matrix))
    name = compression.keys or record.format
    parts = product_parts(name)
    if parts is None:
        form: KeyFormat = key_format(name)
    else:
        form = ProductFormat(train_codebooks(sample, parts, rng))
        codebooks = files.write(SHARED["codebooks"], form.codebooks)
    return _Plan(
        step,
        form,
        msgspec.structs.replace(record, format=name, projection=projection, codebooks=codebooks),
    )


def _rewrite(
    files: NewFiles, segment: Segment, plan: _Plan, compression: Compression, progress: Progress
) -> SegmentRecord:
    """Write a segment's keys in the new format, merged where asked; its index is to come."""
    old, kept, written = segment.record, segment.record.kept, dict[str, FileRecord]()
    rows = np.arange(old.tokens if kept is None else kept)
    if compression.merge and kept is None:
        row_of, weights = _merge(segment, compression.neighbours or _NEIGHBOURS, progress)
        written["rows"] = files.write(LAYOUT["rows"], row_of)
        written["weights"] = files.write(LAYOUT["weights"], weights)
        rows = np.flatnonzero(weights)  # merged entries' keys lie without gaps
        kept = len(rows)
    with KeyWriter(files, plan.form, plan.record.stored_dim, len(rows)) as file:
        for start in range(0, len(rows), _BLOCK):
            block = segment.stored_keys.rows(rows[start : start + _BLOCK])
            block = block if plan.step is None else plan.step.apply(block)
            _check_range(block, plan.form)
            file.write(start, block)
            progress("keys", start + len(block), len(rows))
    left = {kind: f for kind, f in old.files.items() if kind not in ARRAYS}
    return msgspec.structs.replace(old, files={**left, **written, **file.records()}, kept=kept)


def _index_choice(manifest: Manifest, compression: Compression) -> IndexChoice:
    """The index choice asked for, or else the memory's own."""
    before = IndexChoice.of(manifest)
    return IndexChoice(
        before.spec if compression.index is None else compression.index,
        before.recall if compression.recall is None else compression.recall,
    )


def _merge(
    segment: Segment, neighbours: int, progress: Progress
) -> tuple[Int[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """The row of the key that each position has or shares, and how many each stands for."""
    entries, tokens = segment.entries, segment.record.tokens
    values = np.full(tokens, NO_ENTRY)
    values[entries] = segment.tokens[entries + 1]

    def near(some: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b k"]:
        return segment.searcher.search(segment.keys.rows(some), neighbours + 1).ids

    merged = greedy_merge(values, entries, near, np.random.default_rng(_SEED), progress)
    number = np.cumsum(merged.weights > 0) - 1
    row_of = np.full(tokens, NO_ENTRY, position_dtype(tokens))
    row_of[entries] = number[merged.into[entries]]
    return row_of, merged.weights


def _check_range(rows: Float[np.ndarray, "m dim"], form: KeyFormat) -> None:
    largest = float(np.abs(rows).max())
    if not largest <= form.largest:
        raise SettingError(
            f"a key reaches {largest:g}, which {form.name} keys cannot hold: choose int8 (--keys)"
        )
