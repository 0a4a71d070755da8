"""The published models, each as what it changes in the defaults of `RetroConfig`.

Two public implementations define the family, named here after their authors' repositories:
`norlund` (arXiv:2302.12128) and `retro-pytorch`; `paper` follows arXiv:2112.04426.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "norlund": {},
    "retro-pytorch": {
        "vocab_size": 28_996,
        "bos_token_id": 101,
        "eos_token_id": 102,
        "decoder_dim": 768,
        "decoder_heads": 8,
        "decoder_attention_dim": 512,
        "decoder_ffn_dim": 3072,
        "cca_layers": [0, 2, 5, 8],
        "encoder_heads": 8,
        "encoder_attention_dim": 512,
        "encoder_cross_layers": [0, 1],
        "norm": "rms_clamped",
        "scale_scores": True,
        "feed_forward": "mlp",
        "activation": "gelu",
        "bias": True,
        "positions": "rotary",
        "absolute_positions": True,
        "share_embeddings": True,
        "embedding_std": 1.0,
        "head_bias": True,
        "project_encoder_output": True,
        "null_neighbour": True,
        "mask_encoder_context": False,
        "mask_input_pads": False,
        "masked_score": None,
        "chunk_count": "floor",
        "ignore_pad_labels": True,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "feed_forward_dropout": 0.0,
    },
    "paper": {
        "vocab_size": 128_000,
        "decoder_dim": 896,
        "decoder_heads": 16,
        "decoder_attention_dim": 1024,
        "decoder_ffn_dim": 3584,
        "encoder_heads": 16,
        "encoder_attention_dim": 1024,
        "encoder_cross_layers": [0],
        "scale_scores": True,
        "feed_forward": "mlp",
        "bucket_spacing": "log",
        "cca_buckets": "shared",
        "decoder_buckets": 32,
        "cca_bucket_count": 32,
        "encoder_buckets": 32,
        "encoder_cross_buckets": 32,
        "chunk_count": "floor",
        "masked_score": None,
    },
}
