"""Build a memory, and store what was tuned: each as one snapshot."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import msgspec

from nearest.build.corpus_segments import write_corpora
from nearest.build.following import Followed
from nearest.build.machine import using_threads
from nearest.build.match import rules_of
from nearest.build.plan import BuildPlan, plan_build
from nearest.build.tasks import Unfinished, first_manifest, machine_begun, publish, work
from nearest.build.worker import WorkerSpec, device_of, loadable_name
from nearest.build.workers import crew_of, drive, reached, threads_of
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
from nearest.errors import SettingError, warn_caller
from nearest.index.building import check_spec
from nearest.index.choice import AUTO, RECALL, resolve_spec
from nearest.index.keys import key_format
from nearest.index.neighbours import checked_metric
from nearest.progress import Progress, no_progress
from nearest.store.change import changing, check_new, new_folder
from nearest.store.claims import Watch, owner_here
from nearest.store.journal import TASKS, Journal, Stage, new_stage
from nearest.store.manifest import (
    MANIFEST,
    ComputedIn,
    FunctionRecord,
    KeysRecord,
    Manifest,
    ModelRecord,
)
from nearest.store.new_segment import segment_tokens
from nearest.store.parts.gates import NewGate, write_gate
from nearest.store.parts.index import IndexChoice

NO_KEYS = "none"
_WITHOUT_KEYS = {"keys", "special_tokens", "segment_tokens", "workers"}
_WITHOUT_KEYS |= {"ray", "device", "allow_mixed", "progress"}
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
    segment_tokens: int | None = None  # of a segment; as many as fit comfortably in RAM
    workers: int | None = None  # processes that share the work; this one alone when None
    ray: str | None = None  # cluster on which workers run: "auto", an address, or "local"
    device: str | None = None  # where workers compute; where the model is when None
    allow_mixed: bool = False  # accept keys of machines that round otherwise
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        checked_metric(self.metric)
        check_batch_size(self.batch_size)
        for name in ("segment_tokens", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        _ = self.index_choice
        if self.keys != NO_KEYS:
            key_format(self.keys)
            return
        for field in fields(self):
            if field.name in _WITHOUT_KEYS or getattr(self, field.name) == field.default:
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
    part: tuple[int, int] = (1, 1),
) -> None:
    """Make a memory of documents in a new folder; without a model, of a tokenizer's tokens alone.

    With `part` (i, n), make every n-th segment from the i-th on, without index and without a
    manifest: `join.join_parts` makes a memory of all n.

    Raises:
        NearestError: the corpus, model, settings or folder cannot be used. What was begun is taken
            away, unless it took more than half a minute or workers share it: the same build then
            goes on from there.
    """
    encoder, keys = _keys_of(model, options)
    manifest = new_manifest(model, tokenizer, keys, special_tokens=options.special_tokens)
    stage = _stage(manifest, model, encoder, options, part)
    rules = rules_of(manifest, model)
    incoming = incoming_documents(documents, rules, path)
    spec = worker_spec(None if encoder is None else model, options)
    with reached(spec, options.ray), new_folder(path):
        journal = Journal.of(path, stage)
        rest = tokenise(journal.rest(incoming), tokenizer, rules)
        write_corpora(journal, rest, options.progress)
        if keys is not None:  # before hours of work, where FAISS is needed and not installed
            entries = max(corpus.entries for corpus in journal.stage.corpora)
            index = resolve_spec(options.index, entries, keys.dim, recall=options.recall)
            check_spec(index, keys.dim, None)
        build = Unfinished(journal, encoder, options.allow_mixed, options.progress)
        finish(build, options, spec)
        if part[1] == 1:
            publish(build)
        else:
            journal.save()


def worker_spec(model: LanguageModel | None, options: BuildOptions) -> WorkerSpec:
    """What workers are told: to load the model as it is here."""
    alone = options.workers is None and options.ray is None
    return WorkerSpec(
        model=None if alone or model is None else loadable_name(model),
        dtype="auto" if model is None else str(model.dtype).removeprefix("torch."),
        device=options.device or ("cpu" if model is None else device_of(model, options.ray)),
        threads=threads_of(options.workers, options.ray),
        gpus=int(model is not None and model.device.type == "cuda"),
        allow_mixed=options.allow_mixed,
    )


def finish(build: Unfinished, options: BuildOptions, spec: WorkerSpec) -> None:
    """Do what is left of a build: in this process, with so many workers, or on a cluster.

    Raises:
        NearestError: keys or index cannot be made, workers end, or there is no such cluster.
    """
    (build.folder / TASKS).mkdir(exist_ok=True)
    begun = machine_begun(build)
    threads = spec.threads if begun is None or begun.device != "cpu" else begun.threads
    if threads != spec.threads:
        warn_caller(
            f"this build goes on with {threads} thread{'s' * (threads > 1)} a process, as it was "
            "begun: keys made with others would differ by rounding (which --allow-mixed accepts)"
        )
        spec = msgspec.structs.replace(spec, threads=threads)
    with crew_of(build.folder, spec, options.workers, options.ray) as crew:
        if crew is None:
            with using_threads(threads):
                work(build, Watch(owner_here()))
        else:
            build.journal.save()  # workers read it
            drive(Followed(build), crew)


def new_manifest(
    model: LanguageModel | None,
    tokenizer: Any,
    keys: KeysRecord | None,
    *,
    special_tokens: bool = False,
) -> Manifest:
    """A first snapshot that has no segment yet, of this model and tokenizer."""
    rules = token_rules(model, tokenizer)
    probe = None
    if keys is not None and model is not None:
        entry = model.get_submodule(keys.module)
        probe = probe_of(model, KeyLayer(keys.layer, keys.module, entry, keys.dim))
    reads_sources = rules.encoder_vocab_size is not None
    record = ModelRecord(
        name=tokenizer_name(tokenizer) if model is None else model_name(model),
        fingerprint=None if model is None else weights_hash(model) or function_hash(model, probe),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer, reads_sources),
        vocab_size=rules.vocab_size,
        start_token=rules.start_token,
        source_vocab_size=rules.encoder_vocab_size,
        function=None if probe is None else FunctionRecord(**asdict(probe)),
        special_tokens=special_tokens,
    )
    return first_manifest(record, keys)


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
    manifest = msgspec.structs.replace(manifest, segment_tokens=options.segment_tokens)
    rules, identifying = rules_of(manifest, model), time.perf_counter() - started
    return plan_build(
        path, documents, tokenizer, rules, manifest, encoder, identifying, options.recall
    )


def _stage(
    manifest: Manifest,
    model: LanguageModel | None,
    encoder: Encoder | None,
    options: BuildOptions,
    part: tuple[int, int],
) -> Stage:
    """What is to be built, before the first document."""
    if not 1 <= part[0] <= part[1]:
        raise SettingError(f"part {part[0]} of {part[1]} does not exist: count from 1")
    return new_stage(
        arguments=_arguments(manifest, model, encoder, options),
        model=manifest.model,
        keys=manifest.keys,
        recall=options.recall,
        nprobe=options.nprobe,
        batch_size=None if encoder is None else encoder.batch_size,
        segment_tokens=options.segment_tokens,
        part=part,
    )


def _arguments(
    manifest: Manifest, model: LanguageModel | None, encoder: Encoder | None, options: BuildOptions
) -> dict[str, Any]:
    """All that decides what a build writes, but for the corpus and which part of it."""
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
        "segment_tokens": segment_tokens(manifest.keys, options.segment_tokens),
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
