"""Weights of lucidrains/RETRO-pytorch, both ways."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nearest.errors import SettingError
from nearest.retro.config import RetroConfig
from nearest.retro.convert.rules import (
    Rule,
    check_family,
    check_vocabulary,
    layers_of,
    load,
    same,
    save,
    shape_of,
)
from nearest.retro.model import RetroForCausalLM

_HEADS = 8  # whatever its argument says
_ROTARY = tuple(f"{side}.rotary_pos_emb.inv_freq" for side in ("encoder", "decoder"))


def from_retro_pytorch(
    state: Mapping[str, Tensor], vocab_size: int | None = None, **settings: Any
) -> RetroForCausalLM:
    """A model with the weights of a state dict, as `read_checkpoint` gives it.

    Its chunked cross-attention keeps the rotations that the weights were trained with
    (`cca_rotary="public"`).

    Args:
        state: every weight by its public name.
        vocab_size: refuse a checkpoint of another vocabulary.
        **settings: what weights do not tell, as in `RetroConfig`: chunk_size, pad_token_id, the
            dropouts, memorizing_layers; by default those of the public code.

    Raises:
        ModelError: keys are missing or left over, or shapes do not fit.
        SettingError: settings that the weights do not fit.
    """
    config = RetroConfig.preset("retro-pytorch", **{**_settings(state), **settings})
    check_vocabulary(config, vocab_size)
    return load(state, config, _rules(config), set(_ROTARY))


def to_retro_pytorch(model: RetroForCausalLM) -> dict[str, Tensor]:
    """The state dict that the public code loads.

    Raises:
        SettingError: the model has a setting that the public code does not know.
    """
    free = {"norm", "gated_norm", "deepnet", "use_cache"}
    family = "retro-pytorch"
    check_family(model.config, RetroConfig.preset(family, cca_rotary="public"), free)
    _check_sizes(model.config)
    dim = model.config.rotary_dim
    frequencies = 1.0 / 10_000 ** (torch.arange(0, dim, 2).float() / dim)
    state = save(model, _rules(model.config))
    return state | {name: frequencies.clone() for name in _ROTARY}


def _check_sizes(config: RetroConfig) -> None:
    """Refuse sizes that the public code computes otherwise (SettingError)."""
    head_dim = config.decoder_head_dim
    for name, needed in (
        ("decoder_heads", _HEADS),
        ("encoder_heads", _HEADS),
        ("encoder_attention_dim", config.decoder_attention_dim),
        ("decoder_ffn_dim", 4 * config.decoder_dim),
        ("encoder_ffn_dim", 4 * config.encoder_dim),
        ("rotary_dim", min(32, head_dim)),
    ):
        if getattr(config, name) != needed:
            raise SettingError(
                f"{name} is {getattr(config, name)}, but the public code would make it {needed}: "
                "this model cannot be written in its format"
            )


def _settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes, layers and norms, read off shapes and names."""
    vocabulary, encoder_dim = shape_of(state, "token_emb.weight")
    first = "decoder.layers.0"
    norm = "layer" if f"{first}.0.norm.bias" in state else "rms_clamped"
    return {
        "vocab_size": vocabulary,
        "encoder_dim": encoder_dim,
        "decoder_dim": shape_of(state, "to_logits.weight")[1],
        "max_position_embeddings": shape_of(state, "pos_emb.weight")[0],
        "decoder_layers": len(layers_of(state, r"decoder\.layers\.(\d+)\.")),
        "encoder_layers": len(layers_of(state, r"encoder\.layers\.(\d+)\.")),
        "decoder_heads": _HEADS,
        "encoder_heads": _HEADS,
        "decoder_attention_dim": shape_of(state, f"{first}.0.fn.to_q.weight")[0],
        "encoder_attention_dim": shape_of(state, "encoder.layers.0.0.fn.to_q.weight")[0],
        "decoder_ffn_dim": shape_of(state, f"{first}.2.fn.ff.0.weight")[0],
        "encoder_ffn_dim": shape_of(state, "encoder.layers.0.2.fn.ff.0.weight")[0],
        "cca_layers": layers_of(state, r"decoder\.layers\.(\d+)\.1\."),
        "encoder_cross_layers": layers_of(state, r"encoder\.layers\.(\d+)\.1\."),
        "rotary_dim": 2 * shape_of(state, _ROTARY[0])[0],
        "cca_rotary": "public",
        "norm": norm,
        "gated_norm": norm != "layer" and f"{first}.0.norm.weight" in state,
        "deepnet": not any(".norm_out." in name for name in state),
    }


def _rules(config: RetroConfig) -> Iterator[Rule]:
    yield same("embed_tokens.weight", "token_emb.weight")
    yield same("embed_positions.weight", "pos_emb.weight")
    yield from _linear("lm_head", "to_logits")
    yield from _linear("encoder.project", "encoder.project_out")
    if config.input_dim != config.decoder_dim:
        yield from _linear("embed_project", "to_decoder_model_dim")
    if not config.deepnet:
        yield from _norm(config, "norm", "decoder.norm_out")
        yield from _norm(config, "encoder.norm", "encoder.norm_out")
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}", f"decoder.layers.{i}"
        yield from _layer(config, ours, theirs)
        if i in config.cca_layers:
            mine, cross = f"{ours}.chunked_cross_attention", f"{theirs}.1.fn.cross_attn"
            yield from _attention(f"{mine}.body", cross)
            yield Rule((f"{mine}.body.null",), (f"{cross}.null_k", f"{cross}.null_v"))
            yield from _norm(config, f"{mine}.norm", f"{theirs}.1.norm")
    for i in range(config.encoder_layers):
        ours, theirs = f"encoder.layers.{i}", f"encoder.layers.{i}"
        yield from _layer(config, ours, theirs)
        if i in config.encoder_cross_layers:
            yield from _attention(f"{ours}.context_attention.body", f"{theirs}.1.fn")
            yield from _norm(config, f"{ours}.context_attention.norm", f"{theirs}.1.norm")


def _layer(config: RetroConfig, ours: str, theirs: str) -> Iterator[Rule]:
    yield from _attention(f"{ours}.self_attention.body", f"{theirs}.0.fn")
    yield from _norm(config, f"{ours}.self_attention.norm", f"{theirs}.0.norm")
    yield from _linear(f"{ours}.feed_forward.body.up", f"{theirs}.2.fn.ff.0")
    yield from _linear(f"{ours}.feed_forward.body.down", f"{theirs}.2.fn.ff.3")
    yield from _norm(config, f"{ours}.feed_forward.norm", f"{theirs}.2.norm")


def _attention(ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}.q.weight", f"{theirs}.to_q.weight")
    yield Rule((f"{ours}.kv.weight",), (f"{theirs}.to_k.weight", f"{theirs}.to_v.weight"))
    yield from _linear(f"{ours}.out", f"{theirs}.to_out")


def _linear(ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}.weight", f"{theirs}.weight")
    yield same(f"{ours}.bias", f"{theirs}.bias")


def _norm(config: RetroConfig, ours: str, theirs: str) -> Iterator[Rule]:
    if config.norm == "layer":
        yield from _linear(ours, theirs)
        return
    yield same(f"{ours}.weight", f"{theirs}.gamma")
    if config.gated_norm:
        yield same(f"{ours}.gate", f"{theirs}.weight")
