"""Build a memory, give it another index, and store what was tuned: each as one snapshot."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import msgspec

from nearest import __version__
from nearest.build.corpus_segments import write_segments
from nearest.build.keys import EncodedKeys
from nearest.build.match import rules_of
from nearest.build.plan import BuildPlan, plan_build
from nearest.corpus.batches import check_batch_size
from nearest.corpus.incoming import Documents, incoming_documents
from nearest.corpus.tokens import tokenise
from nearest.encode.encoder import Encoder
from nearest.encode.fingerprint import (
    function_hash,
    probe_of,
    tokenizer_fingerprint,
    weights_hash,
)
from nearest.encode.identity import model_name, token_rules, tokenizer_name
from nearest.encode.layers import KeyLayer, LanguageModel, find_key_layer
from nearest.errors import SettingError
from nearest.index.building import check_spec
from nearest.index.choice import AUTO, RECALL
from nearest.index.keys import key_format
from nearest.index.neighbours import checked_metric
from nearest.progress import Progress, no_progress
from nearest.store.change import changing, check_new, new_folder
from nearest.store.journal import Journal
from nearest.store.manifest import (
    FORMAT,
    MANIFEST,
    ComputedIn,
    FunctionRecord,
    KeysRecord,
    Manifest,
    ModelRecord,
    write_manifest,
)
from nearest.store.new_files import NewFiles
from nearest.store.new_segment import SegmentPlan, segment_tokens
from nearest.store.parts.gates import NewGate, write_gate
from nearest.store.parts.index import IndexChoice, write_all
from nearest.store.segment import no_keys

NO_KEYS = "none"
_ROOM = 1 << 18  # bytes, that a gate and the next manifest take at most


@dataclass(frozen=True)
class BuildOptions:
    """How a memory is built; every default is what the command line uses."""

    keys: str = "int8"  # int8, fp16 or none
    key_layer: str = "last_ffn_input"
    window: int | None = None  # 512, or the model's positions where those are fewer
    stride: int | None = None  # half the window
    index: str = AUTO
    metric: str = "l2"
    recall: float = RECALL
    nprobe: int | None = None
    batch_size: int | None = None  # windows a forward pass; chosen by the vocabulary when None
    special_tokens: bool = False  # read "<|endoftext|>" in a document as the token
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        checked_metric(self.metric)
        check_batch_size(self.batch_size)
        _ = self.index_choice
        if self.keys != NO_KEYS:
            key_format(self.keys)
            return
        for field in fields(self):
            if (
                field.name in ("keys", "special_tokens", "progress")
                or getattr(self, field.name) == field.default
            ):
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
    documents: Documents,
    model: LanguageModel | None,
    tokenizer: Any,
    options: BuildOptions,
) -> None:
    """Make a memory of documents in a new folder; without a model, of a tokenizer's tokens alone.

    Raises:
        NearestError: the corpus, model, settings or folder cannot be used. What was begun is taken
            away, unless it took more than half a minute: the same build then goes on from there.
    """
    encoder, keys = _keys_of(model, options)
    manifest = new_manifest(model, tokenizer, keys, special_tokens=options.special_tokens)
    rules = rules_of(manifest, model)
    incoming = incoming_documents(documents, rules, path)
    with new_folder(path):
        journal = Journal.of(path, _arguments(manifest, model, encoder, options))
        rest = tokenise(journal.rest(incoming), tokenizer, rules)
        plan = SegmentPlan(
            NewFiles(path),
            "",
            manifest,
            options.index_choice,
            options.progress,
            None if encoder is None else EncodedKeys(encoder),
            journal=journal,
        )
        segments = write_segments(plan, journal, rest)
        write_manifest(path, msgspec.structs.replace(manifest, segments=segments))
        journal.close()


def new_manifest(
    model: LanguageModel | None,
    tokenizer: Any,
    keys: KeysRecord | None,
    *,
    special_tokens: bool = False,
) -> Manifest:
    """A first snapshot that has no segment yet."""
    rules = token_rules(model, tokenizer)
    probe = None
    if keys is not None and model is not None:
        entry = model.get_submodule(keys.module)
        probe = probe_of(model, KeyLayer(keys.layer, keys.module, entry, keys.dim))
    return Manifest(
        format=FORMAT,
        version=1,
        created_by=f"nearest {__version__}",
        model=ModelRecord(
            name=tokenizer_name(tokenizer) if model is None else model_name(model),
            fingerprint=None
            if model is None
            else weights_hash(model) or function_hash(model, probe),
            tokenizer_fingerprint=tokenizer_fingerprint(
                tokenizer, rules.encoder_vocab_size is not None
            ),
            vocab_size=rules.vocab_size,
            start_token=rules.start_token,
            source_vocab_size=rules.encoder_vocab_size,
            function=None if probe is None else FunctionRecord(**asdict(probe)),
            special_tokens=special_tokens,
        ),
        keys=keys,
        segments=[],
        clusters=None,
        settings={},
        gates={},
        documents_of=1,
        tuned_at={},
    )


def planned_memory(
    path: Path,
    documents: Documents,
    model: LanguageModel | None,
    tokenizer: Any,
    options: BuildOptions,
) -> BuildPlan:
    """Say what `build_memory` would take, and write nothing; raises as it does."""
    check_new(path)
    encoder, keys = _keys_of(model, options)
    started = time.perf_counter()
    manifest = new_manifest(model, tokenizer, keys, special_tokens=options.special_tokens)
    rules, identifying = rules_of(manifest, model), time.perf_counter() - started
    return plan_build(
        path, documents, tokenizer, rules, manifest, encoder, identifying, options.recall
    )


def _arguments(
    manifest: Manifest, model: LanguageModel | None, encoder: Encoder | None, options: BuildOptions
) -> dict[str, Any]:
    """All that decides what a build writes, but for the corpus."""
    record, choice = manifest.model, options.index_choice
    keys = {"format": "none"} if manifest.keys is None else msgspec.to_builtins(manifest.keys)
    return {
        "model": record.fingerprint,
        "tokenizer": record.tokenizer_fingerprint,
        "special_tokens": record.special_tokens,
        "keys": keys.pop("format"),
        **{f"key {name}": value for name, value in keys.items()},
        "device": None if model is None else model.device.type,
        "batch_size": None if encoder is None else encoder.batch_size,
        "recall": choice.recall,
        "nprobe": choice.nprobe,
        "segment_tokens": segment_tokens(manifest.keys),
    }


def _keys_of(
    model: LanguageModel | None, options: BuildOptions
) -> tuple[Encoder, KeysRecord] | tuple[None, None]:
    """The encoder and the record of its keys; both None for a memory without keys."""
    if options.keys == NO_KEYS:
        return None, None
    if model is None:
        raise SettingError(
            f"{options.keys} keys are a language model's states, and a tokenizer alone is given: "
            "give a model, or keys none"
        )
    layer = find_key_layer(model, options.key_layer)
    check_spec(options.index, layer.dim, options.nprobe)
    encoder = Encoder.of(model, layer, options.window, options.stride, options.batch_size)
    return encoder, keys_record(encoder, options.keys, options.metric, options.index)


def keys_record(encoder: Encoder, keys: str, metric: str, index: str) -> KeysRecord:
    """The record of keys that an encoder makes, stored in this format."""
    return KeysRecord(
        layer=encoder.layer.name,
        module=encoder.layer.path,
        dim=encoder.layer.dim,
        format=key_format(keys).name,
        metric=checked_metric(metric),
        window=encoder.window,
        stride=encoder.stride,
        projection=None,
        codebooks=None,
        index=index,
        dtype=cast(ComputedIn, str(encoder.model.dtype).removeprefix("torch.")),
    )


def rebuild_index(path: Path, choice: IndexChoice, progress: Progress = no_progress) -> None:
    """Give every segment another index; the others' are filled like the largest one's."""
    with changing(path) as change:
        keys = change.manifest.keys
        if keys is None:
            raise no_keys(path)
        check_spec(choice.spec, keys.stored_dim, choice.nprobe)
        opened = [(change.files(segment.record.name), segment) for segment in change.segments]
        segments = write_all(opened, choice, progress)
        keys = msgspec.structs.replace(keys, index=choice.spec)
        change.publish(keys=keys, segments=segments, keys_of=change.number)


def check_writable(path: Path) -> None:
    """Refuse what `store_settings` would: a locked or read-only memory, or a full disk.

    Raises:
        FolderError: it is one of these, or no memory.
    """
    with changing(path):
        # It is deleted as what an interrupted writer leaves.
        (path / f"{MANIFEST}.partial").write_bytes(bytes(_ROOM))


def store_settings(
    path: Path,
    method: str,
    settings: Mapping[str, Any],
    gate: NewGate | None = None,
    *,
    found_in: Manifest | None = None,
) -> None:
    """Remember what was tuned for a method, its gate included.

    Args:
        path: the memory's folder.
        method: that was tuned.
        settings, gate: what was found.
        found_in: the snapshot in which they were found, where that may not be the one that stands:
            if another writer has changed keys or documents since, they are known as stale.
    """
    with changing(path) as change:
        gates = dict(change.manifest.gates)
        if gate is not None:
            gates[method] = write_gate(change.files(), method, gate)
        found_at = change.number if found_in is None else found_in.version
        change.publish(
            settings={**change.manifest.settings, method: dict(settings)},
            gates=gates,
            tuned_at={**change.manifest.tuned_at, method: found_at},
        )
