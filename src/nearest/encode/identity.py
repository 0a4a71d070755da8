"""What a model is: its sizes, its positions, what its texts start with, what wraps it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nearest.corpus.tokens import TokenRules
from nearest.errors import ModelError

AnyModel = nn.Module  # a Hugging Face model, or what PEFT or torch.compile has made of one


def bare_model(model: AnyModel) -> PreTrainedModel:
    """The Hugging Face model inside what torch.compile or PEFT has made of it.

    Adapters that stand in its layers, such as LoRA's, stay in use: both wrappers call its own
    `forward` and `generate`, which is what is measured and replaced.

    Raises:
        ModelError: it is no such model, or an adapter stands before the model, where it cannot be
            called without it.
    """
    inner: Any = model
    while True:
        if (compiled := getattr(inner, "_orig_mod", None)) is not None:
            inner = compiled
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            config = getattr(inner, "active_peft_config", None)
            if getattr(config, "is_prompt_learning", False):
                raise ModelError(
                    f"the adapter {type(config).__name__} puts learned tokens before the text, "
                    "which no key or position counts on: use one that stands in the model's "
                    "layers, such as LoRA, or the base model (get_base_model())"
                )
            inner = inner.get_base_model()
        elif isinstance(inner, PreTrainedModel):
            return inner
        else:
            raise ModelError(
                f"a Hugging Face language model is needed, and this is a {type(inner).__name__}: "
                "load one (AutoModelForCausalLM.from_pretrained)"
            )


def reads_sources(model: PreTrainedModel) -> bool:
    """Whether it is an encoder–decoder, whose encoder reads a text before text is written."""
    return bool(model.config.is_encoder_decoder)


def token_rules(
    model: PreTrainedModel | None, tokenizer: Any, *, special_tokens: bool = False
) -> TokenRules:
    """How documents become what a model reads; without a model, what a tokenizer gives.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        special_tokens: whether texts that mention special tokens hold them.

    Raises:
        ModelError: nothing says what texts start with.
    """
    if model is None or not reads_sources(model):
        size = max(tokenizer.get_vocab().values()) + 1 if model is None else vocabulary_size(model)
        return TokenRules(start_token(tokenizer), size, special_tokens=special_tokens)
    return TokenRules(
        _decoder_start(model),
        vocabulary_size(model),
        encoder_vocabulary_size(model),
        source_positions(model),
        special_tokens,
    )


def start_token(tokenizer: Any) -> int:
    """The token each document starts with: BOS, or EOS or [CLS] where there is none."""
    if not hasattr(tokenizer, "bos_token_id"):
        raise ModelError(
            f"a tokenizer is needed, and this is a {type(tokenizer).__name__}: load the model's "
            "(AutoTokenizer.from_pretrained)"
        )
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
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


def encoder_vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids that the encoder of an encoder–decoder reads."""
    return int(_encoder_config(model).vocab_size)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids are to be; offloaded weights are moved to where they are needed."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest text the model was made for, None where its configuration does not say."""
    return _positions(model.config.get_text_config(), "max_decoder_position_embeddings")


def source_positions(model: PreTrainedModel) -> int | None:
    """The longest text its encoder was made for; None without limit, or without encoder."""
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
    """The hub name a model was loaded by, or the absolute path of its folder or GGUF file."""
    return _where(str(model.config._name_or_path))


def tokenizer_name(tokenizer: Any) -> str:
    """As `model_name`, of a tokenizer."""
    return _where(str(getattr(tokenizer, "name_or_path", "")))


def _where(name: str) -> str:
    here = Path(name).is_dir() or (name.endswith(".gguf") and Path(name).is_file())
    return str(Path(name).resolve()) if name and here else name
