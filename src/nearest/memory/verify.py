"""Read a whole memory and find everything in it that is not as the manifest says."""

from pathlib import Path

import numpy as np

from nearest.errors import FolderError
from nearest.folder import sha256_of
from nearest.memory.key_files import open_projection
from nearest.memory.manifest import Manifest, read_manifest
from nearest.memory.memory import Memory
from nearest.memory.segment import Segment
from nearest.progress import Progress, no_progress


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
    memory = Memory(path, manifest, [Segment(path, manifest, r) for r in manifest.segments])
    for segment in memory.segments:
        found = _structure(segment, manifest)
        problems += [f"segment {segment.record.name}: {text}" for text in found]
    return problems or _cluster_problems(memory)


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
    if int(segment.tokens.max()) >= manifest.model.vocab_size:
        problems.append("a token lies outside the vocabulary")
    if (segment.tokens[offsets[:-1]] != manifest.model.start_token).any():
        problems.append("a document does not begin with the start token")
    problems += _suffix_problems(segment)
    if manifest.keys is not None:
        problems += segment.keys.problems() + _merge_problems(segment)
    try:
        ids = [segment.documents[number].id for number in range(record.documents)]
        if len(set(ids)) != len(ids):
            problems.append("a document id stands twice")
        if manifest.keys is not None:
            _ = segment.index
    except FolderError as error:
        problems.append(str(error))
    return problems


def _merge_problems(segment: Segment) -> list[str]:
    """Whether each kept entry has a key of its own, and counts those that share it."""
    if segment.weights is None or segment.rows is None:
        return []
    entries, kept = segment.entries, segment.searched
    rows = segment.rows[entries]
    sound = (
        len(kept) == segment.record.kept
        and np.array_equal(segment.rows[kept], np.arange(len(kept)))
        and ((rows >= 0) & (rows < len(kept))).all()
        and np.array_equal(np.bincount(rows, minlength=len(kept)), segment.weights[kept])
    )
    return [] if sound else ["the weights of merged entries do not count those that share a key"]


def _suffix_problems(segment: Segment) -> list[str]:
    """Whether the suffix array holds every entry once, and in order.

    Of two neighbours in it, the first has the lower token; or the tokens are equal, and the entry
    before the first stands before the one before the second. The order of documents' starts says
    nothing.
    """
    suffixes, tokens = segment.suffixes, segment.tokens
    if not np.array_equal(np.sort(suffixes), segment.entries):
        return ["the suffix array does not hold every entry once"]
    rank = np.full(len(tokens), -1)
    rank[suffixes] = np.arange(len(suffixes))
    first, second = suffixes[:-1], suffixes[1:]
    starts = np.zeros(len(tokens), dtype=bool)
    starts[segment.offsets[:-1]] = True
    rising = starts[first] | starts[second] | (rank[first - 1] < rank[second - 1])
    equal = tokens[first] == tokens[second]
    if not np.where(equal, rising, tokens[first] < tokens[second]).all():
        return ["the suffix array is not in order"]
    return []


def _cluster_problems(memory: Memory) -> list[str]:
    try:
        clusters = memory.clusters
    except FolderError as error:
        return [str(error)]
    if clusters is None:
        return []
    return clusters.problems(memory.valued_entries())
