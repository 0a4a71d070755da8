"""The index of a segment: which kind, built over its keys, tuned, written and described."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearest.errors import SettingError
from nearest.folder import fsync_file
from nearest.index.approximate import (
    AUTO,
    EXACT,
    EXACT_BELOW,
    ApproximateIndex,
    SearchParameters,
    build_index,
    check_spec,
    resolve_spec,
    training_rows,
    tune_search,
)
from nearest.index.exact import ExactIndex
from nearest.index.keys import Keys
from nearest.memory.manifest import FileRecord, IndexRecord, Manifest
from nearest.progress import Progress

_SEED = 0


@dataclass(frozen=True)
class IndexChoice:
    """A FAISS factory string, "exact" or "auto", and how it is searched.

    `recall` is the recall@100 to tune for; with `nprobe` given there is nothing to tune, and the
    recall is measured only.
    """

    spec: str = AUTO
    recall: float = 0.95
    nprobe: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise SettingError(f"the recall target must lie in (0, 1], got {self.recall}")
        if self.nprobe is not None and self.nprobe < 1:
            raise SettingError(f"nprobe must be at least 1, got {self.nprobe}")

    @classmethod
    def of(cls, manifest: Manifest) -> "IndexChoice":
        """What was asked for when the memory's indexes were last built."""
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
    root: Path,
    path: Path,
    keys: Keys,
    entries: Int[np.ndarray, " m"],
    choice: IndexChoice,
    progress: Progress,
) -> IndexRecord:
    """Build, tune and write the index over the keys of entries; an exact one needs no file."""
    check_spec(choice.spec, keys.dim, choice.nprobe, len(entries))
    spec = resolve_spec(choice.spec, len(entries))
    file, parameters = None, SearchParameters(recall=1.0)
    if spec != EXACT:
        rng = np.random.default_rng(_SEED)
        progress(f"index {spec}", 0, len(entries))
        index = build_index(keys, entries, spec, rng)
        exact = ExactIndex(keys, entries)
        parameters = tune_search(index, keys, entries, exact, choice.recall, rng, choice.nprobe)
        ApproximateIndex(index, keys.metric).write(path)
        fsync_file(path)
        file = FileRecord.of(root, path.relative_to(root).as_posix())
        progress(f"index {spec}", len(entries), len(entries))
    return IndexRecord(
        spec=spec,
        file=file,
        entries=len(entries),
        nprobe=parameters.nprobe,
        candidates=parameters.candidates,
        recall=parameters.recall,
        recall_target=choice.recall,
    )
