"""What every record of the manifest is made of, and the records of files and of chunks."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from nearest.folder import sha256_of

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
VectorDtype = Literal["float16", "float32"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable, and strict when read: an unknown or missing field is an error."""


class FileRecord(Record, frozen=True):
    """A file below the memory folder, with what it must be."""

    path: str
    size: Count
    sha256: Digest

    @classmethod
    def of(cls, folder: Path, path: str, written: Path | None = None) -> "FileRecord":
        """Describe a file that is completely written, be it still at another place."""
        file = folder / path if written is None else written
        return cls(path, file.stat().st_size, sha256_of(file))


class MachineRecord(Record, frozen=True):
    """On what the keys of a segment were computed; keys of unlike machines differ by rounding.

    `device`: "cpu", or a GPU's name; `torch`: its version; `threads`: of each operation; `simd`:
    the CPU's instructions that torch uses; `batch_size`: windows a forward pass.
    """

    device: str
    torch: str
    threads: Positive
    simd: str
    batch_size: Positive


class EmbedderRecord(Record, frozen=True):
    """Which embedder made the chunks' vectors (`retro.data.embedders.EmbedderIdentity`)."""

    name: str
    weights: str
    pooling: str
    prefix: str
    normalised: bool
    dim: Positive


class ChunkIndexRecord(Record, frozen=True):
    """How a segment's chunks are searched: "exact", or by lists; `recall` is recall@4, measured."""

    spec: str
    nprobe: Positive | None
    recall: float


class ChunkIndexAsked(Record, frozen=True):
    """The index that was asked for, and the recall@4 that it is searched to."""

    spec: str
    recall: float


class ChunksRecord(Record, frozen=True, omit_defaults=True):
    """How documents are cut into chunks, what embeds these, and how they are indexed.

    `start` and `end`: token ids that are read at each document's begin and end, and not stored.
    `embedder`: None before the first vector; `index`: None before `nearest retro index`.
    """

    size: Annotated[int, msgspec.Meta(ge=2)]
    start: Count | None = None
    end: Count | None = None
    embedder: EmbedderRecord | None = None
    dtype: VectorDtype = "float16"
    index: ChunkIndexAsked | None = None
