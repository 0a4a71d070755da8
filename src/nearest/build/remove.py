"""Take documents back, without the model that built the memory."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nearest.corpus.documents import Document
from nearest.errors import CorpusError, SettingError
from nearest.store.change import Change, changing
from nearest.store.manifest import SegmentRecord
from nearest.store.parts.corpus import LAYOUT
from nearest.store.segment import Segment
from nearest.store.snapshot import Snapshot
from nearest.store.stored_ids import Stored, StoredIds


def remove_documents(
    path: Path, ids: Iterable[str], where: Mapping[str, Any]
) -> Iterator[Document]:
    """Take documents back: those with these ids, or with all of this metadata.

    A text in `where` also means the value of metadata that it is the JSON of: "2020" means 2020.

    Returns:
        What was removed, in the order in which it was stored; read as it is asked for.

    Raises:
        CorpusError: an id is not there, no document fits, or none would be left.
        SettingError: neither ids nor metadata are given, or both.
    """
    ids = list(dict.fromkeys(ids))
    if bool(ids) == bool(where):
        raise SettingError("say which documents: either by id (--doc) or by metadata (--where)")
    with changing(path) as change:
        memory = change.snapshot
        removed = sorted(StoredIds(memory).stored(ids) if ids else _with_metadata(memory, where))
        segments = without(change, removed)
        left = (Segment(path, change.manifest, record).entry_count for record in segments)
        if not any(left):
            raise CorpusError(
                f"nothing would be left of {path}: delete its folder instead, or leave a document"
            )
        change.publish(segments=segments, documents_of=change.number)
    return (memory.segments[s].documents[number] for s, number in removed)


def _with_metadata(memory: Snapshot, where: Mapping[str, Any]) -> list[Stored]:
    removed = []
    for number, segment in enumerate(memory.segments):
        for stored in segment.numbers.tolist():
            if fits(segment.documents[stored].metadata, where):
                removed.append(Stored(number, stored))
    if not removed:
        wanted = ", ".join(f"{key}={value}" for key, value in where.items())
        raise CorpusError(f"{memory.path} has no document with {wanted}: nothing was removed")
    return removed


def fits(metadata: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether metadata has all of these values, as `remove_documents` compares them."""
    return all(key in metadata and _is(metadata[key], where[key]) for key in where)


def _is(value: Any, wanted: Any) -> bool:
    """Whether metadata has a value, or the text by which the command line names it."""
    if value == wanted and isinstance(value, bool) == isinstance(wanted, bool):
        return True
    return (
        isinstance(wanted, str)
        and not isinstance(value, str)
        and wanted == json.dumps(value, ensure_ascii=False)
    )


def without(change: Change, removed: Iterable[Stored]) -> list[SegmentRecord]:
    """The segments, of which those that hold removed documents say so."""
    records = list(change.manifest.segments)
    own: dict[int, list[int]] = {}
    for segment, number in removed:
        own.setdefault(segment, []).append(number)
    for segment, numbers in own.items():
        record, before = records[segment], change.segments[segment].removed
        every = np.sort(np.concatenate([before, numbers])).astype(np.int64)
        file = change.files(record.name).write(LAYOUT["removed"], every)
        records[segment] = record.with_files({"removed": file}, removed=len(every))
    return records
