"""No setting of a RETRO model is without effect: each changes what it should, in a table of all."""

import pytest
import torch
from torch import Tensor

from nearest.retro import RetroConfig, RetroForCausalLM
from retro_models import LOG_BUCKETS, neighbours, tiny_model, tokens


def same_weights(model: RetroForCausalLM, other: RetroForCausalLM) -> None:
    """Give a model the other's weights wherever they have the same name and shape."""
    own = model.state_dict()
    theirs = {n: w for n, w in other.state_dict().items() if n in own and own[n].shape == w.shape}
    model.load_state_dict(theirs, strict=False)


def logits_of(model: RetroForCausalLM) -> Tensor:
    """Of an input with padding, with and without a mask, with neighbours that are partly empty."""
    input_ids, ids = tokens(2, 14), neighbours(model, 2, 14)
    input_ids[0, 2] = 0
    ids[0, 1], ids[1, 0, 0, 3:] = -1, -1
    mask = torch.ones_like(input_ids)
    mask[0, 2], mask[1, 4:8] = 0, 0
    memory = None
    if model.config.memorizing_layers:
        memory = model(tokens(2, 9, seed=5), memory=model.empty_memory(2)).memory
    answers = [
        model(input_ids, attention_mask=m, neighbour_ids=ids, memory=memory).logits
        for m in (None, mask)
    ]
    return torch.stack(answers)


def training_logits(model: RetroForCausalLM) -> Tensor:
    torch.manual_seed(0)
    return logits_of(model.train())


def loss_of(model: RetroForCausalLM) -> Tensor:
    labels = tokens(2, 14)
    labels[1, 9:] = 0
    return model(tokens(2, 14), labels=labels).loss


def weights_of(model: RetroForCausalLM) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters()}


def generation_of(model: RetroForCausalLM) -> tuple[object, object]:
    return model.generation_config.bos_token_id, model.generation_config.eos_token_id


def first_to_read(model: RetroForCausalLM) -> int:
    """The first position that neighbours change."""
    off, on = model(tokens(1, 14)), model(tokens(1, 14), neighbour_ids=neighbours(model, 1, 14))
    return int((on.logits != off.logits).any(-1)[0].nonzero()[0])


def start_of(model: RetroForCausalLM) -> tuple[float, float]:
    """Of the initial weights: the table's spread, and a gate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = RetroForCausalLM(model.config)
    layer = fresh.layers[0].self_attention.body.memorizing
    return fresh.embed_tokens.weight.std().item(), 0 if layer is None else layer.gate[0].item()


def effect_of_new(model: RetroForCausalLM) -> bool:
    """Whether neighbours change what a new model predicts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = RetroForCausalLM(model.config).eval()
    off, on = fresh(tokens(1, 14)), fresh(tokens(1, 14), neighbour_ids=neighbours(fresh, 1, 14))
    return not torch.equal(on.logits, off.logits)


def caches_of(model: RetroForCausalLM) -> tuple[bool, list[int]]:
    """Whether there is one of keys and values; lengths of a memory."""
    memory = None
    if model.config.memorizing_layers:
        memory = model(tokens(2, 14), memory=model.empty_memory(2)).memory.lengths.tolist()
    return model(tokens(1, 5)).past_key_values is not None, memory


def chunks_of(model: RetroForCausalLM) -> int:
    return neighbours(model, 1, 14).shape[1]


LOG = {"bucket_spacing": "log", **dict.fromkeys(LOG_BUCKETS, 8), "bucket_max_distance": 12}
MEMORIZING = {"memorizing_layers": [0]}
EFFECTS = {  # setting: another value, the preset and settings that it changes, what it changes
    "vocab_size": (60, "norlund", {}, weights_of),
    "pad_token_id": (5, "norlund", {}, logits_of),
    "bos_token_id": (7, "norlund", {}, generation_of),
    "eos_token_id": (7, "norlund", {}, generation_of),
    "chunk_size": (5, "norlund", {}, first_to_read),
    "use_cache": (False, "norlund", {}, caches_of),
    "decoder_dim": (40, "norlund", {}, weights_of),
    "decoder_layers": (4, "norlund", {}, weights_of),
    "decoder_heads": (3, "retro-pytorch", {}, logits_of),
    "decoder_attention_dim": (36, "norlund", {}, weights_of),
    "decoder_ffn_dim": (44, "norlund", {}, weights_of),
    "cca_layers": ([1], "norlund", {}, weights_of),
    "encoder_dim": (24, "norlund", {}, weights_of),
    "encoder_layers": (3, "norlund", {}, weights_of),
    "encoder_heads": (1, "retro-pytorch", {}, logits_of),
    "encoder_attention_dim": (24, "norlund", {}, weights_of),
    "document_start_id": (2, "norlund", {}, lambda model: model.config.document_start_id),  # told
    "encoder_ffn_dim": (32, "norlund", {}, weights_of),
    "encoder_cross_layers": ([1], "norlund", {}, weights_of),
    "memorizing_layers": ([0, 2], "norlund", MEMORIZING, weights_of),
    "memorizing_k": (2, "norlund", MEMORIZING, logits_of),
    "memorizing_capacity": (6, "norlund", MEMORIZING, caches_of),
    "memorizing_initial_gate": (0.9, "norlund", MEMORIZING, start_of),
    "norm": ("layer", "norlund", {}, logits_of),
    "gated_norm": (True, "norlund", {}, weights_of),
    "deepnet": (True, "retro-pytorch", {"norm": "layer"}, logits_of),
    "scale_scores": (True, "norlund", {}, logits_of),
    "feed_forward": ("mlp", "norlund", {}, weights_of),
    "activation": ("gelu", "norlund", {}, logits_of),
    "bias": (True, "norlund", {}, weights_of),
    "positions": ("rotary", "norlund", {}, weights_of),
    "bucket_spacing": ("linear", "norlund", LOG, logits_of),
    "bucket_max_distance": (40, "norlund", LOG, logits_of),
    "decoder_buckets": (9, "norlund", {}, weights_of),
    "cca_bucket_count": (9, "norlund", {}, weights_of),
    "encoder_buckets": (9, "norlund", {}, weights_of),
    "encoder_cross_buckets": (9, "norlund", {}, weights_of),
    "cca_buckets": ("shared", "norlund", {}, logits_of),
    "rotary_dim": (4, "retro-pytorch", {}, logits_of),
    "cca_rotary": ("public", "retro-pytorch", {}, logits_of),
    "absolute_positions": (True, "norlund", {}, weights_of),
    "max_position_embeddings": (70, "retro-pytorch", {}, weights_of),
    "share_embeddings": (True, "norlund", {}, weights_of),
    "embedding_std": (0.5, "norlund", {}, start_of),
    "head_bias": (True, "norlund", {}, weights_of),
    "tie_word_embeddings": (True, "norlund", {}, weights_of),
    "project_encoder_output": (True, "norlund", {}, weights_of),
    "zero_init_retrieval": (True, "norlund", {}, effect_of_new),
    "null_neighbour": (True, "norlund", {}, weights_of),
    "mask_encoder_context": (False, "norlund", {}, logits_of),
    "mask_input_pads": (False, "norlund", {}, logits_of),
    "masked_score": (None, "norlund", {}, logits_of),
    "chunk_count": ("floor", "norlund", {}, chunks_of),
    "shift_labels": (False, "norlund", {}, loss_of),
    "ignore_pad_labels": (True, "norlund", {}, loss_of),
    "attention_dropout": (0.5, "norlund", {}, training_logits),
    "residual_dropout": (0.5, "norlund", {}, training_logits),
    "feed_forward_dropout": (0.5, "norlund", {}, training_logits),
}


def test_every_setting_is_in_the_table():
    of_retrofits = {"encoder"}  # test_retro_retrofit
    assert set(EFFECTS) | of_retrofits == set(RetroConfig.__annotations__)


@pytest.mark.parametrize("name", EFFECTS)
def test_every_setting_has_an_effect(name):
    value, preset, settings, observe = EFFECTS[name]
    quiet = dict.fromkeys(("attention_dropout", "residual_dropout", "feed_forward_dropout"), 0.0)
    model = tiny_model(preset, **{**quiet, **settings})
    changed = tiny_model(preset, **{**quiet, **settings, name: value})
    assert getattr(changed.config, name) != getattr(model.config, name)
    same_weights(changed, model)
    before, after = observe(model), observe(changed)
    if isinstance(before, Tensor):
        assert (before - after).abs().max() > 1e-6
        same_weights(changed, model)
        torch.testing.assert_close(observe(model), before)  # nothing else makes a difference
    else:
        assert before != after
