"""Make a memory's keys smaller, as a new generation: fewer dims, coarser codes, merged entries.

After He et al. (arXiv:2109.04212). Tokens, documents, suffix arrays and clusters stay what they
are; the index is built anew over what is stored then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float, Int, Integer

from nearest.build.index_path import index_segments
from nearest.errors import SettingError
from nearest.index.approximate import check_spec
from nearest.index.clusters import check_neighbours, greedy_merge
from nearest.index.keys import KeyFormat, key_format
from nearest.index.neighbours import NO_ENTRY, position_dtype
from nearest.index.product import ProductFormat, product_parts, train_codebooks
from nearest.index.projection import Projection
from nearest.memory import Memory
from nearest.progress import Progress, no_progress
from nearest.store.array_files import write_array
from nearest.store.change import changing, of_generation
from nearest.store.manifest import (
    FileRecord,
    KeysRecord,
    Manifest,
    ProjectionRecord,
    publish_next,
)
from nearest.store.parts.index import IndexChoice
from nearest.store.parts.keys import (
    KEY_ARRAYS,
    KeyWriter,
    key_paths,
    open_projection,
    stored_format,
)
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
    with changing(path) as manifest:
        memory = Memory.open(path)
        if compression.merge and all(record.kept is not None for record in manifest.segments):
            raise SettingError(
                f"the entries of {path} have been merged already, and what was merged is gone: "
                "leave merging out, or build the memory anew"
            )
        dim = compression.pca or memory.keys_record.stored_dim
        choice = _index_choice(manifest, compression)
        check_spec(choice.spec, dim, None)  # before anything is written for nothing
        plan = _plan(path, memory, compression)
        rewritten = [
            _rewrite(path, manifest, segment, plan, compression, progress)
            for segment in memory.segments
        ]
        segments = index_segments(path, manifest.generation + 1, rewritten, choice, progress)
        keys = plan.record
        if compression.index is not None:
            keys = msgspec.structs.replace(keys, index=compression.index)
        publish_next(path, manifest, keys=keys, segments=segments)


def _plan(path: Path, memory: Memory, compression: Compression) -> _Plan:
    """Fit projection and centroids to a sample of the stored keys, and write them."""
    record, generation = memory.keys_record, memory.manifest.generation + 1
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
        file = write_array(path, of_generation(generation, "projection.npy"), whole.matrix)
        projection = ProjectionRecord(step.dim, file)
    name = compression.keys or record.format
    parts = product_parts(name)
    if parts is None:
        form: KeyFormat = key_format(name)
    else:
        form = ProductFormat(train_codebooks(sample, parts, rng))
        codebooks = write_array(path, of_generation(generation, "codebooks.npy"), form.codebooks)
    return _Plan(
        step,
        form,
        msgspec.structs.replace(record, format=name, projection=projection, codebooks=codebooks),
    )


def _rewrite(
    path: Path,
    manifest: Manifest,
    segment: Segment,
    plan: _Plan,
    compression: Compression,
    progress: Progress,
) -> Segment:
    """Write a segment's keys in the new format, merged where asked; its index is to come."""
    old, dim = segment.record, plan.record.stored_dim
    folder, generation = path / "segments" / old.name, manifest.generation + 1
    prefix = of_generation(generation, "")
    files, kept = {}, old.kept
    rows = np.arange(old.tokens if kept is None else kept)
    if compression.merge and kept is None:
        row_of, weights = _merge(segment, compression.neighbours or _NEIGHBOURS, progress)
        for kind, array in (("rows", row_of), ("weights", weights)):
            files[kind] = write_array(path, f"segments/{old.name}/{prefix}{kind}.npy", array)
        rows = np.flatnonzero(weights)  # merged entries' keys lie without gaps
        kept = len(rows)
    paths = key_paths(folder, plan.form, dim, prefix)
    with KeyWriter(paths, plan.form, dim, len(rows)) as file:
        for start in range(0, len(rows), _BLOCK):
            block = segment.stored_keys.rows(rows[start : start + _BLOCK])
            block = block if plan.step is None else plan.step.apply(block)
            _check_range(block, plan.form)
            file.write(start, block)
            progress("keys", start + len(block), len(rows))
    files |= {k: FileRecord.of(path, p.relative_to(path).as_posix()) for k, p in paths.items()}
    left = {kind: f for kind, f in old.files.items() if kind not in KEY_ARRAYS}
    record = msgspec.structs.replace(old, files={**left, **files}, kept=kept)
    return Segment(path, msgspec.structs.replace(manifest, keys=plan.record), record)


def _index_choice(manifest: Manifest, compression: Compression) -> IndexChoice:
    """As asked for, else as the memory's was."""
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
        return segment.search_by_keys(segment.keys.rows(some), neighbours + 1, 0).ids

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
