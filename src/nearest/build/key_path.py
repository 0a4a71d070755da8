"""The keys of a segment as one of its access paths: made by the model, or taken over."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int, UInt8

from nearest.build.new_segment import NewSegment
from nearest.corpus.batches import WindowBatch
from nearest.encode.encoder import Encoder
from nearest.errors import ModelError
from nearest.index.keys import KeyFormat
from nearest.index.neighbours import NO_ENTRY, position_dtype
from nearest.store.manifest import FileRecord, KeysRecord, SegmentRecord
from nearest.store.parts.keys import (
    KeyWriter,
    key_paths,
    open_key_arrays,
    open_projection,
    stored_format,
)
from nearest.store.segment import Segment

_BLOCK = 16_384  # rows that are copied at once


def write(new: NewSegment, record: SegmentRecord) -> SegmentRecord:
    """Encode new text, or copy what is left of merged segments, as it is stored."""
    keys = new.plan.manifest.keys
    if keys is None:
        return record
    form = stored_format(new.plan.root, keys)
    paths = key_paths(new.plan.root / new.plan.folder, form, keys.stored_dim)
    files: dict[str, FileRecord] = {}
    kept = None
    if new.plan.given is not None:
        with KeyWriter(paths, form, keys.stored_dim, record.tokens) as file:
            _take(new, new.plan.given, form, file)
    elif new.plan.encoder is not None:
        batches = 0 if new.plan.journal is None else new.plan.journal.stage.batches
        with KeyWriter(paths, form, keys.stored_dim, record.tokens, going_on=batches > 0) as file:
            _encode(new, new.plan.encoder, form, keys, file, batches)
    else:
        shared = any(segment.stored_weights is not None for segment in new.plan.merged)
        if shared:
            rows, weights, kept = _shared_rows(new.plan.merged)
            files["rows"] = new.write("rows.npy", rows)
            files["weights"] = new.write("weights.npy", weights)
        with KeyWriter(
            paths, form, keys.stored_dim, record.tokens if kept is None else kept
        ) as file:
            _copy(new, form, keys, shared, file)
    for kind, path in paths.items():
        files[kind] = FileRecord.of(new.plan.root, path.relative_to(new.plan.root).as_posix())
    return record.with_files(files, kept=kept)


def _encode(
    new: NewSegment,
    encoder: Encoder,
    form: KeyFormat,
    keys: KeysRecord,
    file: KeyWriter,
    written: int,
) -> None:
    """Encode every valued position; rows of document ends stay zero and are never looked up.

    The first `written` batches are in the file already.
    """
    journal = new.plan.journal
    projection, done, total = open_projection(new.plan.root, keys), 0, new.record.entries
    documents = (new.tokens[start:stop] for start, stop in pairwise(new.offsets))
    new.plan.progress("keys", 0, total)
    for number, batch in enumerate(encoder.batches(documents, new.sources), 1):
        done += len(batch.positions)
        if number <= written:
            continue
        made = encoder.encode(batch)
        rows = made.numpy() if projection is None else projection.apply(made.numpy())
        _check_range(rows, batch, keys, form)
        entries = new.offsets[batch.documents] + batch.positions
        breaks = np.flatnonzero(np.diff(entries) != 1) + 1
        for start, stop in pairwise([0, *breaks, len(entries)]):
            file.write(int(entries[start]), rows[start:stop])
        new.plan.progress("keys", done, total)
        if journal is not None and journal.due:
            file.flush()
            journal.note(batches=number)


def _take(
    new: NewSegment, given: Float[np.ndarray, "entries dim"], form: KeyFormat, file: KeyWriter
) -> None:
    """Write keys that were made elsewhere; between documents there is a position without."""
    taken = 0
    for start, stop in pairwise(new.offsets.tolist()):
        for first in range(start, stop - 1, _BLOCK):
            count = min(_BLOCK, stop - 1 - first)
            rows = np.asarray(given[taken : taken + count], np.float32)
            if not bool(np.abs(rows).max() <= form.largest):  # so that NaN is refused, too
                raise ModelError(
                    f"a key between entries {taken:,} and {taken + count:,} is not finite, or too "
                    f"large for {form.name} keys: make the datastore anew, or try --keys int8"
                )
            file.write(first, rows)
            taken += count
            new.plan.progress("keys", taken, new.record.entries)


def _check_range(
    rows: Float[np.ndarray, "n dim"], batch: WindowBatch, keys: KeysRecord, form: KeyFormat
) -> None:
    """Refuse keys that the format cannot hold: NaN, infinite, or in float16 beyond ±65,504."""
    if bool(np.abs(rows).max() <= form.largest):  # False for NaN too
        return
    wrong = ~(np.abs(rows) <= form.largest)
    bad = int(np.flatnonzero(wrong.any(axis=1))[0])
    value = rows[bad][wrong[bad]][0]
    raise ModelError(
        f"the key {keys.layer} is {value:g} at token {batch.positions[bad]} of document number "
        f"{batch.documents[bad] + 1}, which {form.name} keys cannot hold: check the model's "
        "weights, load it in float32, or try the other key layer (--key-layer)"
    )


def _copied_rows(segment: Segment, shared: bool) -> Int[np.ndarray, " m"]:
    """The stored rows of a merged segment that go over, in their new order."""
    if not shared:
        return np.flatnonzero(~segment.gone)
    return segment.searched if segment.rows is None else segment.rows[segment.searched]


def _copy(
    new: NewSegment, form: KeyFormat, keys: KeysRecord, shared: bool, file: KeyWriter
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
    merged: Sequence[Segment],
) -> tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, " n"], int]:
    """The row of the key of each position left, how many entries each stands for, and all rows."""
    row_of, weights, first = [], [], 0
    for segment in merged:
        heads = segment.searched
        old = np.arange(segment.record.tokens) if segment.rows is None else segment.rows
        number = np.full(int(old.max()) + 2, NO_ENTRY)  # the last is that of row -1
        number[old[heads]] = first + np.arange(len(heads))
        counts = segment.weights
        if counts is None:
            counts = np.zeros(segment.record.tokens, np.uint8)
            counts[heads] = 1
        left = ~segment.gone
        row_of.append(number[old[left]])
        weights.append(counts[left])
        first += len(heads)
    rows = np.concatenate(row_of)
    return rows.astype(position_dtype(len(rows))), np.concatenate(weights), first


def reachable(segment: Segment) -> Int[np.ndarray, "_"]:
    """Entries that have a key."""
    if segment.record.index is None:
        return np.empty(0, np.int64)
    return segment.keyed


def problems(segment: Segment) -> list[str]:
    """Whether keys are finite, and entries that share them are counted."""
    if segment.record.index is None:
        return []
    return segment.stored_keys.problems() + _merge_problems(segment)


def _merge_problems(segment: Segment) -> list[str]:
    """Whether each kept entry has a key of its own, and counts those that share it."""
    weights, rows = segment.stored_weights, segment.stored_rows
    if weights is None or rows is None:
        return []
    kept = np.flatnonzero(weights)
    shared = rows[rows != NO_ENTRY]
    sound = (
        len(kept) == segment.record.kept
        and np.array_equal(rows[kept], np.arange(len(kept)))
        and ((shared >= 0) & (shared < len(kept))).all()
        and np.array_equal(np.bincount(shared, minlength=len(kept)), weights[kept])
    )
    return [] if sound else ["the weights of merged entries do not count those that share a key"]
