"""Small RETRO models whose every weight matters, and inputs for them."""

import math
from typing import Any

import torch
from torch import Tensor

from nearest.retro import RetroConfig, RetroForCausalLM

VOCAB, CHUNK = 50, 4
PRESETS = ("norlund", "retro-pytorch", "paper")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "deepnet": ("retro-pytorch", {"deepnet": True, "norm": "layer"}),
    "public-rotations": ("retro-pytorch", {"cca_rotary": "public", "gated_norm": True}),
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "chunk_size": CHUNK,
    "decoder_dim": 32,
    "decoder_layers": 3,
    "decoder_heads": 2,
    "decoder_attention_dim": 24,
    "decoder_ffn_dim": 40,
    "cca_layers": [1, 2],
    "encoder_dim": 20,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "encoder_attention_dim": 16,
    "encoder_ffn_dim": 28,
    "encoder_cross_layers": [0, 1],
    "rotary_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "bucket_max_distance": 40,
}

LOG_BUCKETS = {
    "decoder_buckets": 32,
    "cca_bucket_count": 32,
    "encoder_buckets": 32,
    "encoder_cross_buckets": 32,
}


def tiny_config(preset: str = "norlund", **settings: Any) -> RetroConfig:
    return RetroConfig.preset(preset, **{**SIZES, **settings})


def stir(model: torch.nn.Module) -> None:
    """Move weights off their initial zeros and ones."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)


def tiny_model(preset: str = "norlund", seed: int = 0, **settings: Any) -> RetroForCausalLM:
    """In evaluation mode and float64, so that comparisons are exact."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RetroForCausalLM(tiny_config(preset, **settings)).eval()
    stir(model)
    return model.double()


def variant(name: str, **settings: Any) -> RetroForCausalLM:
    preset, changes = VARIANTS[name]
    return tiny_model(preset, **{**changes, **settings})


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Without padding (0) and end (1)."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def neighbours(
    model: RetroForCausalLM, rows: int, length: int, count: int = 2, width: int = 6, seed: int = 1
) -> Tensor:
    """For an input of so many tokens."""
    random = torch.Generator().manual_seed(seed)
    shape = (rows, model.config.chunks(length), count, width)
    return torch.randint(2, VOCAB, shape, generator=random)


def found(chunks: Tensor) -> Tensor:
    """A callable's neighbours: two of six tokens, made of the chunk, the second shorter."""
    ids = chunks[:, None, [0, 1, 2, 3, 0, 2]].repeat(1, 2, 1)
    ids[:, 1] = (ids[:, 1] * 7 + 3) % (VOCAB - 2) + 2
    ids[:, 1, 4:] = -1
    return ids


def rounding(logits: Tensor) -> float:
    """How far two orders of the same sums may lie apart, given exact logits and their dtype.

    Each of some hundred operations in a row rounds by eps, and a softmax multiplies the error of
    its scores by their size: unscaled scores, as norlund's, reach tens. A wrong neighbour or
    position shows in float64, where this is 1e-11.
    """
    return 4096 * torch.finfo(logits.dtype).eps * max(1.0, float(logits.detach().abs().max()))


def naive_rotate(vector: Tensor, position: int, dim: int) -> Tensor:
    """One head's vector: dims i and i + dim/2 turn together."""
    turned = vector.clone()
    for i in range(dim // 2):
        angle = position * 10_000.0 ** (-2 * i / dim)
        a, b = vector[i], vector[i + dim // 2]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + dim // 2] = a * math.sin(angle) + b * math.cos(angle)
    return turned
