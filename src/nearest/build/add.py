"""Add documents to a memory, or replace some, as one new snapshot."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from nearest.build.corpus_segments import write_added
from nearest.build.keys import EncodedKeys
from nearest.build.machine import machine_of
from nearest.build.match import check_tokenizer, matching_key_layer, refuse_attached, rules_of
from nearest.build.remove import without
from nearest.corpus.documents import Document
from nearest.corpus.incoming import Documents, in_batches, incoming_documents
from nearest.corpus.tokens import tokenise
from nearest.encode.encoder import Encoder
from nearest.encode.layers import LanguageModel
from nearest.errors import CorpusError, SettingError
from nearest.index.choice import EXACT, EXACT_BELOW
from nearest.progress import Progress, no_progress
from nearest.store.change import Change, changing
from nearest.store.manifest import SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.new_segment import SegmentPlan, merge_segments, tokens_a_segment
from nearest.store.parts.index import IndexChoice
from nearest.store.segment import Segment
from nearest.store.snapshot import Snapshot
from nearest.store.stored_ids import StoredIds

_SEGMENTS_OF_A_SIZE = 4


IfExists = Literal["error", "skip", "replace"]


@dataclass(frozen=True)
class AddOptions:
    """How documents are added; what keys are and how they are searched is the memory's own."""

    batch_size: int | None = None  # windows a forward pass; chosen by the vocabulary when None
    force: bool = False  # accept another model than the one that built the memory
    progress: Progress = no_progress


def add_documents(
    path: Path,
    documents: Documents,
    model: LanguageModel | None,
    tokenizer: Any,
    options: AddOptions,
    *,
    replace: bool = False,
    if_exists: IfExists = "error",
) -> None:
    """Write documents as new segments, with everything that the others have.

    With `replace`, each takes the place of the document with its id, which must be there.
    Otherwise `if_exists` says what becomes of a document whose id is there.

    Raises:
        NearestError: model, documents or folder cannot be used, or an id is there already (or, to
            replace, is not); the memory stays as it was.
    """
    if if_exists not in get_args(IfExists):
        raise SettingError(
            f"if_exists {if_exists!r} is unknown: choose of {', '.join(get_args(IfExists))}"
        )
    with changing(path) as change:
        encoder = encoder_of(change.snapshot, model, tokenizer, options)
        plan = plan_of_additions(change, encoder, options)
        known, replaced = StoredIds(change.snapshot), list[str]()
        rules = rules_of(change.manifest, model)
        checked = incoming_documents(documents, rules)
        taken = _taken(known, checked, replaced, if_exists, replace=replace)
        first = next(taken, None)
        if first is None:
            if if_exists == "skip" and not replace:
                return  # all are there already
            raise CorpusError("there are no documents to add: give at least one")
        taken = itertools.chain([first], taken)
        added = write_added(change, plan, tokenise(taken, tokenizer, rules))
        segments = [*without(change, known.stored(replaced)), *added]
        segments = merged_tail(change, segments, options.progress)
        change.publish(segments=segments, documents_of=change.number)


def merged_tail(
    change: Change, records: list[SegmentRecord], progress: Progress
) -> list[SegmentRecord]:
    """Segments with the last ones made one where they are many and small."""
    manifest = change.manifest
    opened = [Segment(change.path, manifest, record) for record in records]
    choice, largest = IndexChoice.of(manifest), tokens_a_segment(manifest)
    tail = tail_to_merge([segment.entry_count for segment in opened], largest)
    if manifest.keys is not None and choice.spec != EXACT:
        tail = max(tail, _tail_to_index(opened, largest))
    if not tail:
        return records
    name, files = change.new_segment(records)
    plan = SegmentPlan(
        files,
        name,
        msgspec.structs.replace(manifest, segments=records),
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


def encoder_of(
    memory: Snapshot, model: LanguageModel | None, tokenizer: Any, options: AddOptions
) -> Encoder | None:
    """What made the memory's keys, to make others alike; None where it has none.

    Raises:
        ModelError: model or tokenizer differ from those that built the memory.
        SettingError: there is no model, and keys or sources need one.
    """
    if model is None:
        if memory.manifest.keys is not None or memory.manifest.model.reads_sources:
            raise SettingError(
                f"{memory.path} needs the model {memory.manifest.model.name!r} to read documents: "
                "give it, and not a tokenizer alone"
            )
        if not options.force:
            check_tokenizer(memory, tokenizer)
        return None
    refuse_attached(model)
    layer = matching_key_layer(memory, model, tokenizer, force=options.force)
    keys = memory.manifest.keys
    if keys is None:
        return None
    return Encoder.of(model, layer, keys.window, keys.stride, options.batch_size)


def plan_of_additions(change: Change, encoder: Encoder | None, options: AddOptions) -> SegmentPlan:
    """How segments are written that come to those of a memory."""
    return SegmentPlan(
        NewFiles(change.path),
        "",
        change.manifest,
        IndexChoice.of(change.manifest),
        options.progress,
        None if encoder is None else EncodedKeys(encoder),
        among_others=True,
        made_on=None if encoder is None else machine_of(encoder),
    )


def _taken(
    known: StoredIds,
    documents: Iterable[Document],
    replaced: list[str],
    if_exists: IfExists,
    *,
    replace: bool,
) -> Iterator[Document]:
    """The documents that are to be written, noting the ids of those that they replace.

    To replace documents that must be there, only hashes are compared: who looks the noted ids up
    finds out whether one is not.
    """
    for some in in_batches(documents):
        hashed = [document.id for document in some if known.has_hash_of(document.id)]
        found = set(hashed)
        if not replace:
            places = zip(hashed, known.find(hashed), strict=True)
            found = {document_id for document_id, place in places if place is not None}
        for document in some:
            there = document.id in found
            if not there and replace:
                raise CorpusError(
                    f"document id {document.id!r} in {document.origin} is not in {known.path}: add "
                    "it (`nearest add`), give it the id of the document that it replaces, or let "
                    "`nearest sync` make the memory hold what a folder holds"
                )
            if there and not replace and if_exists == "error":
                raise CorpusError(
                    f"document id {document.id!r} in {document.origin} is in {known.path} already: "
                    "replace or skip it (--if-exists), give this one another id, or let `nearest "
                    "sync` make the memory hold what a folder holds"
                )
            if there and not replace and if_exists == "skip":
                continue
            if there:
                replaced.append(document.id)
            yield document
