"""Weights of a checkpoint, into a model that is there already."""

from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedModel

from nearest.errors import FolderError
from nearest.retro.retrofit import ADAPTER_WEIGHTS, RetrofitForCausalLM


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of a checkpoint's folder.

    Raises:
        FolderError: they are missing, damaged, or of a model of other layers or sizes.
    """
    fitted = isinstance(model, RetrofitForCausalLM)
    target: torch.nn.Module = model.adapter if isinstance(model, RetrofitForCausalLM) else model
    files = [folder / ADAPTER_WEIGHTS] if fitted else sorted(folder.glob("model*.safetensors"))
    try:
        state = {n: w for file in files for n, w in safetensors.torch.load_file(file).items()}
        loaded = target.load_state_dict(state, strict=False)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise FolderError(
            f"{folder} does not hold weights of this model ({str(error).splitlines()[-1].strip()}):"
            " take the checkpoint and the model from one run"
        ) from error
    tied = set() if fitted else set(model.all_tied_weights_keys)
    wrong = sorted((set(loaded.missing_keys) - tied) | set(loaded.unexpected_keys))
    if wrong:
        raise FolderError(
            f"{folder} does not hold the weights of this model ({wrong[0]} and {len(wrong) - 1} "
            "others are missing or not the model's): take the checkpoint and the model from one run"
        )
