"""A public checkpoint's file, and its `retro.json`, into a folder of this package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nearest.errors import FolderError, ModelError, SettingError
from nearest.retro.convert.checkpoint import read_checkpoint
from nearest.retro.convert.norlund import from_norlund
from nearest.retro.convert.retro_pytorch import from_retro_pytorch
from nearest.retro.model import RetroForCausalLM

Family = Literal["norlund", "retro-pytorch"]

_NAMES = {
    "num_embeddings": "vocab_size",
    "pad_token_idx": "pad_token_id",
    "chunk_size": "chunk_size",
    "enc_hidden_dim": "encoder_dim",
    "enc_num_layers": "encoder_layers",
    "enc_ffn_dim": "encoder_ffn_dim",
    "enc_num_heads": "encoder_heads",
    "enc_qkv_dim": "encoder_attention_dim",
    "enc_ca_layers": "encoder_cross_layers",
    "enc_sa_pos_bias_num_buckets": "encoder_buckets",
    "enc_ca_pos_bias_num_buckets": "encoder_cross_buckets",
    "dec_hidden_dim": "decoder_dim",
    "dec_num_layers": "decoder_layers",
    "dec_ffn_dim": "decoder_ffn_dim",
    "dec_num_heads": "decoder_heads",
    "dec_qkv_dim": "decoder_attention_dim",
    "dec_cca_layers": "cca_layers",
    "dec_sa_pos_bias_num_buckets": "decoder_buckets",
    "dec_cca_pos_bias_num_buckets": "cca_bucket_count",
}
_DROPOUTS = ("attention_dropout", "residual_dropout", "feed_forward_dropout")


def read_retro_json(path: Path | str) -> dict[str, Any]:
    """Settings of `RetroConfig` from the norlund code's `retro.json`.

    Raises:
        FolderError: it cannot be read.
        SettingError: it has a setting that the norlund code does not know.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read as JSON ({error}): give a retro.json") from error
    if not isinstance(content, dict):
        raise SettingError(f"{path} is no retro.json: it should be an object of settings")
    settings: dict[str, Any] = {}
    for name, value in content.items():
        if name == "dropout_p":
            settings |= dict.fromkeys(_DROPOUTS, value)
        elif name in _NAMES:
            settings[_NAMES[name]] = value
        else:
            raise SettingError(f"{path} has the setting {name!r}, which no retro.json has")
    return settings


def family_of(state: Mapping[str, Tensor]) -> Family:
    """Which implementation names its weights so (ModelError where neither does)."""
    if any(name.startswith("base.dec") for name in state):
        return "norlund"
    if "token_emb.weight" in state or any(name.startswith("to_logits.") for name in state):
        return "retro-pytorch"
    raise ModelError(
        "these weights are of neither public implementation: their names begin with "
        f"{sorted({name.split('.')[0] for name in state})[:5]}"
    )


def model_of(checkpoint: Path | str, settings: Mapping[str, Any] | None = None) -> RetroForCausalLM:
    """The model of a public checkpoint, of either family.

    Args:
        checkpoint: a `.safetensors` file, a state dict, or a Lightning `.ckpt`.
        settings: of `RetroConfig`, such as `read_retro_json` gives; must agree with the weights.

    Raises:
        ModelError: keys are missing or surplus (all are named), or shapes do not fit.
        SettingError: settings differ from what the weights say.
    """
    state = read_checkpoint(checkpoint)
    load = from_norlund if family_of(state) == "norlund" else from_retro_pytorch
    return load(state, **dict(settings or {}))
