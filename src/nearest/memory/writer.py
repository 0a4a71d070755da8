"""Write generations of a memory: build one, give it another index, store tuned settings.

New files are written beside the live ones; the manifest's rename publishes them. Until then a kill
leaves the old generation, and on any error the files begun are taken away.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from nearest import __version__
from nearest.corpus.batches import check_batch_size
from nearest.corpus.documents import Document, as_documents, with_unique_ids
from nearest.corpus.tokens import tokenise
from nearest.encode.encoder import Encoder
from nearest.encode.identity import (
    model_fingerprint,
    model_name,
    start_token,
    tokenizer_fingerprint,
)
from nearest.encode.layers import LanguageModel, find_key_layer
from nearest.errors import FolderError, SettingError
from nearest.folder import disk_errors_explained, writer_lock
from nearest.index.approximate import AUTO, check_spec
from nearest.index.neighbours import Metric
from nearest.memory.manifest import (
    FORMAT,
    MANIFEST,
    KeysRecord,
    Manifest,
    ModelRecord,
    read_manifest,
    write_manifest,
)
from nearest.memory.segment import Segment
from nearest.memory.segment_writer import (
    SEGMENT_FILES,
    IndexChoice,
    write_index,
    write_segment,
)
from nearest.progress import Progress, no_progress

_LATER_INDEX = re.compile(r"g\d{6}\.index\.faiss")


@dataclass(frozen=True)
class BuildOptions:
    """How a memory is built; every default is what the command line uses."""

    key_layer: str = "last_ffn_input"
    window: int | None = None  # 512, or the model's positions where those are fewer
    stride: int | None = None  # half the window
    index: str = AUTO
    metric: str = "l2"
    recall: float = 0.95
    nprobe: int | None = None
    batch_size: int | None = None  # windows a forward pass; chosen by the vocabulary when None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise SettingError(f"metric {self.metric!r} is unknown: choose l2 or ip")
        check_batch_size(self.batch_size)
        _ = self.index_choice

    @property
    def index_choice(self) -> IndexChoice:
        """The index and how it is searched."""
        return IndexChoice(self.index, self.recall, self.nprobe)


def build_memory(
    path: Path,
    documents: Iterable[Document | str],
    model: LanguageModel,
    tokenizer: Any,
    options: BuildOptions,
) -> None:
    """Make a memory of documents in a new folder.

    Raises:
        NearestError: the corpus, model, settings or folder cannot be used; nothing is left behind.
    """
    layer = find_key_layer(model, options.key_layer)
    check_spec(options.index, layer.dim, options.nprobe)
    encoder = Encoder.of(model, layer, options.window, options.stride, options.batch_size)
    model_record = ModelRecord(
        name=model_name(model),
        fingerprint=model_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=encoder.vocab_size,
        start_token=start_token(tokenizer),
    )
    metric = cast(Metric, options.metric)
    keys = KeysRecord(
        layer.name, layer.path, layer.dim, "float16", metric, encoder.window, encoder.stride
    )
    unique = with_unique_ids(as_documents(documents))
    tokenised = tokenise(unique, tokenizer, model_record.start_token, model_record.vocab_size)
    with _new_folder(path):
        segment = write_segment(
            path, "000001", tokenised, encoder, metric, options.index_choice, options.progress
        )
        created_by = f"nearest {__version__}"
        write_manifest(
            path, Manifest(FORMAT, 1, created_by, model_record, keys, [segment], settings={})
        )


def rebuild_index(path: Path, choice: IndexChoice, progress: Progress = no_progress) -> None:
    """Give every segment another index, as a new generation."""
    with _changing(path) as manifest:
        generation = manifest.generation + 1
        segments = []
        for record in manifest.segments:
            segment = Segment(path, manifest, record)
            file = path / "segments" / record.name / f"g{generation:06d}.index.faiss"
            index = write_index(
                path, file, segment.keys, segment.entries, manifest.keys.metric, choice, progress
            )
            segments.append(msgspec.structs.replace(record, index=index))
        write_manifest(
            path, msgspec.structs.replace(manifest, generation=generation, segments=segments)
        )


def store_settings(path: Path, method: str, settings: dict[str, Any]) -> None:
    """Remember what was tuned for a method, as a new generation."""
    with _changing(path) as manifest:
        write_manifest(
            path,
            msgspec.structs.replace(
                manifest,
                generation=manifest.generation + 1,
                settings={**manifest.settings, method: settings},
            ),
        )


def check_new(path: Path) -> None:
    """Refuse a path at which no memory can be begun: a file, a memory, or a folder in use.

    Raises:
        FolderError: it is one of these.
    """
    try:
        if path.is_file():
            raise FolderError(f"{path} is a file: give the memory another path")
        if (path / MANIFEST).exists():
            raise FolderError(f"{path} is already a memory: give another path, or delete it first")
        unknown = sorted(
            item.relative_to(path).as_posix()
            for item in path.rglob("*")
            if not _is_leftover(path, item)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _no_folder(path, error) from error
    if unknown:
        raise FolderError(
            f"{path} is not empty (it holds {unknown[0]!r}): give the memory its own folder"
        )


def _no_folder(path: Path, error: Exception) -> FolderError:
    reason = getattr(error, "strerror", None) or error
    return FolderError(f"{path} cannot be a folder ({reason}): give the memory another path")


@contextmanager
def _new_folder(path: Path) -> Iterator[None]:
    """Lock a folder for a first generation; on any error, take away what was begun."""
    check_new(path)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with disk_errors_explained(path):
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _no_folder(path, error) from error
    with writer_lock(path):
        check_new(path)  # now that no other writer can begin one
        try:
            with disk_errors_explained(path):
                shutil.rmtree(path / "segments", ignore_errors=True)  # an interrupted build's
                (path / f"{MANIFEST}.partial").unlink(missing_ok=True)
                yield
        except BaseException:
            if not (path / MANIFEST).exists():  # else it has been published, and is whole
                shutil.rmtree(path / "segments", ignore_errors=True)
                with suppress(OSError):  # what others have put there stays
                    for folder in created:
                        folder.rmdir()
            raise


def _is_leftover(path: Path, item: Path) -> bool:
    """Whether an interrupted build may have left this; nothing else is ever taken away."""
    place = item.relative_to(path).as_posix()
    if place == f"{MANIFEST}.partial":
        return item.is_file()
    if item.is_symlink():
        return False
    if item.is_dir():
        return place in ("segments", "segments/000001")
    return place in {f"segments/000001/{name}" for name in SEGMENT_FILES}


@contextmanager
def _changing(path: Path) -> Iterator[Manifest]:
    """Lock a memory for its next generation; afterwards, remove files that no manifest names."""
    manifest = read_manifest(path)
    with writer_lock(path):
        manifest = read_manifest(path)
        try:
            with disk_errors_explained(path):
                yield manifest
        finally:
            _remove_unnamed_files(path, read_manifest(path))


def _remove_unnamed_files(path: Path, manifest: Manifest) -> None:
    """Clear what interrupted writers and earlier generations left; readers hold theirs open."""
    named = {path / record.path for record in manifest.file_records()}
    for segment in (path / "segments").iterdir():
        if segment.is_symlink() or not segment.is_dir():
            continue
        for file in segment.iterdir():
            ours = file.name in SEGMENT_FILES or _LATER_INDEX.fullmatch(file.name)
            if ours and file not in named and (file.is_symlink() or file.is_file()):
                file.unlink()
