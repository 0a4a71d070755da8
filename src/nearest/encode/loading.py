"""Load a model and its tokenizer by name: a folder, a GGUF file, or a name on the hub."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from nearest.encode.dtype import DtypeName, chosen_device, chosen_dtype
from nearest.encode.fingerprint import weights_kept_known
from nearest.errors import ModelError, NearestError, require


def load_model_and_tokenizer(
    name: str, dtype: DtypeName = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load a language model, causal or encoder–decoder, and its tokenizer.

    Args:
        name: a folder, a .gguf file, or a name on the hub; an adapter is loaded with its base.
        dtype: what it is to compute in (`chosen_dtype`); quantised weights stay as they are.
        device: where (`chosen_device`).

    Raises:
        ModelError: it cannot be found or read, with the library's own reason.
        SettingError: there is no such device.
    """
    place = chosen_device(device)
    try:
        where, options = _source(name)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        loader, more = _loader(where, options, place)
        loaded: Any = loader.from_pretrained(
            where, dtype="auto", output_loading_info=True, **options, **more
        )
    except NearestError:
        raise
    except Exception as error:  # transformers, safetensors, tokenizers: each raises its own kinds
        raise ModelError(
            f"model {name!r} cannot be loaded ({_reason(error)}): give a folder with a Hugging "
            "Face language model, causal or encoder–decoder, a .gguf file, or the name of a model "
            "on the hub"
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"model {name!r} cannot be used: its files hold no weights for {missing[0]} "
            f"({len(missing)} in all), which would be random: give a folder with a whole language "
            "model"
        )
    _check_tokenizer(tokenizer, name)
    if options:
        model.config._name_or_path = name
    if more:  # quantised: it stands where it is to be, and cannot be cast
        return model.eval(), tokenizer
    wanted = chosen_dtype(dtype, model.dtype, place.type)
    rounds = wanted not in (model.dtype, torch.float32)
    with weights_kept_known(model) if rounds else nullcontext():
        try:
            model.to(place, wanted)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"model {name!r} does not fit in the memory of {place}: use --device cpu, or a "
                "shorter --dtype, such as bfloat16 (in Python device and dtype)"
            ) from error
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer by folder or hub name, without a model.

    Raises:
        ModelError: there is none, or it has no words.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers and tokenizers: each raises its own kinds
        raise ModelError(
            f"no tokenizer can be loaded from {name!r} ({_reason(error)}): give a folder, or a "
            "name on the hub"
        ) from error
    _check_tokenizer(tokenizer, name)
    return tokenizer


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(
            f"{name!r} has no tokenizer: give a folder that holds one (tokenizer.json)"
        )


def _reason(error: Exception) -> str:
    """The first line of a message, or the kind of an error that has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is given: a GGUF file is its folder and an option."""
    path = Path(name)
    if path.suffix != ".gguf":
        return name, {}
    require("gguf", "gguf")
    if not path.is_file():
        raise ModelError(f"model {name!r} does not exist: give the path of a .gguf file")
    return str(path.parent), {"gguf_file": path.name}


def _loader(where: str, options: dict[str, str], place: torch.device) -> tuple[Any, dict[str, Any]]:
    """The class that loads a model, and what quantised weights need besides."""
    adapter = find_adapter_config_file(where)
    if adapter is not None:
        base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        return _loader(base, {}, place)
    config = AutoConfig.from_pretrained(where, **options)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    quantised = getattr(config, "quantization_config", None) is not None and not options
    return loader, {"device_map": {"": place}} if quantised else {}
