"""Write generations of a memory: build one, give it another index or clusters, store settings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
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
    vocabulary_size,
)
from nearest.encode.layers import LanguageModel, find_key_layer
from nearest.errors import SettingError
from nearest.index.approximate import AUTO, check_spec
from nearest.index.keys import key_format
from nearest.index.neighbours import Metric
from nearest.memory.gate_files import NewGate, write_gate
from nearest.memory.generation import changing, new_folder, of_generation
from nearest.memory.manifest import FORMAT, KeysRecord, Manifest, ModelRecord, write_manifest
from nearest.memory.segment import Segment
from nearest.memory.segment_writer import IndexChoice, KeyPlan, write_index, write_segment
from nearest.progress import Progress, no_progress

NO_KEYS = "none"


@dataclass(frozen=True)
class BuildOptions:
    """How a memory is built; every default is what the command line uses."""

    keys: str = "fp16"  # fp16, int8 or none
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
        if self.keys != NO_KEYS:
            key_format(self.keys)
            return
        for field in fields(self):
            if field.name in ("keys", "progress") or getattr(self, field.name) == field.default:
                continue
            raise SettingError(
                f"{field.name} says how keys are made or searched, and with keys none there are "
                "none: leave it out"
            )

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
    plan = None if options.keys == NO_KEYS else _key_plan(model, options)
    model_record = ModelRecord(
        name=model_name(model),
        fingerprint=model_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=vocabulary_size(model),
        start_token=start_token(tokenizer),
    )
    unique = with_unique_ids(as_documents(documents))
    tokenised = tokenise(unique, tokenizer, model_record.start_token, model_record.vocab_size)
    with new_folder(path):
        segment = write_segment(
            path, "000001", tokenised, model_record.vocab_size, plan, options.progress
        )
        write_manifest(
            path,
            Manifest(
                format=FORMAT,
                generation=1,
                created_by=f"nearest {__version__}",
                model=model_record,
                keys=None if plan is None else _keys_record(plan),
                segments=[segment],
                clusters=None,
                settings={},
                gates={},
            ),
        )


def _key_plan(model: LanguageModel, options: BuildOptions) -> KeyPlan:
    layer = find_key_layer(model, options.key_layer)
    check_spec(options.index, layer.dim, options.nprobe)
    return KeyPlan(
        Encoder.of(model, layer, options.window, options.stride, options.batch_size),
        key_format(options.keys),
        cast(Metric, options.metric),
        options.index_choice,
    )


def _keys_record(plan: KeyPlan) -> KeysRecord:
    encoder = plan.encoder
    return KeysRecord(
        layer=encoder.layer.name,
        module=encoder.layer.path,
        dim=encoder.layer.dim,
        format=plan.form.name,
        metric=plan.metric,
        window=encoder.window,
        stride=encoder.stride,
        projection=None,
        codebooks=None,
    )


def rebuild_index(path: Path, choice: IndexChoice, progress: Progress = no_progress) -> None:
    """Give every segment another index, as a new generation."""
    with changing(path) as manifest:
        generation = manifest.generation + 1
        segments = []
        for record in manifest.segments:
            segment = Segment(path, manifest, record)
            file = path / "segments" / record.name / of_generation(generation, "index.faiss")
            index = write_index(path, file, segment.keys, segment.searched, choice, progress)
            segments.append(msgspec.structs.replace(record, index=index))
        write_manifest(
            path, msgspec.structs.replace(manifest, generation=generation, segments=segments)
        )


def store_settings(
    path: Path, method: str, settings: Mapping[str, Any], gate: NewGate | None = None
) -> None:
    """Remember what was tuned for a method, its gate included, as a new generation."""
    with changing(path) as manifest:
        generation = manifest.generation + 1
        gates = dict(manifest.gates)
        if gate is not None:
            gates[method] = write_gate(path, generation, method, gate)
        write_manifest(
            path,
            msgspec.structs.replace(
                manifest,
                generation=generation,
                settings={**manifest.settings, method: dict(settings)},
                gates=gates,
            ),
        )
