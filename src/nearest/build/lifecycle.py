"""Add documents to a memory, replace them, and take them back: each as one new generation."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nearest.build.access_paths import merge_segments
from nearest.build.corpus_segments import write_added
from nearest.build.match import matching_key_layer, refuse_attached, rules_of
from nearest.build.new_segment import SegmentPlan, segment_tokens
from nearest.corpus.documents import Document
from nearest.corpus.incoming import incoming_documents
from nearest.corpus.tokens import tokenise
from nearest.corpus.unique import id_hash
from nearest.encode.encoder import Encoder
from nearest.encode.layers import LanguageModel
from nearest.errors import CorpusError, SettingError
from nearest.index.choice import EXACT, EXACT_BELOW
from nearest.memory import Memory
from nearest.progress import Progress, no_progress
from nearest.store.array_files import write_array
from nearest.store.change import changing, free_segment_name, of_generation
from nearest.store.manifest import Manifest, SegmentRecord, publish_next
from nearest.store.parts.index import IndexChoice
from nearest.store.segment import OFFSET_DTYPE, Segment

_SEGMENTS_OF_A_SIZE = 4

Removed = dict[int, list[int]]  # segment → stored numbers of documents


@dataclass(frozen=True)
class AddOptions:
    """How documents are added; what keys are and how they are searched is the memory's own."""

    batch_size: int | None = None  # windows a forward pass; chosen by the vocabulary when None
    force: bool = False  # accept another model than the one that built the memory
    progress: Progress = no_progress


def add_documents(
    path: Path,
    documents: Iterable[Document | str],
    model: LanguageModel,
    tokenizer: Any,
    options: AddOptions,
    *,
    replace: bool = False,
) -> None:
    """Write documents as new segments, with everything that the others have.

    With `replace`, each takes the place of the document with its id.

    Raises:
        NearestError: model, documents or folder cannot be used, or an id is there already (or, to
            replace, is not); the memory stays as it was.
    """
    with changing(path) as manifest:
        memory = Memory.open(path)
        plan = SegmentPlan(
            path,
            manifest,
            "",
            IndexChoice.of(manifest),
            options.progress,
            _encoder(memory, model, tokenizer, options),
            among_others=True,
        )
        replaced: Removed = {}
        rules = rules_of(manifest, model)
        checked = incoming_documents(documents, rules)
        checked = _replacing(memory, checked, replaced) if replace else _new(memory, checked)
        added = write_added(plan, tokenise(checked, tokenizer, rules))
        segments = [*_without(path, manifest, memory.segments, replaced), *added]
        segments = _with_tail_merged(path, manifest, segments, options.progress)
        _publish(path, manifest, segments)


def _publish(path: Path, manifest: Manifest, segments: list[SegmentRecord]) -> None:
    publish_next(path, manifest, segments=segments, documents_of=manifest.generation + 1)


def _with_tail_merged(
    path: Path, manifest: Manifest, records: list[SegmentRecord], progress: Progress
) -> list[SegmentRecord]:
    """Segments with the last ones made one where they are many and small."""
    opened = [Segment(path, manifest, record) for record in records]
    choice = IndexChoice.of(manifest)
    largest = segment_tokens(manifest.keys)
    tail = tail_to_merge([segment.entry_count for segment in opened], largest)
    if manifest.keys is not None and choice.spec != EXACT:
        tail = max(tail, _tail_to_index(opened, largest))
    if not tail:
        return records
    plan = SegmentPlan(
        path,
        msgspec.structs.replace(manifest, segments=records),
        free_segment_name(path, manifest),
        choice,
        progress,
        merged=opened[-tail:],
        among_others=True,
    )
    return [*records[:-tail], merge_segments(plan)]


def _tail_to_index(segments: Sequence[Segment], largest: int) -> int:
    """How many of the last segments are scanned, where an index over all of them is worth it."""
    scanned = list(itertools.takewhile(lambda s: not s.has_index, reversed(segments)))
    while sum(segment.entry_count for segment in scanned) > largest:
        scanned.pop()
    many = sum(segment.searched_count for segment in scanned) >= EXACT_BELOW
    return len(scanned) if many and len(scanned) > 1 else 0


def tail_to_merge(sizes: Sequence[int], largest: int) -> int:
    """How many of the last segments are to be made one: four of a size, or 0.

    Sizes are told apart as powers of four, so that there are at most three segments of each and an
    entry is copied as often as the memory's size has grown fourfold. None of more than `largest`
    entries is made.
    """
    left, tail = list(sizes), 0
    while True:
        count = 1
        while count < len(left) and _power(left[-1 - count]) <= _power(left[-1]):
            count += 1
        if count < _SEGMENTS_OF_A_SIZE or sum(left[-count:]) > largest:
            return tail
        tail = len(sizes) - len(left) + count
        left[-count:] = [sum(left[-count:])]


def _power(size: int) -> int:
    return (size.bit_length() - 1) // 2  # of four


def _encoder(
    memory: Memory, model: LanguageModel, tokenizer: Any, options: AddOptions
) -> Encoder | None:
    """What made the memory's keys, to make others alike; None where it has none."""
    refuse_attached(model)
    layer = matching_key_layer(memory, model, tokenizer, force=options.force)
    keys = memory.manifest.keys
    if keys is None:
        return None
    return Encoder.of(model, layer, keys.window, keys.stride, options.batch_size)


def _new(memory: Memory, documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents through, refusing one whose id the memory has."""
    known = np.sort(np.concatenate([segment.id_hashes for segment in memory.segments]))
    for document in documents:
        wanted = id_hash(document.id)
        at = int(np.searchsorted(known, wanted))
        if at < len(known) and known[at] == wanted and _find(memory, document.id) is not None:
            raise CorpusError(
                f"document id {document.id!r} in {document.origin} is in {memory.path} already: "
                "replace that document (`nearest update`), or give this one another id"
            )
        yield document


def _replacing(
    memory: Memory, documents: Iterable[Document], replaced: Removed
) -> Iterator[Document]:
    """Pass documents through, noting which stored ones they replace."""
    for document in documents:
        found = _find(memory, document.id)
        if found is None:
            raise CorpusError(
                f"document id {document.id!r} in {document.origin} is not in {memory.path}: add it "
                "(`nearest add`), or give it the id of the document that it replaces"
            )
        replaced.setdefault(found[0], []).append(found[1])
        yield document


def _find(memory: Memory, document_id: str) -> tuple[int, int] | None:
    """Number of the segment, and stored number in it, of the document with this id."""
    for number, segment in enumerate(memory.segments):
        found = segment.find(document_id)
        if found is not None:
            return number, found
    return None


def remove_documents(path: Path, ids: Iterable[str], where: Mapping[str, str]) -> list[Document]:
    """Take documents back: those with these ids, or with all of this metadata.

    A value of metadata that is not text is compared as JSON.

    Returns:
        What was removed.

    Raises:
        CorpusError: an id is not there, no document fits, or none would be left.
        SettingError: neither ids nor metadata are given, or both.
    """
    ids = list(dict.fromkeys(ids))
    if bool(ids) == bool(where):
        raise SettingError("say which documents: either by id (--doc) or by metadata (--where)")
    with changing(path) as manifest:
        memory = Memory.open(path)
        removed = _with_ids(memory, ids) if ids else _with_metadata(memory, where)
        documents = [
            memory.segments[segment].stored_documents[number]
            for segment, numbers in removed.items()
            for number in numbers
        ]
        segments = _without(path, manifest, memory.segments, removed)
        if not any(Segment(path, manifest, record).entry_count for record in segments):
            raise CorpusError(
                f"nothing would be left of {path}: delete its folder instead, or leave a document"
            )
        _publish(path, manifest, segments)
    return documents


def _with_ids(memory: Memory, ids: Iterable[str]) -> Removed:
    removed: Removed = {}
    for document_id in ids:
        found = _find(memory, document_id)
        if found is None:
            raise CorpusError(
                f"{memory.path} has no document with the id {document_id!r}: nothing was removed"
            )
        removed.setdefault(found[0], []).append(found[1])
    return removed


def _with_metadata(memory: Memory, where: Mapping[str, str]) -> Removed:
    removed: Removed = {}
    for number, segment in enumerate(memory.segments):
        for stored in segment.numbers.tolist():
            metadata = segment.stored_documents[stored].metadata
            if all(key in metadata and _is(metadata[key], where[key]) for key in where):
                removed.setdefault(number, []).append(stored)
    if not removed:
        wanted = ", ".join(f"{key}={value}" for key, value in where.items())
        raise CorpusError(f"{memory.path} has no document with {wanted}: nothing was removed")
    return removed


def _is(value: Any, wanted: str) -> bool:
    return wanted == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _without(
    path: Path, manifest: Manifest, segments: list[Segment], removed: Removed
) -> list[SegmentRecord]:
    """Segments that say of more documents that they were removed."""
    records = list(manifest.segments)
    name = of_generation(manifest.generation + 1, "removed.npy")
    for number, documents in removed.items():
        record, before = records[number], segments[number].removed
        numbers = np.sort(np.concatenate([before, documents])).astype(OFFSET_DTYPE)
        file = write_array(path, f"segments/{record.name}/{name}", numbers)
        records[number] = record.with_files({"removed": file}, removed=len(numbers))
    return records
