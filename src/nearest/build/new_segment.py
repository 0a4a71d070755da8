"""A segment that is being written: first its corpus, then everything that is derived from it."""

from array import array
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Integer

from nearest.corpus.tokens import TokenisedDocument, token_dtype
from nearest.corpus.unique import id_hash
from nearest.encode.encoder import Encoder
from nearest.errors import CorpusError
from nearest.folder import ArrayFile, open_array
from nearest.index.approximate import check_spec
from nearest.index.choice import AUTO, bytes_an_entry
from nearest.progress import Progress
from nearest.store.array_files import write_array
from nearest.store.documents import DocumentWriter
from nearest.store.journal import Journal
from nearest.store.manifest import FileRecord, KeysRecord, Manifest, SegmentRecord
from nearest.store.parts.corpus import SourceWriter, StoredSources, open_sources
from nearest.store.parts.index import IndexChoice
from nearest.store.segment import ID_DTYPE, OFFSET_DTYPE, Segment

# What a segment takes while it is written decides how large one becomes: sorting suffixes takes 11
# bytes a token (16 with large vocabularies), and the codes of its index are filled in memory, in
# lists that take up to twice as much while they grow.
SEGMENT_TOKENS = 1 << 24
_INDEX_BYTES = 5 << 27

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
        given: keys of all entries, in order, that were made elsewhere.
        journal: told what is on the disk, where the work can be gone on with.
    """

    root: Path
    manifest: Manifest
    name: str
    choice: IndexChoice
    progress: Progress
    encoder: Encoder | None = None
    merged: Sequence[Segment] = ()
    among_others: bool = False
    given: Float[np.ndarray, "entries dim"] | None = None
    journal: Journal | None = None

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
        choice: of the index.
        digest: SHA-256 of its documents.
        sources: what the encoder reads for each; None for models without one.
    """

    plan: SegmentPlan
    record: SegmentRecord
    tokens: Integer[np.ndarray, " n"]
    offsets: Int[np.ndarray, " documents_plus_1"]
    choice: IndexChoice
    digest: str
    sources: StoredSources | None

    def opened(self, record: SegmentRecord) -> Segment:
        """Open it as far as `record` describes it."""
        return Segment(self.plan.root, self.plan.manifest, record)

    def write(self, name: str, rows: np.ndarray) -> FileRecord:
        """Write an array into the segment's folder."""
        return write_array(self.plan.root, f"{self.plan.folder}/{name}", rows)


def segment_tokens(keys: KeysRecord | None) -> int:
    """Tokens after which a memory with such keys begins another segment."""
    if keys is None or keys.index != AUTO:
        return SEGMENT_TOKENS
    return min(SEGMENT_TOKENS, _INDEX_BYTES // bytes_an_entry(keys.stored_dim))


def write_corpus(plan: SegmentPlan, documents: Iterable[TokenisedDocument]) -> NewSegment:
    """Write tokens, offsets, documents and their sources.

    Raises:
        CorpusError: there is no document, or no token that follows another.
        SettingError: the index does not fit them.
    """
    root, folder = plan.root, plan.folder
    (root / folder).mkdir(parents=True)
    model = plan.manifest.model
    dtype = token_dtype(model.vocab_size)
    paths = {kind: root / folder / file for kind, file in _FILES.items()}
    lengths, hashes, total = array("q", [0]), array("Q"), 0
    with (
        ArrayFile(paths["tokens"], dtype) as file,
        DocumentWriter(paths["documents"], paths["frames"]) as store,
        nullcontext()
        if model.source_vocab_size is None
        else SourceWriter(root, folder, model.source_vocab_size) as sources,
    ):
        for item in documents:
            file.append(item.tokens.astype(dtype))
            store.append(item.document)
            if sources is not None and item.encoder_tokens is not None:
                sources.append(item.encoder_tokens)
            hashes.append(int(id_hash(item.document.id)))
            lengths.append(len(item.tokens))
            total += len(item.tokens)
            plan.progress("tokens", total, None)
    if not hashes:
        raise CorpusError("the corpus holds no documents: give it at least one")
    offsets = np.cumsum(lengths, dtype=OFFSET_DTYPE)
    entries = total - len(hashes)
    if not entries:
        raise CorpusError("the corpus holds no token that follows another: give it longer text")
    choice = _choice(plan, entries)
    for kind, rows in (("offsets", offsets), ("ids", np.array(hashes, ID_DTYPE))):
        write_array(root, f"{folder}/{_FILES[kind]}", rows)
    record = SegmentRecord(
        name=plan.name,
        tokens=int(offsets[-1]),
        documents=len(hashes),
        entries=entries,
        frames=store.frames,
        files={kind: FileRecord.of(root, f"{folder}/{name}") for kind, name in _FILES.items()},
        index=None,
        kept=None,
        members=None,
        removed=0,
    )
    if sources is not None:
        record = sources.described(record)
    return _new_segment(plan, record, choice, store.digest)


def reopen_corpus(plan: SegmentPlan, record: SegmentRecord, digest: str) -> NewSegment:
    """A segment whose corpus was written before, as far as `record` describes it."""
    return _new_segment(plan, record, _choice(plan, record.entries), digest)


def _new_segment(
    plan: SegmentPlan, record: SegmentRecord, choice: IndexChoice, digest: str
) -> NewSegment:
    """Open the arrays of a corpus that is written."""
    paths = {kind: plan.root / file.path for kind, file in record.files.items()}
    model = plan.manifest.model
    tokens = open_array(paths["tokens"], token_dtype(model.vocab_size), (record.tokens,))
    offsets = open_array(paths["offsets"], OFFSET_DTYPE, (record.documents + 1,))
    sources = open_sources(paths, record, model.source_vocab_size)
    return NewSegment(plan, record, tokens, offsets, choice, digest, sources)


def _choice(plan: SegmentPlan, entries: int) -> IndexChoice:
    """The index of a segment of so many entries (SettingError where it does not fit them)."""
    keys, choice = plan.manifest.keys, plan.choice
    if keys is not None:
        if plan.among_others:
            choice = choice.among_others(keys.stored_dim, entries)
        check_spec(choice.spec, keys.stored_dim, choice.nprobe, entries)
    return choice
