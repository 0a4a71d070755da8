"""Read a whole memory and find everything in it that is not as the manifest says."""

from pathlib import Path

import numpy as np

from nearest.build.access_paths import access_path_problems
from nearest.corpus.unique import id_hash
from nearest.errors import FolderError
from nearest.folder import sha256_of
from nearest.progress import Progress, no_progress
from nearest.store.manifest import Manifest, read_manifest
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
    ids: set[str] = set()
    for record in manifest.segments:
        segment = Segment(path, manifest, record)
        try:
            found = _corpus_problems(segment, manifest, ids) or access_path_problems(segment)
        except FolderError as error:
            found = [str(error)]
        problems += [f"segment {record.name}: {text}" for text in found]
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


def _corpus_problems(segment: Segment, manifest: Manifest, ids: set[str]) -> list[str]:
    """Violations of what every segment promises; `ids` are those of the documents before."""
    problems = []
    if (segment.tokens[segment.offsets[:-1]] != manifest.model.start_token).any():
        problems.append("a document does not begin with the start token")
    _ = segment.stored_sources  # looks at them
    for number in segment.numbers.tolist():
        document_id = segment.stored_documents[number].id
        if document_id in ids:
            problems.append("a document id stands twice")
        if segment.id_hashes[number] != id_hash(document_id):
            problems.append("a document cannot be found by its id")
        ids.add(document_id)
    return list(dict.fromkeys(problems))
