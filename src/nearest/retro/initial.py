"""The weights a model starts from."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from nearest.models.memorizing.attention import MemorizingAttention
from nearest.retro.attention import Attention
from nearest.retro.blocks import FeedForward, deepnet_gain
from nearest.retro.chunked import ChunkedCrossAttention
from nearest.retro.config import RetroConfig
from nearest.retro.encoder import Encoder
from nearest.retro.norms import RmsNorm
from nearest.retro.positions import BucketBias


class RetroPreTrainedModel(PreTrainedModel):
    """How weights are made and files are found."""

    config_class = RetroConfig
    config: RetroConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer", "EncoderLayer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Defaults of each layer, but embeddings and null keys normal, position biases zero."""
        if isinstance(module, nn.Linear | nn.LayerNorm | MemorizingAttention):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            decoder = module is self.get_input_embeddings()
            initialization.normal_(module.weight, std=self.config.embedding_std if decoder else 1)
        elif isinstance(module, RmsNorm):
            initialization.ones_(module.weight)
            if module.gate is not None:
                initialization.ones_(module.gate)
        elif isinstance(module, BucketBias):
            initialization.zeros_(module.weight)
        if isinstance(module, ChunkedCrossAttention) and module.null is not None:
            initialization.normal_(module.null)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Every module's own, then what depends on a matrix's part in its layer."""
        super().initialize_weights()  # type: ignore[no-untyped-call]
        if self.config.deepnet:
            for module in self.modules():
                self._init_deepnet(module)
        if self.config.zero_init_retrieval:
            for module in self.modules():
                for weight in _adding(module):
                    initialization.zeros_(weight)

    def _init_deepnet(self, module: nn.Module) -> None:
        """Xavier by depth; matrices that hold several are drawn part by part."""
        parts: list[tuple[nn.Linear, list[float]]] = []
        if isinstance(module, Attention):
            gain = deepnet_gain(self.config, module.side)
            parts = [(module.q, [1.0]), (module.kv, [1.0, gain]), (module.out, [gain])]
        elif isinstance(module, FeedForward):
            gain = deepnet_gain(self.config, module.side)
            parts = [(module.up, [gain] * (1 + module.gated)), (module.down, [gain])]
        elif isinstance(module, Encoder) and isinstance(module.project, nn.Linear):
            parts = [(module.project, [1.0])]
        for linear, gains in parts:
            if getattr(linear.weight, "_is_hf_initialized", False):
                continue  # read from a file
            for part, gain in zip(linear.weight.chunk(len(gains)), gains, strict=True):
                nn.init.xavier_normal_(part, gain)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def _adding(module: nn.Module) -> Iterator[nn.Parameter]:
    """What makes the output of a layer that reads neighbours."""
    encoding = getattr(module, "side", None) == "encoder"
    if isinstance(module, ChunkedCrossAttention) or (encoding and isinstance(module, Attention)):
        yield from module.out.parameters()
    elif encoding and isinstance(module, FeedForward):
        yield from module.down.parameters()
