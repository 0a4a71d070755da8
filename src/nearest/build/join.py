"""One memory of several folders: the parts of a build, or memories that were built alike."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from nearest.build.build import BuildOptions, finish, worker_spec
from nearest.build.machine import check_alike, check_all_alike
from nearest.build.tasks import Unfinished, first_manifest, publish
from nearest.build.workers import reached
from nearest.errors import CorpusError, FolderError, SettingError
from nearest.folder import disk_errors_explained, sha256_of
from nearest.store.change import new_folder
from nearest.store.journal import JOURNAL, TASKS, CorpusRecord, Journal, Stage, read_stage
from nearest.store.manifest import MANIFEST, Manifest, SegmentRecord, check_file, write_manifest
from nearest.store.new_files import make_names_durable
from nearest.store.opening import open_snapshot
from nearest.store.records import FileRecord
from nearest.store.snapshot import Snapshot


def join(paths: Sequence[Path], out: Path, options: BuildOptions) -> None:
    """Make a memory of the parts of a build, or of memories of one model, in a new folder.

    Files are linked where the file system can do that, and else copied. Parts become what one build
    gives, byte for byte. Memories keep their indexes; settings, gates and clusters are of a memory
    and are left out.

    Args:
        paths: all parts of a build in any order, or memories in the order of their documents.
        out: the new folder.
        options: how many workers make the indexes of parts, and whether keys of unlike machines are
            accepted; the rest is what the parts were begun with.

    Raises:
        FolderError: a part is missing, not finished, damaged, or of another build or machine.
        NearestError: memories were not built alike, or the folder cannot be written.
    """
    if not paths:
        raise SettingError("nothing is named that could be joined: name parts or memories")
    # A build that was killed when it had published leaves its journal in a memory that is whole.
    parts = [(path / JOURNAL).exists() and not (path / MANIFEST).exists() for path in paths]
    if not any(parts):
        _join_memories([open_snapshot(path) for path in paths], out, options)
    elif all(parts):
        _join_parts(list(paths), out, options)
    else:
        other = paths[parts.index(False)]
        raise FolderError(f"{other} is no part of a build, and {paths[parts.index(True)]} is one")


def _join_parts(paths: Sequence[Path], out: Path, options: BuildOptions) -> None:
    journals = {path: Journal.opened(path) for path in paths}
    stage = _common(journals)
    of_part = {journal.stage.part[0]: path for path, journal in journals.items()}
    count = stage.part[1]
    owners = [of_part[n % count + 1] for n in range(len(stage.corpora))]
    corpora = [
        journals[owner].stage.corpora[n] for n, owner in enumerate(owners)
    ]  # with their files
    whole = msgspec.structs.replace(stage, part=(1, 1), corpora=corpora, whole=True)
    spec = worker_spec(None, options)
    with reached(spec, options.ray), new_folder(out):
        _check_begun(out, whole)
        # Files first: a journal whose files are missing would refuse to be gone on with.
        with disk_errors_explained(out):
            for number, owner in enumerate(owners, 1):
                _take_over(journals[owner], f"{number:06d}", out)
            (out / TASKS).mkdir(exist_ok=True)
        journal = Journal.of(out, whole)
        journal.note(corpora=corpora, whole=True)
        build = Unfinished(journal, None, options.allow_mixed, options.progress)
        for task in build.tasks:
            record = journals[owners[int(task.segment) - 1]].done(task)
            if record is not None and journal.done(task) is None:
                journal.finish(task, record)
        if not options.allow_mixed:
            machines = [build.record(name).made_on for name in build.corpora]
            check_all_alike(zip(map(str, owners), machines, strict=True))
        finish(build, options, spec)
        publish(build)


def _common(journals: dict[Path, Journal]) -> Stage:
    """What parts were begun with; refuses parts of different builds, or that are not finished."""
    first, stage = next((path, journal.stage) for path, journal in journals.items())
    for path, journal in journals.items():
        own = journal.stage
        for name in {**stage.arguments, **own.arguments}:
            was, other = stage.arguments.get(name), own.arguments.get(name)
            if was != other:
                raise FolderError(
                    f"{path} was built with {name} {other}, and {first} with {was}: build all "
                    "parts alike"
                )
        left = Unfinished(journal, None).left()
        if left or not own.whole:
            what = f"; {left[0]} is missing" if own.whole else ""
            raise FolderError(f"{path} is not finished{what}: run `nearest build --part` again")
        if [_read(corpus) for corpus in own.corpora] != [_read(c) for c in stage.corpora]:
            raise FolderError(f"{path} was built of another corpus than {first}: build it anew")
        if own.part[1] != stage.part[1]:
            raise FolderError(
                f"{path} is one of {own.part[1]} parts, and {first} one of {stage.part[1]}"
            )
    found = sorted(journal.stage.part[0] for journal in journals.values())
    if doubled := [one for one, other in pairwise(found) if one == other]:
        raise FolderError(f"part {doubled[0]}/{stage.part[1]} is named twice: name each once")
    if missing := sorted(set(range(1, stage.part[1] + 1)) - set(found)):
        raise FolderError(
            f"part {missing[0]}/{stage.part[1]} is not named: name all parts of the build"
        )
    return stage


def _read(corpus: CorpusRecord) -> tuple[int, str, int]:
    """What a part tells of the documents of a segment, whether it has their files or not."""
    return corpus.documents, corpus.digest, corpus.entries


def _check_begun(out: Path, whole: Stage | None) -> None:
    """Refuse a folder in which another build was begun, before anything is written there."""

    def told(stage: Stage) -> tuple[object, ...]:
        return stage.arguments, stage.part, [_read(corpus) for corpus in stage.corpora]

    if (out / JOURNAL).exists() and (whole is None or told(read_stage(out)) != told(whole)):
        raise FolderError(
            f"{out} holds an unfinished build of something else: give another path, or delete it "
            "first"
        )


def _take_over(part: Journal, name: str, out: Path) -> None:
    """Link what a part made of one segment."""
    corpus = part.stage.corpora[int(name) - 1].record
    if corpus is None:
        raise FolderError(
            f"{part.folder} does not have segment {name}, which is its own: build it anew"
        )
    (out / "segments" / name).mkdir(parents=True, exist_ok=True)
    tasks = [task for task in Unfinished(part, None).tasks if task.segment == name]
    for file in part.combined(corpus, tasks).file_records():
        _take_file(part.folder / file.path, out / file.path, part.folder, file)


def _take_file(file: Path, to: Path, folder: Path, record: FileRecord) -> None:
    """Link a file of a folder, or copy it; refuse one that is not what its record says."""
    check_file(folder, record)
    to.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), to)  # a link in the hub's cache leads to the file itself
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, to)
    if to.stat().st_nlink == 1 and sha256_of(to) != record.sha256:
        raise FolderError(f"{file} is damaged: restore it from a copy, or build it again")


def _join_memories(memories: Sequence[Snapshot], out: Path, options: BuildOptions) -> None:
    first = memories[0]
    for other in memories[1:]:
        _check_alike(first, other, options)
    _check_ids(memories)
    with new_folder(out), disk_errors_explained(out):
        _check_begun(out, None)
        segments = [
            _renamed(memory, record, out, f"{number:06d}")
            for number, (memory, record) in enumerate(
                ((memory, record) for memory in memories for record in memory.manifest.segments), 1
            )
        ]
        alike = first.manifest
        for shared in () if alike.keys is None else alike.keys.file_records():
            _take_file(first.path / shared.path, out / shared.path, first.path, shared)
        make_names_durable(out, [file for segment in segments for file in segment.file_records()])
        begun = first_manifest(alike.model, alike.keys, alike.segment_tokens)
        write_manifest(out, msgspec.structs.replace(begun, segments=segments, chunks=alike.chunks))


_ALIKE: dict[str, Callable[[Manifest], object]] = {
    "model": lambda m: m.model.fingerprint,
    "tokenizer": lambda m: m.model.tokenizer_fingerprint,
    "vocabulary": lambda m: (m.model.vocab_size, m.model.source_vocab_size),
    "start token": lambda m: m.model.start_token,
    "special tokens in documents": lambda m: m.model.special_tokens,
    "keys": lambda m: None if m.keys is None else msgspec.to_builtins(m.keys),
    "chunks": lambda m: None if m.chunks is None else msgspec.to_builtins(m.chunks),
}


def _check_alike(first: Snapshot, other: Snapshot, options: BuildOptions) -> None:
    """Refuse memories that cannot be searched as one."""
    for what, of in _ALIKE.items():
        was, found = of(first.manifest), of(other.manifest)
        if was == found:
            continue
        if isinstance(was, dict) and isinstance(found, dict):
            name = next(name for name in was if was[name] != found[name])
            what, was, found = f"{what} ({name})", was[name], found[name]
        raise FolderError(
            f"{other.path} has another {what} than {first.path} ({found} and {was}): only memories "
            "that were built alike can be joined; others can be looked up beside each other "
            "(--memory)"
        )
    for one in first.manifest.segments:
        for two in other.manifest.segments:
            if not options.allow_mixed and one.made_on is not None and two.made_on is not None:
                check_alike(two.made_on, one.made_on, str(other.path))


def _check_ids(memories: Sequence[Snapshot]) -> None:
    """Refuse memories that have a document id in common."""
    hashes = [s.id_hashes[s.numbers] for memory in memories for s in memory.segments]
    places = [(s, n) for memory in memories for s in memory.segments for n in s.numbers.tolist()]
    every = np.concatenate(hashes)
    order = np.argsort(every, kind="stable")
    for row in np.flatnonzero(np.diff(every[order]) == 0).tolist():
        (one, number), (other, at) = places[order[row]], places[order[row + 1]]
        name = one.documents[number].id
        if other.documents[at].id == name:
            raise CorpusError(
                f"document {name!r} is in two of these memories: remove it from one "
                "(`nearest remove`), then join them"
            )


def _renamed(memory: Snapshot, record: SegmentRecord, out: Path, name: str) -> SegmentRecord:
    """A segment of a memory under another name, its files linked; without clusters."""
    (out / "segments" / name).mkdir(parents=True)

    def taken(file: FileRecord) -> FileRecord:
        base = re.sub(r"^g\d{6}\.", "", Path(file.path).name)
        place = f"segments/{name}/{base}"
        _take_file(memory.path / file.path, out / place, memory.path, file)
        return msgspec.structs.replace(file, path=place)

    own = {kind: file for kind, file in record.files.items() if not kind.startswith("cluster_")}
    index = record.index
    if index is not None:
        made = {kind: getattr(index, kind) for kind in ("file", "trained")}
        found = {kind: file and taken(file) for kind, file in made.items()}
        index = msgspec.structs.replace(index, **found)
    files = {kind: taken(file) for kind, file in own.items()}
    return msgspec.structs.replace(record, name=name, files=files, index=index, members=None)
