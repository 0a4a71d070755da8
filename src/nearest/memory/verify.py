"""Read a whole memory and find everything in it that is not as the manifest says."""

from pathlib import Path

import numpy as np

from nearest.errors import FolderError
from nearest.folder import sha256_of
from nearest.memory.manifest import Manifest, read_manifest
from nearest.memory.segment import Segment
from nearest.progress import Progress, no_progress

_BLOCK = 65_536


def verify(path: Path, progress: Progress = no_progress) -> list[str]:
    """What is wrong with a memory, one sentence each; empty when it is sound.

    Raises:
        FolderError: it cannot be opened at all.
    """
    while True:
        manifest = read_manifest(path)
        try:
            problems = _problems(path, manifest, progress)
        except (FolderError, FileNotFoundError):
            if read_manifest(path) == manifest:
                raise
            continue
        if not problems or read_manifest(path) == manifest:
            return problems


def _problems(path: Path, manifest: Manifest, progress: Progress) -> list[str]:
    problems = _checksum_problems(path, manifest, progress)
    if problems:
        return problems  # what is damaged cannot be trusted to describe itself
    for record in manifest.segments:
        segment = Segment(path, manifest, record)
        problems += [f"segment {record.name}: {text}" for text in _structure(segment, manifest)]
    return problems


def _checksum_problems(path: Path, manifest: Manifest, progress: Progress) -> list[str]:
    records = manifest.file_records()
    total = sum(record.size for record in records)
    done = 0
    problems = []
    for record in records:
        progress("checksums", done, total)
        if sha256_of(path / record.path) != record.sha256:
            problems.append(f"{record.path} differs from its checksum")
        done += record.size
    progress("checksums", total, total)
    return problems


def _structure(segment: Segment, manifest: Manifest) -> list[str]:
    """Violations of what every segment promises."""
    record, offsets = segment.record, segment.offsets
    if offsets[0] != 0 or offsets[-1] != record.tokens or (np.diff(offsets) < 1).any():
        return ["document offsets do not rise from 0 to the number of tokens"]
    problems = []
    if record.entries != record.tokens - record.documents:
        problems.append("the number of entries is not that of tokens less documents")
    if int(segment.tokens.max()) >= manifest.model.vocab_size:
        problems.append("a token lies outside the vocabulary")
    if (segment.tokens[offsets[:-1]] != manifest.model.start_token).any():
        problems.append("a document does not begin with the start token")
    for start in range(0, record.tokens, _BLOCK):
        if not np.isfinite(segment.keys[start : start + _BLOCK]).all():
            problems.append(f"a key between entries {start} and {start + _BLOCK} is not finite")
    try:
        ids = [segment.documents[number].id for number in range(record.documents)]
        if len(set(ids)) != len(ids):
            problems.append("a document id stands twice")
        _ = segment.index
    except FolderError as error:
        problems.append(str(error))
    return problems
