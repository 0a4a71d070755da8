"""Weights of TobiasNorlund/retro (arXiv:2302.12128), both ways."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

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

_ATTENTION = "multi_head_attention"
_BIAS = f"{_ATTENTION}.positional_bias.relative_attention_bias.weight"


def from_norlund(
    state: Mapping[str, Tensor], vocab_size: int | None = None, **settings: Any
) -> RetroForCausalLM:
    """A model with the weights of a state dict, as `read_checkpoint` gives it.

    Args:
        state: every weight by its public name.
        vocab_size: refuse a checkpoint of another vocabulary.
        **settings: what weights do not tell, as in `RetroConfig`: chunk_size, pad_token_id, the
            dropouts, memorizing_layers; by default those of the published model.

    Raises:
        ModelError: keys are missing or left over, or shapes do not fit.
        SettingError: settings that the weights do not fit.
    """
    config = RetroConfig.preset("norlund", **{**_settings(state), **settings})
    check_vocabulary(config, vocab_size)
    shared = {"base.encoder.enc_embs.weight"} if config.share_embeddings else set()
    return load(state, config, _rules(config), shared)


def to_norlund(model: RetroForCausalLM) -> dict[str, Tensor]:
    """The state dict that the public code loads.

    Raises:
        SettingError: the model has a setting that the public code does not know.
    """
    check_family(
        model.config,
        RetroConfig.preset("norlund"),
        {"share_embeddings", "tie_word_embeddings", "use_cache"},
    )
    state = save(model, _rules(model.config))
    if model.config.share_embeddings:
        state["base.encoder.enc_embs.weight"] = state["base.dec_embs.weight"].clone()
    return state


def _settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes and layers, read off shapes and names."""
    vocabulary, dim = shape_of(state, "base.dec_embs.weight")
    first = "base.decoder.0"
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "decoder_dim": dim,
        "decoder_layers": len(layers_of(state, r"base\.decoder\.(\d+)\.")),
        "decoder_attention_dim": shape_of(state, f"{first}.0.qkv_proj.weight")[0] // 3,
        "decoder_ffn_dim": shape_of(state, f"{first}.2.wi_0.weight")[0],
        "cca_layers": layers_of(state, r"base\.decoder\.(\d+)\.1\."),
        "tie_word_embeddings": _equal(state, "lm_head.weight", "base.dec_embs.weight"),
    }
    settings["decoder_buckets"], settings["decoder_heads"] = shape_of(state, f"{first}.0.{_BIAS}")
    if not settings["cca_layers"]:
        return settings
    cca = f"base.decoder.{settings['cca_layers'][0]}.1"
    first = "base.encoder.layers.0"
    settings |= {
        "cca_bucket_count": shape_of(state, f"{cca}.{_BIAS}")[0],
        "encoder_dim": shape_of(state, f"{first}.0.ln.scale")[0],
        "encoder_layers": len(layers_of(state, r"base\.encoder\.layers\.(\d+)\.")),
        "encoder_attention_dim": shape_of(state, f"{first}.0.qkv_proj.weight")[0] // 3,
        "encoder_ffn_dim": shape_of(state, f"{first}.2.wi_0.weight")[0],
        "encoder_cross_layers": layers_of(state, r"base\.encoder\.layers\.(\d+)\.1\."),
        "share_embeddings": _equal(state, "base.encoder.enc_embs.weight", "base.dec_embs.weight"),
    }
    settings["encoder_buckets"], settings["encoder_heads"] = shape_of(state, f"{first}.0.{_BIAS}")
    if settings["encoder_cross_layers"]:
        cross = f"base.encoder.layers.{settings['encoder_cross_layers'][0]}.1"
        settings["encoder_cross_buckets"] = shape_of(state, f"{cross}.{_BIAS}")[0]
    return settings


def _equal(state: Mapping[str, Tensor], one: str, other: str) -> bool:
    return one in state and torch.equal(state[one], state[other])


def _rules(config: RetroConfig) -> Iterator[Rule]:
    yield same("embed_tokens.weight", "base.dec_embs.weight")
    yield same("norm.weight", "base.final_layer_norm.scale")
    yield same("lm_head.weight", "lm_head.weight")
    for i in range(config.decoder_layers):
        yield from _layer(
            f"layers.{i}", f"base.decoder.{i}", "chunked_cross_attention", i in config.cca_layers
        )
    if not config.cca_layers:
        return
    if not config.share_embeddings:
        yield same("embed_neighbours.weight", "base.encoder.enc_embs.weight")
    for i in range(config.encoder_layers):
        yield from _layer(
            f"encoder.layers.{i}",
            f"base.encoder.layers.{i}",
            "context_attention",
            i in config.encoder_cross_layers,
        )


def _layer(ours: str, theirs: str, cross: str, has_cross: bool) -> Iterator[Rule]:
    mine = f"{ours}.self_attention"
    yield Rule(
        (f"{mine}.body.q.weight", f"{mine}.body.kv.weight"), (f"{theirs}.0.qkv_proj.weight",)
    )
    yield from _attention(mine, f"{theirs}.0")
    if has_cross:
        mine = f"{ours}.{cross}"
        yield same(f"{mine}.body.q.weight", f"{theirs}.1.q_proj.weight")
        yield same(f"{mine}.body.kv.weight", f"{theirs}.1.kv_proj.weight")
        yield from _attention(mine, f"{theirs}.1")
    mine = f"{ours}.feed_forward"
    yield same(f"{mine}.norm.weight", f"{theirs}.2.layer_norm.scale")
    yield Rule((f"{mine}.body.up.weight",), (f"{theirs}.2.wi_0.weight", f"{theirs}.2.wi_1.weight"))
    yield same(f"{mine}.body.down.weight", f"{theirs}.2.wo.weight")


def _attention(ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}.norm.weight", f"{theirs}.ln.scale")
    yield same(f"{ours}.body.out.weight", f"{theirs}.{_ATTENTION}.final_proj.weight")
    yield same(f"{ours}.body.bias.weight", f"{theirs}.{_BIAS}")
