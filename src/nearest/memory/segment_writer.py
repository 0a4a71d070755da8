"""Write one segment: its corpus, suffix array, keys and index, in that order."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Integer

from nearest.corpus.batches import WindowBatch
from nearest.corpus.tokens import TokenisedDocument, token_dtype
from nearest.encode.encoder import Encoder
from nearest.encode.layers import KeyLayer
from nearest.errors import CorpusError, ModelError, SettingError
from nearest.folder import ArrayFile, fsync_file, open_array
from nearest.index.approximate import (
    AUTO,
    EXACT,
    ApproximateIndex,
    SearchParameters,
    build_index,
    check_spec,
    resolve_spec,
    tune_search,
)
from nearest.index.exact import ExactIndex
from nearest.index.keys import KeyFormat, Keys
from nearest.index.neighbours import Metric
from nearest.index.suffix import sort_suffixes
from nearest.memory.documents import DocumentWriter
from nearest.memory.key_files import KeyWriter, key_paths, open_keys
from nearest.memory.manifest import FileRecord, IndexRecord, SegmentRecord
from nearest.memory.segment import OFFSET_DTYPE, valued_entries
from nearest.progress import Progress

_FILES = {
    "tokens": "tokens.npy",
    "offsets": "offsets.npy",
    "documents": "documents.jsonl.zst",
    "frames": "frames.npy",
    "suffixes": "suffix.npy",
}
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


@dataclass(frozen=True)
class KeyPlan:
    """How a segment's keys are made, stored and searched."""

    encoder: Encoder
    form: KeyFormat
    metric: Metric
    choice: IndexChoice


def write_segment(
    root: Path,
    name: str,
    documents: Iterable[TokenisedDocument],
    vocab_size: int,
    plan: KeyPlan | None,
    progress: Progress,
) -> SegmentRecord:
    """Write a segment's files below `root` and describe them; nothing refers to them yet.

    Without a plan it has neither keys nor index.
    """
    folder = root / "segments" / name
    folder.mkdir(parents=True)
    dtype = token_dtype(vocab_size)
    offsets, frames = _write_corpus(folder, documents, dtype, progress)
    total = int(offsets[-1])
    entries = valued_entries(offsets)
    if not len(entries):
        raise CorpusError("the corpus holds no token that follows another: give it longer text")
    if plan is not None:
        check_spec(plan.choice.spec, plan.encoder.layer.dim, plan.choice.nprobe, len(entries))
    tokens = open_array(folder / _FILES["tokens"], dtype, (total,))
    _write_suffixes(folder, tokens, entries, progress)
    files, index = dict(_FILES), None
    if plan is not None:
        paths = key_paths(folder, plan.form, plan.encoder.layer.dim)
        keys = _write_keys(paths, tokens, offsets, plan, len(entries), progress)
        files |= {kind: path.name for kind, path in paths.items()}
        index = write_index(root, folder / "index.faiss", keys, entries, plan.choice, progress)
    return SegmentRecord(
        name=name,
        tokens=total,
        documents=len(offsets) - 1,
        entries=len(entries),
        frames=frames,
        files={
            kind: FileRecord.of(root, f"segments/{name}/{file}") for kind, file in files.items()
        },
        index=index,
        kept=None,
    )


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
    exact = ExactIndex(keys, entries)
    if spec == EXACT:
        return _index_record(spec, None, SearchParameters(recall=1.0), choice)
    rng = np.random.default_rng(_SEED)
    progress(f"index {spec}", 0, len(entries))
    index = build_index(keys, entries, spec, rng)
    parameters = tune_search(index, keys, entries, exact, choice.recall, rng, choice.nprobe)
    ApproximateIndex(index, keys.metric).write(path)
    fsync_file(path)
    progress(f"index {spec}", len(entries), len(entries))
    file = FileRecord.of(root, path.relative_to(root).as_posix())
    return _index_record(spec, file, parameters, choice)


def _index_record(
    spec: str, file: FileRecord | None, parameters: SearchParameters, choice: IndexChoice
) -> IndexRecord:
    return IndexRecord(
        spec, file, parameters.nprobe, parameters.candidates, parameters.recall, choice.recall
    )


def _write_corpus(
    folder: Path,
    documents: Iterable[TokenisedDocument],
    dtype: "np.dtype[np.unsignedinteger]",
    progress: Progress,
) -> tuple[Int[np.ndarray, " documents_plus_1"], int]:
    """Write tokens, offsets and documents; returns the offsets and the number of text frames."""
    offsets = [0]
    store = DocumentWriter(folder / _FILES["documents"], folder / _FILES["frames"])
    with ArrayFile(folder / _FILES["tokens"], dtype) as tokens, store:
        for item in documents:
            tokens.append(item.tokens.astype(dtype))
            store.append(item.document)
            offsets.append(offsets[-1] + len(item.tokens))
            progress("tokens", offsets[-1], None)
    if len(offsets) == 1:
        raise CorpusError("the corpus holds no documents: give it at least one")
    with ArrayFile(folder / _FILES["offsets"], OFFSET_DTYPE) as file:
        file.append(np.array(offsets, OFFSET_DTYPE))
    return np.array(offsets, OFFSET_DTYPE), store.frames


def _write_suffixes(
    folder: Path,
    tokens: Integer[np.ndarray, " n"],
    entries: Int[np.ndarray, " m"],
    progress: Progress,
) -> None:
    progress("suffix array", 0, len(entries))
    suffixes = sort_suffixes(tokens, entries)
    with ArrayFile(folder / _FILES["suffixes"], suffixes.dtype, rows=len(suffixes)) as file:
        file.write(0, suffixes)
    progress("suffix array", len(entries), len(entries))


def _write_keys(
    paths: dict[str, Path],
    tokens: Integer[np.ndarray, " n"],
    offsets: Int[np.ndarray, " documents_plus_1"],
    plan: KeyPlan,
    total: int,
    progress: Progress,
) -> Keys:
    """Encode every valued position; rows of document ends stay zero and are never looked up."""
    layer, done = plan.encoder.layer, 0
    documents = (tokens[start:stop] for start, stop in pairwise(offsets))
    with KeyWriter(paths, plan.form, layer.dim, len(tokens)) as file:
        progress("keys", 0, total)
        for batch, keys in plan.encoder.keys(documents):
            rows = keys.numpy()
            _check_range(rows, batch, layer, plan.form)
            entries = offsets[batch.documents] + batch.positions
            breaks = np.flatnonzero(np.diff(entries) != 1) + 1
            for start, stop in pairwise([0, *breaks, len(entries)]):
                file.write(int(entries[start]), rows[start:stop])
            done += len(entries)
            progress("keys", done, total)
    return open_keys(paths, plan.form, layer.dim, len(tokens), plan.metric)


def _check_range(
    rows: Float[np.ndarray, "n dim"], batch: WindowBatch, layer: KeyLayer, form: KeyFormat
) -> None:
    """Refuse keys that the format cannot hold: NaN, infinite, or in float16 beyond ±65,504."""
    if bool(np.abs(rows).max() <= form.largest):  # False for NaN too
        return
    wrong = ~(np.abs(rows) <= form.largest)
    bad = int(np.flatnonzero(wrong.any(axis=1))[0])
    value = rows[bad][wrong[bad]][0]
    raise ModelError(
        f"the key {layer.name} is {value:g} at token {batch.positions[bad]} of document number "
        f"{batch.documents[bad] + 1}, which {form.name} keys cannot hold: check the model's "
        "weights, load it in float32, or try the other key layer (--key-layer)"
    )
