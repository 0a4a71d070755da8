"""Read a whole memory and find everything in it that is not as the manifest says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nearest.errors import FolderError
from nearest.folder import sha256_of
from nearest.progress import Progress, no_progress
from nearest.store.manifest import Manifest, read_manifest
from nearest.store.parts import PARTS, corpus
from nearest.store.parts.keys import open_projection
from nearest.store.segment import Segment


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
    projection = open_projection(path, manifest.keys)
    if projection is not None and not np.isfinite(projection.matrix).all():
        problems.append("the projection is not finite")
    segments = [Segment(path, manifest, record) for record in manifest.segments]
    checks = (1 + len(PARTS)) * len(segments)
    for number, segment in enumerate(segments):
        done = (1 + len(PARTS)) * number
        progress("parts", done, checks)
        try:
            found = corpus.check(segment, manifest)
            if not found:
                for part in PARTS:
                    done += 1
                    progress("parts", done, checks)
                    found += part.check(segment)
            found = found or _served_removed(segment)
        except FolderError as error:
            found = [str(error)]
        problems += [f"segment {segment.record.name}: {text}" for text in found]
    progress("parts", checks, checks)
    return problems or _repeated_ids(segments)


def _checksum_problems(path: Path, manifest: Manifest, progress: Progress) -> list[str]:
    records = manifest.file_records()
    total = sum(record.size for record in records)
    done = 0
    problems = []
    for record in records:
        progress("checksums", done, total)
        try:
            if sha256_of(path / record.path) != record.sha256:
                problems.append(f"{record.path} differs from its checksum")
        except OSError as error:
            problems.append(f"{record.path} cannot be read ({error.strerror})")
        done += record.size
    progress("checksums", total, total)
    return problems


def _served_removed(segment: Segment) -> list[str]:
    """Which parts lead a reader to a document that was removed."""
    removed = segment.removed_entries()
    if not len(removed):
        return []
    return [
        f"the {part.name} leads to a document that was removed"
        for part in PARTS
        if np.isin(part.served(segment), removed).any()
    ]


def _repeated_ids(segments: Sequence[Segment]) -> list[str]:
    """Whether two documents share an id; documents are read only where their hashes are equal."""
    hashes = np.concatenate([segment.id_hashes[segment.numbers] for segment in segments])
    unique, counts = np.unique(hashes, return_counts=True)
    shared = unique[counts > 1]
    if not len(shared):
        return []
    ids: set[str] = set()
    for segment in segments:
        own = segment.numbers[np.isin(segment.id_hashes[segment.numbers], shared)]
        for number in own.tolist():
            document_id = segment.documents[number].id
            if document_id in ids:
                return [f"segment {segment.record.name}: a document id stands twice"]
            ids.add(document_id)
    return []
