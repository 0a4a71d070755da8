"""Whether a model is the one whose hidden states a memory holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from nearest.corpus.tokens import TokenRules
from nearest.encode.fingerprint import Probe, departure, tokenizer_fingerprint, weights_hash
from nearest.encode.identity import reads_sources, source_positions
from nearest.encode.layers import KeyLayer, LanguageModel, find_key_layer
from nearest.errors import ModelError, SettingError
from nearest.store.manifest import KeysRecord, Manifest, ModelRecord


@runtime_checkable
class _Opened(Protocol):
    """A memory, or a snapshot of one."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> Manifest: ...


def refuse_attached(model: LanguageModel) -> None:
    """Refuse a model that predicts with a memory already (SettingError)."""
    if hasattr(model.forward, "nearest_session"):
        raise SettingError(
            "this model has a memory attached already: leave its context, or nearest.detach(model)"
        )


def refuse_pickling(protocol: int) -> Any:
    """Refuse to pickle a model that has a memory attached (SettingError)."""
    raise SettingError(
        "a model with a memory attached cannot be pickled: detach it first "
        "(nearest.detach(model)), or use save_pretrained, which saves the model alone"
    )


def rules_of(manifest: Manifest, model: LanguageModel | None) -> TokenRules:
    """How documents are tokenised for a memory, to be read by the model if there is one."""
    record = manifest.model
    return TokenRules(
        record.start_token,
        record.vocab_size,
        record.source_vocab_size,
        None if model is None else source_positions(model),
        record.special_tokens,
    )


def check_tokenizer(memory: _Opened, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives other tokens than a memory's (ModelError)."""
    record = memory.manifest.model
    if record.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer, record.reads_sources):
        raise ModelError(
            f"this tokenizer differs from the one that built {memory.path}, so a token id does not "
            f"mean the same text. Load {_named(record)}, build a memory with this one, or force it "
            "(--force) and risk wrong words"
        )


def common_key_layer(
    memories: Sequence[_Opened], model: LanguageModel, tokenizer: Any = None, *, force: bool = False
) -> KeyLayer:
    """The layer of `model` whose hidden states can be looked up in all of the memories.

    Raises:
        ModelError: the model does not fit one of them, or their keys are of different layers.
    """
    layers = [matching_key_layer(memory, model, tokenizer, force=force) for memory in memories]
    keyed = [
        (memory, layer)
        for memory, layer in zip(memories, layers, strict=True)
        if memory.manifest.keys is not None
    ]
    for memory, layer in keyed[1:]:
        first, needed = keyed[0]
        if layer.path != needed.path:
            raise ModelError(
                f"the keys of {first.path} are of {needed.path!r}, those of {memory.path} of "
                f"{layer.path!r}: build one of them anew with the other's --key-layer"
            )
    return keyed[0][1] if keyed else layers[0]


def matching_key_layer(
    memory: _Opened, model: LanguageModel, tokenizer: Any = None, *, force: bool = False
) -> KeyLayer:
    """The layer of `model` whose hidden states can be looked up in `memory`.

    A memory without keys fits any model that has its tokenizer; the layer is then the last.

    Args:
        memory: the memory to look up.
        model: the model that built it.
        tokenizer: checked too where given.
        force: accept other weights or another tokenizer of the same dimensions, at the risk of
            neighbours that mean nothing.

    Raises:
        ModelError: weights, tokenizer or key layer differ from those that built the memory.
    """
    record, keys = memory.manifest.model, memory.manifest.keys
    kinds = {True: "an encoder–decoder", False: "a causal language model"}
    if reads_sources(model) != record.reads_sources:
        raise ModelError(
            f"this model is {kinds[reads_sources(model)]} and {memory.path} is a memory of "
            f"{kinds[record.reads_sources]}. Load {_named(record)}, or build a memory with this one"
        )
    layer = find_key_layer(model, "last_hidden" if keys is None else keys.layer)
    if keys is not None and layer.dim != keys.dim:
        raise ModelError(
            f"the keys of {memory.path} have {keys.dim} dims but this model gives {layer.dim}: "
            f"load {_named(record)}, or build a memory with this one"
        )
    if force:
        return layer
    if keys is not None and (reason := _departure(record, keys, model, layer)) is not None:
        raise ModelError(
            f"this model is not the one that built {memory.path}: {reason}, so its states and the "
            f"stored keys cannot be compared. Load {_named(record)}, build a memory with this one, "
            "or force it (--force) and risk meaningless neighbours"
        )
    if tokenizer is not None:
        check_tokenizer(memory, tokenizer)
    return layer


def _named(record: ModelRecord) -> str:
    """The model that built a memory, as messages name it; one from memory has no name."""
    return repr(record.name) if record.name else "the model that built it"


def _departure(
    record: ModelRecord, keys: KeysRecord, model: LanguageModel, layer: KeyLayer
) -> str | None:
    """How a model departs from the one that made a memory's keys; None if it computes the same."""
    moved = None
    if layer.path != keys.module:
        moved = f"its key layer {keys.layer} is {layer.path!r} and was {keys.module!r}"
    if record.function is not None:
        probe = Probe(**msgspec.structs.asdict(record.function))
        reason = departure(model, layer, record.fingerprint or "", keys.module, probe)
        return f"{moved}, and {reason}" if moved and reason else reason
    weights = weights_hash(model)
    if weights is None:
        return (
            "the memory knows it by a hash of its weights, and these are offloaded or quantised "
            "here and cannot be hashed"
        )
    if weights != record.fingerprint:
        return "its weights, or their precision, differ"
    return moved
