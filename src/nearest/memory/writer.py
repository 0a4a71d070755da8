"""Write generations of a memory: build one, give it another index or clusters, store settings."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import msgspec

from nearest import __version__
from nearest.corpus.batches import check_batch_size
from nearest.corpus.documents import Document, as_documents, with_unique_ids
from nearest.corpus.tokens import TokenisedDocument, tokenise
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
from nearest.index.approximate import check_spec
from nearest.index.choice import AUTO
from nearest.index.keys import key_format
from nearest.index.neighbours import Metric
from nearest.memory.access_paths import write_access_paths
from nearest.memory.gate_files import NewGate, write_gate
from nearest.memory.generation import changing, new_folder
from nearest.memory.index_files import IndexChoice
from nearest.memory.index_path import index_segments
from nearest.memory.manifest import (
    FORMAT,
    KeysRecord,
    Manifest,
    ModelRecord,
    SegmentRecord,
    publish_next,
    write_manifest,
)
from nearest.memory.new_segment import SEGMENT_TOKENS, SegmentPlan, reopen_corpus, write_corpus
from nearest.memory.segment import Segment, no_keys
from nearest.memory.unfinished import CorpusRecord, Journal
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
        NearestError: the corpus, model, settings or folder cannot be used. What was begun is taken
            away, unless it took more than half a minute: the same build then goes on from there.
    """
    encoder, keys = None, None
    if options.keys != NO_KEYS:
        encoder, keys = _keys_of(model, options)
    manifest = Manifest(
        format=FORMAT,
        generation=1,
        created_by=f"nearest {__version__}",
        model=ModelRecord(
            name=model_name(model),
            fingerprint=model_fingerprint(model),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=vocabulary_size(model),
            start_token=start_token(tokenizer),
        ),
        keys=keys,
        segments=[],
        clusters=None,
        settings={},
        gates={},
        documents_of=1,
        tuned_at={},
    )
    unique, record = with_unique_ids(as_documents(documents)), manifest.model
    with new_folder(path):
        journal = Journal.of(path, _arguments(manifest, model, encoder, options))
        rest = tokenise(journal.rest(unique), tokenizer, record.start_token, record.vocab_size)
        plan = SegmentPlan(
            path, manifest, "", options.index_choice, options.progress, encoder, journal=journal
        )
        segments = _write_segments(plan, journal, rest)
        write_manifest(path, msgspec.structs.replace(manifest, segments=segments))
        journal.close()


def _arguments(
    manifest: Manifest, model: LanguageModel, encoder: Encoder | None, options: BuildOptions
) -> dict[str, Any]:
    """All that decides what a build writes, but for the corpus."""
    keys, choice = manifest.keys, options.index_choice
    return {
        "model": msgspec.to_builtins(manifest.model),
        "keys": "none" if keys is None else msgspec.to_builtins(keys),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "batch_size": None if encoder is None else encoder.batch_size,
        "recall": choice.recall,
        "nprobe": choice.nprobe,
        "segment_tokens": SEGMENT_TOKENS,
    }


def _write_segments(
    plan: SegmentPlan, journal: Journal, documents: Iterator[TokenisedDocument]
) -> list[SegmentRecord]:
    """Write a corpus in segments, going on where the journal says."""
    stage = journal.stage
    segments, parts = list(stage.segments), _Parts(documents)
    if stage.corpora:
        parts.ended()  # reads what was read before, and finds out whether it is the same

    def following() -> SegmentPlan:
        manifest = msgspec.structs.replace(plan.manifest, segments=list(segments))
        name, among_others = f"{len(segments) + 1:06d}", bool(segments)
        return replace(plan, manifest=manifest, name=name, among_others=among_others)

    while True:
        if stage.current is not None:
            digest = stage.corpora[-1].digest
            new = reopen_corpus(following(), stage.current, digest)
        elif stage.whole:
            return segments
        else:
            segment = following()
            shutil.rmtree(segment.root / segment.folder, ignore_errors=True)
            new = write_corpus(segment, parts.take(SEGMENT_TOKENS))
            corpora = [*stage.corpora, CorpusRecord(new.record.documents, new.digest)]
            journal.note(corpora=corpora, whole=parts.ended(), current=new.record, done=[])
        segments.append(write_access_paths(new))
        journal.note(segments=list(segments), current=None, done=[])
        stage = journal.stage


class _Parts:
    """A stream of documents, taken a segment's worth at a time."""

    def __init__(self, documents: Iterator[TokenisedDocument]) -> None:
        self._documents = documents
        self._next: TokenisedDocument | None = None
        self._begun = False

    def ended(self) -> bool:
        """Whether none are left."""
        if not self._begun:
            self._begun, self._next = True, next(self._documents, None)
        return self._next is None

    def take(self, tokens: int) -> Iterator[TokenisedDocument]:
        """Whole documents of at least so many tokens, where there are as many.

        What follows begins with a document that has an entry.
        """
        taken = 0
        while not self.ended() and self._next is not None:
            if taken >= tokens and len(self._next.tokens) > 1:
                return
            item, self._next = self._next, next(self._documents, None)
            taken += len(item.tokens)
            yield item


def _keys_of(model: LanguageModel, options: BuildOptions) -> tuple[Encoder, KeysRecord]:
    """What reads the documents, and what its keys are."""
    layer = find_key_layer(model, options.key_layer)
    check_spec(options.index, layer.dim, options.nprobe)
    encoder = Encoder.of(model, layer, options.window, options.stride, options.batch_size)
    return encoder, KeysRecord(
        layer=layer.name,
        module=layer.path,
        dim=layer.dim,
        format=key_format(options.keys).name,
        metric=cast(Metric, options.metric),
        window=encoder.window,
        stride=encoder.stride,
        projection=None,
        codebooks=None,
        index=options.index,
    )


def rebuild_index(path: Path, choice: IndexChoice, progress: Progress = no_progress) -> None:
    """Give every segment another index, as a new generation; others are filled like the largest."""
    with changing(path) as manifest:
        if manifest.keys is None:
            raise no_keys(path)
        check_spec(choice.spec, manifest.keys.stored_dim, choice.nprobe)
        opened = [Segment(path, manifest, record) for record in manifest.segments]
        segments = index_segments(path, manifest.generation + 1, opened, choice, progress)
        keys = msgspec.structs.replace(manifest.keys, index=choice.spec)
        publish_next(path, manifest, keys=keys, segments=segments)


def store_settings(
    path: Path, method: str, settings: Mapping[str, Any], gate: NewGate | None = None
) -> None:
    """Remember what was tuned for a method, its gate included, as a new generation."""
    with changing(path) as manifest:
        generation = manifest.generation + 1
        gates = dict(manifest.gates)
        if gate is not None:
            gates[method] = write_gate(path, generation, method, gate)
        publish_next(
            path,
            manifest,
            settings={**manifest.settings, method: dict(settings)},
            gates=gates,
            tuned_at={**manifest.tuned_at, method: generation},
        )
