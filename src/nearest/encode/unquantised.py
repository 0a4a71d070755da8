"""A model of a GGUF file as a folder: whole weights, which load in a second and can be shared."""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import FolderError
from nearest.folder import disk_errors_explained


def save_unquantised(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a .gguf file as a Hugging Face folder, in float32.

    Reading a GGUF file dequantises it each time, in half a minute for 135M weights, and
    transformers does not save a model that was read from one.

    Args:
        gguf: the file.
        folder: to write; it must not exist.

    Raises:
        ModelError: the file cannot be read.
        FolderError: the folder exists, or cannot be written.
    """
    if folder.exists():
        raise FolderError(f"{folder} exists: give a folder that does not, or remove it")
    quantised, tokenizer = load_model_and_tokenizer(str(gguf), "float32", "cpu")
    config = copy.deepcopy(quantised.config)
    for of_the_file in ("quantization_config", "gguf_file", "_name_or_path"):
        vars(config).pop(of_the_file, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.generation_config = quantised.generation_config
    partial = folder.with_name(f"{folder.name}.partial")
    with disk_errors_explained(folder):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
