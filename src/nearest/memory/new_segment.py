"""A segment that is being written: first its corpus, then everything that is derived from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from nearest.corpus.tokens import TokenisedDocument, token_dtype
from nearest.encode.encoder import Encoder
from nearest.errors import CorpusError
from nearest.folder import ArrayFile, open_array
from nearest.index.approximate import check_spec
from nearest.memory.array_files import write_array
from nearest.memory.documents import DocumentWriter
from nearest.memory.index_files import IndexChoice
from nearest.memory.manifest import FileRecord, Manifest, SegmentRecord
from nearest.memory.segment import ID_DTYPE, OFFSET_DTYPE, Segment, id_hash, valued_entries
from nearest.progress import Progress

_FILES = {
    "tokens": "tokens.npy",
    "offsets": "offsets.npy",
    "documents": "documents.jsonl.zst",
    "frames": "frames.npy",
    "ids": "ids.npy",
}


@dataclass(frozen=True)
class SegmentPlan:
    """A segment to be written, and from what.

    Attributes:
        root: the memory's folder.
        manifest: what all segments share: the model, the format of keys, clusters.
        name: of the segment.
        choice: of its index.
        progress: told what is done.
        encoder: makes the keys of new text; None where there are none, or they are taken over.
        merged: the segments that this one replaces, in order; empty for new text.
        among_others: whether the memory has other segments beside it.
    """

    root: Path
    manifest: Manifest
    name: str
    choice: IndexChoice
    progress: Progress
    encoder: Encoder | None = None
    merged: Sequence[Segment] = ()
    among_others: bool = False

    @property
    def folder(self) -> str:
        """The segment's place below the memory's folder."""
        return f"segments/{self.name}"


@dataclass(frozen=True)
class NewSegment:
    """A segment whose corpus is written and whose access paths are to come.

    Attributes:
        plan: from what they are to be made.
        record: describes the corpus alone.
        tokens, offsets: as in `Segment`.
        entries: positions that have a value.
        choice: of the index.
    """

    plan: SegmentPlan
    record: SegmentRecord
    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    entries: Int[np.ndarray, " m"]
    choice: IndexChoice

    def opened(self, record: SegmentRecord) -> Segment:
        """Open it as far as `record` describes it."""
        return Segment(self.plan.root, self.plan.manifest, record)

    def write(self, name: str, array: np.ndarray) -> FileRecord:
        """Write an array into the segment's folder."""
        return write_array(self.plan.root, f"{self.plan.folder}/{name}", array)


def write_corpus(plan: SegmentPlan, documents: Iterable[TokenisedDocument]) -> NewSegment:
    """Write tokens, offsets and documents.

    Raises:
        CorpusError: there is no document, or no token that follows another.
        SettingError: the index does not fit them.
    """
    root, folder, keys = plan.root, plan.folder, plan.manifest.keys
    (root / folder).mkdir(parents=True)
    dtype = token_dtype(plan.manifest.model.vocab_size)
    paths = {kind: root / folder / file for kind, file in _FILES.items()}
    lengths, hashes, total = [0], [], 0
    with (
        ArrayFile(paths["tokens"], dtype) as file,
        DocumentWriter(paths["documents"], paths["frames"]) as store,
    ):
        for item in documents:
            file.append(item.tokens.astype(dtype))
            store.append(item.document)
            hashes.append(id_hash(item.document.id))
            lengths.append(len(item.tokens))
            total += len(item.tokens)
            plan.progress("tokens", total, None)
    if not hashes:
        raise CorpusError("the corpus holds no documents: give it at least one")
    offsets = np.cumsum(lengths, dtype=OFFSET_DTYPE)
    entries = valued_entries(offsets)
    if not len(entries):
        raise CorpusError("the corpus holds no token that follows another: give it longer text")
    choice = plan.choice
    if keys is not None:
        if plan.among_others:
            choice = choice.among_others(keys.stored_dim, len(entries))
        check_spec(choice.spec, keys.stored_dim, choice.nprobe, len(entries))
    for kind, array in (("offsets", offsets), ("ids", np.array(hashes, ID_DTYPE))):
        write_array(root, f"{folder}/{_FILES[kind]}", array)
    record = SegmentRecord(
        name=plan.name,
        tokens=int(offsets[-1]),
        documents=len(hashes),
        entries=len(entries),
        frames=store.frames,
        files={kind: FileRecord.of(root, f"{folder}/{name}") for kind, name in _FILES.items()},
        index=None,
        kept=None,
        members=None,
        removed=0,
    )
    tokens = open_array(paths["tokens"], dtype, (record.tokens,))
    return NewSegment(plan, record, tokens, offsets, entries, choice)
