"""The index of a segment: choosing, building, tuning, writing and checking it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from nearest.errors import CorpusError, FolderError, SettingError
from nearest.folder import fsync_file, sha256_of
from nearest.index.approximate import ApproximateIndex, read_index, spec_of
from nearest.index.building import (
    can_be_joined,
    check_spec,
    fill_index,
    number_of_lists,
    train_index,
    training_rows,
)
from nearest.index.choice import (
    AUTO,
    EXACT,
    EXACT_BELOW,
    RECALL,
    fitting_lists,
    resolve_spec,
)
from nearest.index.exact import ExactIndex
from nearest.index.keys import Keys
from nearest.index.search import Searched, Searcher
from nearest.index.tuning import SearchParameters, measured_recall, tune_search
from nearest.progress import Progress
from nearest.store.manifest import IndexRecord, Manifest, SegmentRecord
from nearest.store.new_files import NewFiles
from nearest.store.records import FileRecord

if TYPE_CHECKING:
    from nearest.store.new_segment import NewSegment
    from nearest.store.segment import Segment

INDEX, TRAINED = "index.faiss", "trained.faiss"
LAYOUT = {"index": INDEX, "trained": TRAINED}  # recorded in the segment's `IndexRecord`
_SEED = 0
_SERVED = 64  # queries at removed entries, and neighbours of each, that `verify` looks at
_RECALL_LOST = 0.1  # below what was measured at building; samples differ
# Scanned, large batches are rounded otherwise than few queries: the stored keys are to decide.
_ROUNDED = 16
_METRIC = {"l2": 1, "ip": 0}  # as FAISS numbers them
_FEWER_LISTS = 2  # than fit so many entries: with more, searches are noticeably slower


@dataclass(frozen=True)
class IndexChoice:
    """A FAISS factory string, "exact" or "auto", and how it is searched.

    `recall` is the recall@1024 to tune for; with `nprobe` given there is nothing to tune, and the
    recall is measured only.
    """

    spec: str = AUTO
    recall: float = RECALL
    nprobe: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise SettingError(f"the recall target must lie in (0, 1], got {self.recall}")
        if self.nprobe is not None and self.nprobe < 1:
            raise SettingError(f"nprobe must be at least 1, got {self.nprobe}")

    @classmethod
    def of(cls, manifest: Manifest) -> "IndexChoice":
        """The choice that the memory's indexes were last built with."""
        targets = [s.index.recall_target for s in manifest.segments if s.index is not None]
        if manifest.keys is None or not targets:
            return cls()
        return cls(manifest.keys.index, max(targets))

    def among_others(self, dim: int, entries: int) -> "IndexChoice":
        """For one of several segments: a small one, or one too small to train on, is scanned."""
        trained = self.spec not in (AUTO, EXACT)
        if entries >= EXACT_BELOW and not (trained and entries < training_rows(self.spec, dim)):
            return self
        return replace(self, spec=EXACT, nprobe=None)


def write_index(
    files: NewFiles,
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    choice: IndexChoice,
    progress: Progress,
) -> IndexRecord:
    """Train, fill, tune and write the index over the keys of entries; an exact one needs no file.

    Where other segments' could be joined to it, the trained index without entries is kept too.
    """
    spec = resolve_spec(choice.spec, len(entries), keys.dim, recall=choice.recall)
    check_spec(spec, keys.dim, choice.nprobe, len(entries))
    if spec == EXACT:
        return _record(
            EXACT, len(entries), SearchParameters(margin=_ROUNDED, recall=1.0), choice.recall
        )
    rng = np.random.default_rng(_SEED)
    progress(f"index {spec}", 0, len(entries))
    index = train_index(keys, entries, spec, rng)
    trained = _file(files, TRAINED, index, keys) if can_be_joined(index) else None
    fill_index(index, keys, entries, spec, progress)
    exact = ExactIndex(keys, entries)
    progress("tune the index", 0, 1)
    parameters = tune_search(index, keys, entries, exact, choice.recall, rng, choice.nprobe)
    progress("tune the index", 1, 1)
    file = _file(files, INDEX, index, keys)
    source = None if trained is None else trained.sha256
    return _record(spec, len(entries), parameters, choice.recall, file, trained, source)


def fill_like(
    files: NewFiles,
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    like: IndexRecord,
    progress: Progress,
    *,
    keep: bool,
) -> IndexRecord:
    """Write the index over the keys of entries, filled from the one that `like` was filled from.

    It is searched as `like` is. `keep` keeps a copy of the trained index for segments to come.
    """
    if like.trained is None:
        raise ValueError("the trained index is not kept")
    progress(f"index {like.spec}", 0, len(entries))
    with (files.root / like.trained.path).open("rb") as file:
        index = read_index(file, like.trained.sha256)
    trained = _file(files, TRAINED, index, keys) if keep else None
    fill_index(index, keys, entries, like.spec, progress)
    backend = ApproximateIndex(index, keys.metric, like.nprobe)
    searcher = Searcher([Searched(backend, len(entries), like.margin)], keys)
    exact = ExactIndex(keys, entries)
    progress("tune the index", 0, 1)
    found = measured_recall(searcher, keys, entries, exact, np.random.default_rng(_SEED))
    progress("tune the index", 1, 1)
    parameters = SearchParameters(like.nprobe, like.margin, found)
    written = _file(files, INDEX, index, keys)
    source, target = like.filled_from, like.recall_target
    return _record(like.spec, len(entries), parameters, target, written, trained, source)


def take_over_index(
    files: NewFiles,
    file: Path,
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    recall: float,
) -> IndexRecord:
    """Write an index of other tools, whose ids are entries, and tune how it is searched.

    The user trusts the file: FAISS is not made to read hostile ones.

    Raises:
        CorpusError: it is no FAISS index, or not one of these entries.
    """
    try:
        with file.open("rb") as opened:
            index = read_index(opened, sha256_of(file))
    except FolderError as error:
        raise CorpusError(f"{file} is no FAISS index: leave out --trust") from error
    if (index.d, index.ntotal) != (keys.dim, len(entries)) or index.metric_type != _METRIC[
        keys.metric
    ]:
        raise CorpusError(
            f"{file} holds {index.ntotal:,} vectors of {index.d} dims, and the datastore "
            f"{len(entries):,} of {keys.dim}, or it measures otherwise: leave out --trust"
        )
    rng = np.random.default_rng(_SEED)
    parameters = tune_search(index, keys, entries, ExactIndex(keys, entries), recall, rng)
    written = _file(files, INDEX, index, keys)
    return _record(spec_of(index), len(entries), parameters, recall, written)


def to_fill_like(
    records: Iterable[SegmentRecord], choice: IndexChoice, dim: int, entries: int
) -> IndexRecord | None:
    """The index of which one of so many entries may be filled: that of the largest segment.

    None where no trained one is kept, another is asked for, or too few lists would hold too many.
    """
    kept = [record.index for record in records if record.index and record.index.trained]
    like = max(kept, key=lambda index: index.entries, default=None)
    if like is None or choice.nprobe is not None:
        return None
    if choice.spec == AUTO:
        few = _FEWER_LISTS * number_of_lists(like.spec, dim)
        return like if fitting_lists(entries) <= few else None
    return like if choice.spec == like.spec else None


def _record(
    spec: str,
    entries: int,
    parameters: SearchParameters,
    recall_target: float,
    file: FileRecord | None = None,
    trained: FileRecord | None = None,
    filled_from: str | None = None,
) -> IndexRecord:
    return IndexRecord(
        spec=spec,
        file=file,
        trained=trained,
        filled_from=filled_from,
        entries=entries,
        nprobe=parameters.nprobe,
        margin=parameters.margin,
        recall=parameters.recall,
        recall_target=recall_target,
    )


def _file(files: NewFiles, name: str, index: Any, keys: Keys) -> FileRecord:
    path = files.path(name)
    ApproximateIndex(index, keys.metric).write(path)
    fsync_file(path)
    return files.record(name)


def write(new: "NewSegment", record: SegmentRecord) -> SegmentRecord:
    """Build the index of a new segment over its keys, like those of other segments where it fits.

    A memory without keys has none.
    """
    plan = new.plan
    if plan.manifest.keys is None:
        return record
    segment = new.opened(record)
    what = new.files, segment.keys, segment.searched
    others = plan.manifest.segments if plan.among_others else []
    like = to_fill_like(others, plan.choice, segment.keys.dim, segment.searched_count)
    if like is None:
        index = write_index(*what, new.choice, plan.progress)
    else:
        indexes = [one.record.index for one in plan.merged]
        keep = any(index is not None and index.trained == like.trained for index in indexes)
        index = fill_like(*what, like, plan.progress, keep=keep)
    return record.with_files({}, index=index)


def write_all(
    segments: "Sequence[tuple[NewFiles, Segment]]", choice: IndexChoice, progress: Progress
) -> list[SegmentRecord]:
    """Write new indexes for all segments: the largest one's first, and the others' like it."""
    first = lead([segment for _, segment in segments])
    leads = write_lead(*segments[first], choice, progress)
    return [
        leads if number == first else write_beside(files, segment, choice, leads, progress)
        for number, (files, segment) in enumerate(segments)
    ]


def lead(segments: "Sequence[Segment]") -> int:
    """Which segment is the largest: the others' indexes are filled like its."""
    return max(range(len(segments)), key=lambda i: (segments[i].searched_count, -i))


def write_lead(
    files: NewFiles, segment: "Segment", choice: IndexChoice, progress: Progress
) -> SegmentRecord:
    """Write a new index for the largest segment."""
    index = write_index(files, segment.keys, segment.searched, choice, progress)
    return segment.record.with_files({}, index=index)


def write_beside(
    files: NewFiles,
    segment: "Segment",
    choice: IndexChoice,
    leads: SegmentRecord,
    progress: Progress,
) -> SegmentRecord:
    """Write a new index for another segment, like that which the largest one has now."""
    what, count = (files, segment.keys, segment.searched), segment.searched_count
    like = to_fill_like([leads], replace(choice, nprobe=None), segment.keys.dim, count)
    if like is None:
        own = choice.among_others(segment.keys.dim, count)
        index = write_index(*what, own, progress)
    else:
        index = fill_like(*what, like, progress, keep=False)
    return segment.record.with_files({}, index=index)


def served(segment: "Segment") -> Int[np.ndarray, " _"]:
    """Search results for queries at the keys of removed entries."""
    heads, merged = segment.removed_entries(), segment.stored_merged
    if segment.record.index is None or not len(heads) or not segment.searched_count:
        return np.empty(0, np.int64)
    chosen = np.random.default_rng(_SEED).choice(heads, min(_SERVED, len(heads)), replace=False)
    own = chosen if merged is None else merged.rows[chosen]
    queries = segment.stored_keys.rows(own[own >= 0])
    ids = segment.searcher.search(queries, _SERVED, "index").ids
    return ids[ids >= 0]


def check(segment: "Segment") -> list[str]:
    """Whether the index loads, has the recorded size, and still reaches its recall at building."""
    if segment.record.index is None:
        return []
    # A FolderError when the index cannot be read, or holds something else.
    searcher = segment.searcher
    expected = segment.record.index.recall
    if segment.record.index.file is None or expected is None:
        return []
    found = measured_recall(
        searcher,
        segment.keys,
        segment.searched,
        segment.exact_index(),
        np.random.default_rng(_SEED),
    )
    if found < expected - _RECALL_LOST:
        return [
            f"the index finds {found:.0%} of the nearest entries, {expected:.0%} when it was built"
        ]
    return []
