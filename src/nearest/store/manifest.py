"""The manifest: the one file that says which others live, and what they are."""

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from nearest.errors import FolderError
from nearest.folder import refuse_address, write_atomically
from nearest.index.product import product_parts
from nearest.store.records import (
    ChunkIndexRecord,
    ChunksRecord,
    Count,
    Digest,
    FileRecord,
    MachineRecord,
    Positive,
    Record,
)
from nearest.store.shard import Shard

FORMAT = 5
MANIFEST = "manifest.json"
FETCHED = "fetched-from"  # says where a memory in the cache is from
_UNSIGNED = "0" * 64

Base64 = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9+/]+=*$", max_length=1 << 14)]
ComputedIn = Literal["float64", "float32", "bfloat16", "float16"]


class FunctionRecord(Record, frozen=True):
    """What the model makes of a fixed probe text (`encode.fingerprint.Probe`)."""

    structure: Digest
    dtype: ComputedIn
    quantisation: str | None
    vocab_size: Positive
    tokens: Annotated[int, msgspec.Meta(ge=1, le=1_024)]
    sensitivity: Annotated[float, msgspec.Meta(ge=0)]
    settings: dict[str, Any]
    states: Base64
    logits: Base64

    def __post_init__(self) -> None:
        if len(self.states) % 4 or len(self.states) != len(self.logits):
            raise ValueError("the states and logits of the probe are not of one shape")


class ModelRecord(Record, frozen=True, omit_defaults=True):
    """Which model and tokenizer made the keys and the tokens.

    `fingerprint` is a hash of the model's weights; None where a tokenizer alone made the memory,
    whose `name` is then the tokenizer's. `function` is what the model computes, which decides where
    weights differ; None without keys, and in memories of before. `source_vocab_size`: number
    of token ids that the encoder of an encoder–decoder reads; None for a causal model, which has
    none. `special_tokens`: whether documents that mention special tokens hold them.
    """

    name: str
    fingerprint: Digest | None
    tokenizer_fingerprint: Digest
    vocab_size: Positive
    start_token: Count
    source_vocab_size: Positive | None = None
    function: FunctionRecord | None = None
    special_tokens: bool = False

    @property
    def reads_sources(self) -> bool:
        """Whether it is an encoder–decoder, and its documents have sources."""
        return self.source_vocab_size is not None

    @property
    def tokenizer_only(self) -> bool:
        """Whether no language model made the memory."""
        return self.fingerprint is None


class ProjectionRecord(Record, frozen=True):
    """The map that keys and queries go through, to so many dimensions."""

    dim: Positive
    file: FileRecord


class KeysRecord(Record, frozen=True):
    """What the keys are, how they are stored, and how documents were windowed to make them.

    `dim` is that of the model's states; `codebooks` are the centroids of product-quantised keys;
    `index` is what was asked for (a FAISS factory string, "exact" or "auto"); `dtype` is what the
    model computed in, where it is known: keys are compared in float32 whatever it was.
    """

    layer: str
    module: str
    dim: Positive
    format: Annotated[str, msgspec.Meta(pattern="^(fp16|int8|pq[1-9][0-9]{0,4})$")]
    metric: Literal["l2", "ip"]
    window: Positive
    stride: Positive
    projection: ProjectionRecord | None
    codebooks: FileRecord | None
    index: str
    dtype: ComputedIn | None = None

    def __post_init__(self) -> None:
        parts = product_parts(self.format)
        if (parts is None) != (self.codebooks is None):
            raise ValueError("product-quantised keys without codebooks, or codebooks without them")
        if parts is not None and self.stored_dim % parts:
            raise ValueError(f"keys of {self.stored_dim} dims in {parts} parts")

    @property
    def stored_dim(self) -> int:
        """Dimension of what is stored, after the projection."""
        return self.dim if self.projection is None else self.projection.dim

    def file_records(self) -> list[FileRecord]:
        """Every live file of all keys."""
        projection = None if self.projection is None else self.projection.file
        return [file for file in (self.codebooks, projection) if file is not None]


class IndexRecord(Record, frozen=True):
    """How the segment's keys are searched; `file` is None when they are scanned exactly.

    `entries`: how many it holds, those that were removed since included. `recall`: measured
    recall@1024 after re-ranking by the keys, with `margin` entries more fetched. `filled_from`: the
    checksum of the trained index without entries from which it was filled; those filled from one
    are searched as one. `trained`: that index, where it is kept for segments to come.
    """

    spec: str
    file: FileRecord | None
    trained: FileRecord | None
    filled_from: Digest | None
    entries: Count
    nprobe: Positive | None
    margin: Count
    recall: float | None
    recall_target: float

    def file_records(self) -> list[FileRecord]:
        """Its live files."""
        return [file for file in (self.file, self.trained) if file is not None]


class SegmentRecord(Record, frozen=True, omit_defaults=True):
    """One part of the corpus with its access paths.

    `kept`: how many keys there are, where entries have been merged and share them; None where none
    have. `members`: how many entries are in a cluster; None where the memory has no clusters.
    `removed`: how many documents have been taken back; they still stand in the files until
    `nearest compact`. `source_tokens`: of what the encoder read for all documents; None where the
    model has no encoder. `chunk_rows`: how many vectors of chunks there are; `chunk_index`: how
    they are searched. None before they are made. `made_on`: what computed the keys of text that
    was new; None for those that were copied, and in memories of before.
    """

    name: Annotated[str, msgspec.Meta(pattern="^[0-9]{6}$")]
    tokens: Positive
    documents: Positive
    entries: Positive
    frames: Positive
    files: dict[str, FileRecord]
    index: IndexRecord | None
    kept: Count | None
    members: Count | None
    removed: Count
    source_tokens: Positive | None = None
    chunk_rows: Count | None = None
    chunk_index: ChunkIndexRecord | None = None
    made_on: MachineRecord | None = None

    def with_files(self, files: Mapping[str, FileRecord], **changes: Any) -> "SegmentRecord":
        """The segment with more files, and with other fields."""
        return msgspec.structs.replace(self, files={**self.files, **files}, **changes)

    def file_records(self) -> list[FileRecord]:
        """Its live files."""
        own = [] if self.index is None else self.index.file_records()
        return [*self.files.values(), *own]

    def __post_init__(self) -> None:
        if self.removed > self.documents:
            raise ValueError("more documents are removed than there are")


class ClustersRecord(Record, frozen=True):
    """How many clusters there are, and how they were found."""

    made_by: Literal["k-means", "greedy merge"]
    clusters: Count


class GateRecord(Record, frozen=True):
    """A gate that was trained for a method: its kind, what describes it, and its arrays."""

    kind: str
    config: dict[str, Any]
    file: FileRecord


class Manifest(Record, frozen=True, omit_defaults=True):
    """A snapshot of a memory.

    `documents_of`: the snapshot in which documents were last added or removed; `tuned_at`: that
    in which each method's settings were found; `keys_of`: that in which keys or indexes were last
    rewritten for all entries; `chunks`: of RETRO, where there are; `version` is the number of the
    snapshot ("generation" in the file); `segment_tokens`: after how many tokens another segment
    begins, where that was asked for.
    """

    format: Positive
    version: Positive = msgspec.field(name="generation")
    created_by: str
    model: ModelRecord
    keys: KeysRecord | None
    segments: Annotated[list[SegmentRecord], msgspec.Meta(min_length=1)]
    clusters: ClustersRecord | None
    settings: dict[str, dict[str, Any]]
    gates: dict[str, GateRecord]
    documents_of: Positive
    tuned_at: dict[str, Positive]
    keys_of: Positive = 1
    chunks: ChunksRecord | None = None
    segment_tokens: Positive | None = None
    checksum: Digest = ""  # of the file, with zeros in this place

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        if len(set(names)) != len(names):
            raise ValueError("a segment is listed twice")
        if any((segment.index is None) != (self.keys is None) for segment in self.segments):
            raise ValueError("a segment has keys without index, or an index without keys")
        if any((s.members is None) != (self.clusters is None) for s in self.segments):
            raise ValueError("a segment has no clusters where others have, or has them alone")
        if self.keys is not None and self.model.tokenizer_only:
            raise ValueError("there are keys, and no model that made them")
        none = self.model.source_vocab_size is None
        if any((segment.source_tokens is None) != none for segment in self.segments):
            raise ValueError("a segment has no sources and its model reads them, or the reverse")

    def segments_of(self, shard: Shard | None) -> range:
        """The numbers of a shard's segments; of all, without one."""
        tokens = [segment.tokens for segment in self.segments]
        return range(len(tokens)) if shard is None else shard.segments(tokens)

    def file_records(self, shard: Shard | None = None) -> list[FileRecord]:
        """Every live file, or those that one shard needs."""
        segments = [self.segments[number] for number in self.segments_of(shard)]
        records = [file for segment in segments for file in segment.file_records()]
        records += self.keys.file_records() if self.keys else []
        records += [gate.file for gate in self.gates.values()]
        return records


def _hub_blobs(folder: Path) -> Path | None:
    """Where the Hugging Face hub's client keeps the files that a snapshot's links lead to.

    That is the folder `blobs` beside `snapshots`, which holds the snapshot, or beside the snapshot
    itself; None where there is none.
    """
    real = folder.resolve()
    above = [parent.parent for parent in real.parents if parent.name == "snapshots"]
    places = [place / "blobs" for place in (*above[:1], real.parent)]
    return next((place for place in places if place.is_dir()), None)


def in_cache(folder: Path) -> bool:
    """Whether a memory's files are shared with others: links into the hub's cache, or into ours."""
    if (folder / FETCHED).exists():
        return True
    return (folder / MANIFEST).is_symlink() and _in_hub_cache(folder, folder / MANIFEST)


def _in_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a file of a snapshot in the hub's cache leads to the repository's own files."""
    blobs, real = _hub_blobs(folder), folder.resolve()
    inside = path.parent.resolve() == real / path.parent.relative_to(folder)
    return blobs is not None and inside and path.resolve().parent == blobs


class _FormatOnly(msgspec.Struct):
    format: int


def read_manifest(folder: Path, shard: Shard | None = None) -> Manifest:
    """Read and check the manifest of a memory folder, and that the files of a shard, or all, exist.

    Raises:
        FolderError: there is none, it is of another format, or it is not a valid manifest.
    """
    while True:
        data = _read(folder)
        manifest = decode_manifest(folder, data)
        try:
            for record in manifest.file_records(shard):
                check_file(folder, record)
        except FolderError:
            if _read(folder) == data:
                raise
            continue  # a writer has published meanwhile, and removed the files of before
        return manifest


def _read(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        if path.is_symlink() and not _in_hub_cache(folder, path):
            raise FolderError(f"{path} is a link: put the manifest itself there, or do not use it")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.exists():
            refuse_address(folder)
            raise FolderError(
                f"{folder} does not exist: check the path, or build it (`nearest build`)"
            ) from error
        raise FolderError(
            f"{folder} is not a memory (it has no {MANIFEST}; an interrupted build leaves none): "
            "build it with `nearest build`"
        ) from error
    except OSError as error:
        raise FolderError(f"{path} cannot be read ({error.strerror}): check it") from error


def decode_manifest(folder: Path, data: bytes) -> Manifest:
    """A manifest from its bytes (FolderError, which names the folder, where it is none)."""
    try:
        found = msgspec.json.decode(data, type=_FormatOnly).format
        if found > FORMAT:
            raise FolderError(
                f"{folder} has format {found}, this version reads up to {FORMAT}: use a newer one"
            )
        if found < FORMAT:
            raise FolderError(
                f"{folder} has format {found}, which this version does not read any more (it reads "
                f"{FORMAT}): build the memory anew"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FolderError(
            f"{folder / MANIFEST} is not a valid manifest ({error}): restore it from a copy, "
            "or rebuild"
        ) from error
    if _checksum(data, manifest.checksum) != manifest.checksum:
        raise FolderError(
            f"{folder / MANIFEST} is damaged (it differs from its own checksum): restore it from a "
            "copy, or rebuild"
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a snapshot: before the rename the old one stands, after it the new one."""
    unsigned = msgspec.structs.replace(manifest, checksum=_UNSIGNED)
    data = msgspec.json.format(msgspec.json.encode(unsigned), indent=1) + b"\n"
    checksum = _checksum(data, _UNSIGNED)
    write_atomically(folder / MANIFEST, data.replace(_UNSIGNED.encode(), checksum.encode()))


def _checksum(data: bytes, checksum: str) -> str:
    """Hex SHA-256 of a manifest's bytes with zeros in the place of its checksum."""
    return hashlib.sha256(data.replace(checksum.encode(), _UNSIGNED.encode())).hexdigest()


def check_place(folder: Path, record: FileRecord) -> PurePosixPath:
    """Refuse a path that leaves the folder, else return it."""
    relative = PurePosixPath(record.path)
    if relative.is_absolute() or ".." in relative.parts:
        raise FolderError(
            f"the manifest of {folder} names {record.path!r}, outside the folder: do not use it"
        )
    return relative


def check_file(folder: Path, record: FileRecord) -> None:
    """Refuse a path that leaves the folder, and a file that is missing or of another size."""
    relative = check_place(folder, record)
    path = folder / relative
    try:
        linked = path.resolve() != folder.resolve() / relative and not _in_hub_cache(folder, path)
        status = path.stat()
    except (OSError, ValueError):
        raise FolderError(f"{path} is missing: restore it from a copy, or rebuild") from None
    if linked or not stat.S_ISREG(status.st_mode):
        raise FolderError(
            f"{path} is missing (links count as such): restore it from a copy, or rebuild"
        )
    if status.st_size != record.size:
        raise FolderError(
            f"{path} has {status.st_size:,} bytes, the manifest says {record.size:,}: "
            "restore it from a copy, or rebuild"
        )
