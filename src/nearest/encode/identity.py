"""Which model and tokenizer a memory belongs to: fingerprints that travel in its manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from nearest.corpus.tokens import TokenRules
from nearest.encode.dtype import DtypeName, chosen_device, chosen_dtype
from nearest.errors import ModelError

AnyModel = nn.Module  # a Hugging Face model, or what PEFT or torch.compile has made of one
_SAMPLES_PER_TENSOR = 65_536
_AS_SAVED = "_nearest_fingerprint"  # on a model whose weights have been rounded since
# Scripts, digits, spaces and code: tokenizers with one vocabulary but other rules differ here.
_PROBE = "The 3rd  naïve café’s\n\tdef f(x_1):  return x**2  # § 1-204.06 — Ω 中文 🙂"


def bare_model(model: AnyModel) -> PreTrainedModel:
    """The Hugging Face model inside what torch.compile or PEFT has made of it.

    Adapters that stand in its layers, such as LoRA's, stay in use: both wrappers call its own
    `forward` and `generate`, which is what is measured and replaced.

    Raises:
        ModelError: an adapter stands before the model, where it cannot be called without it.
    """
    inner: Any = model
    while True:
        if (compiled := getattr(inner, "_orig_mod", None)) is not None:
            inner = compiled
        elif hasattr(inner, "get_base_model"):
            config = getattr(inner, "active_peft_config", None)
            if getattr(config, "is_prompt_learning", False):
                raise ModelError(
                    f"the adapter {type(config).__name__} puts learned tokens before the text, "
                    "which no key or position counts on: use one that stands in the model's "
                    "layers, such as LoRA, or the base model (get_base_model())"
                )
            inner = inner.get_base_model()
        else:
            bare: PreTrainedModel = inner
            return bare


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hex hash of every parameter's name and shape, and of up to 65,536 values of each.

    The same weights give the same hash in any dtype that holds them exactly and on any device, and
    in any at all if they were rounded while they were loaded (`load_model_and_tokenizer`); reading
    all of a large model's weights would make every attach slow.
    """
    if (as_saved := getattr(model, _AS_SAVED, None)) is not None:
        return str(as_saved)
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        step = max(1, -(-flat.numel() // _SAMPLES_PER_TENSOR))
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(flat[::step].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any, sources: bool = False) -> str:
    """Hex hash of a tokenizer's vocabulary and of what it makes of a probe text.

    With `sources`, also of what it makes of the probe as a source and as a target: languages that
    were chosen show there.
    """
    probes = [tokenizer(_PROBE, add_special_tokens=False)["input_ids"]]
    if sources:
        probes += [tokenizer(_PROBE)["input_ids"], tokenizer(text_target=_PROBE)["input_ids"]]
    seen = [sorted(tokenizer.get_vocab().items()), *probes]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def reads_sources(model: PreTrainedModel) -> bool:
    """Whether it is an encoder–decoder, whose encoder reads a source before text is written."""
    return bool(model.config.is_encoder_decoder)


def token_rules(model: PreTrainedModel, tokenizer: Any) -> TokenRules:
    """How documents become what a model reads.

    Raises:
        ModelError: nothing says what texts start with.
    """
    if not reads_sources(model):
        return TokenRules(start_token(tokenizer), vocabulary_size(model))
    encoder_size = int(_encoder_config(model).vocab_size)
    return TokenRules(
        _decoder_start(model), vocabulary_size(model), encoder_size, source_positions(model)
    )


def start_token(tokenizer: Any) -> int:
    """The token each document starts with: BOS, or EOS where there is none."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError(
        "the tokenizer has neither a BOS nor an EOS token to start documents with: "
        "set tokenizer.bos_token"
    )


def _decoder_start(model: PreTrainedModel) -> int:
    """What a decoder begins with, in training as in `generate`."""
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ModelError(
        f"{type(model).__name__} does not say what its decoder starts with: set "
        "model.generation_config.decoder_start_token_id"
    )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids the model predicts and goes on from."""
    config = model.config.get_text_config()
    return int(getattr(config, "decoder_vocab_size", None) or config.vocab_size)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest text the model was made for, None where its configuration does not say."""
    return _positions(model.config.get_text_config(), "max_decoder_position_embeddings")


def source_positions(model: PreTrainedModel) -> int | None:
    """The longest source its encoder was made for; None without limit, or without encoder."""
    if not reads_sources(model):
        return None
    return _positions(_encoder_config(model), "max_encoder_position_embeddings")


def _encoder_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "encoder", model.config).get_text_config()


def _positions(config: Any, own_name: str) -> int | None:
    """Of one side of an encoder–decoder that counts them apart, else of the whole model."""
    for name in (own_name, "max_position_embeddings"):
        if (positions := getattr(config, name, None)) is not None:
            return int(positions)
    return None


def model_name(model: PreTrainedModel) -> str:
    """The hub name a model was loaded by, or its folder's absolute path."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def load_model_and_tokenizer(
    name: str, dtype: DtypeName = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load a language model, causal or encoder–decoder, and its tokenizer: a folder or hub name.

    Args:
        name: of the folder, or on the hub.
        dtype: what it is to compute in (`chosen_dtype`).
        device: where (`chosen_device`).

    Raises:
        ModelError: it cannot be found or read, with the library's own reason.
        SettingError: there is no such device.
    """
    place = chosen_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = _class_of(name).from_pretrained(name, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers, safetensors, tokenizers: each raises its own kinds
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"model {name!r} cannot be loaded ({reason}): give a folder with a Hugging Face "
            "language model, causal or encoder–decoder, or the name of one on the hub"
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"model {name!r} cannot be used: its files hold no weights for {missing[0]} "
            f"({len(missing)} in all), which would be random: give a folder with a whole language "
            "model"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(
            f"model {name!r} has no tokenizer: give a folder that holds one (tokenizer.json)"
        )
    wanted = chosen_dtype(dtype, model.dtype, place.type)
    if wanted != model.dtype and wanted != torch.float32:  # weights are rounded
        setattr(model, _AS_SAVED, model_fingerprint(model))
    return model.to(place, wanted).eval(), tokenizer


def _class_of(name: str) -> Any:
    """What loads a model; what cannot be read is left to that to explain, or is an adapter."""
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:
        return AutoModelForCausalLM
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
