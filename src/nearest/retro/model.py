"""RETRO as a Hugging Face causal language model (arXiv:2112.04426)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from nearest.errors import SettingError
from nearest.models.memorizing.decoder import DecoderMemory
from nearest.models.memorizing.memory import AttentionMemory, KeyIndex
from nearest.retro.attention import Recall, hidden_keys
from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.retro.decoder import DecoderLayer
from nearest.retro.encoder import Encoder
from nearest.retro.generation import RetroGenerationMixin
from nearest.retro.initial import RetroPreTrainedModel
from nearest.retro.layout import ChunkLayout
from nearest.retro.loss import IGNORED, next_token_loss
from nearest.retro.norms import make_norm
from nearest.retro.positions import rotation
from nearest.retro.reading import (
    NeighbourReader,
    check_call,
    check_ids,
    chunks_seen,
    encoding,
    layout_of,
)


@dataclass
class RetroOutput(CausalLMOutputWithPast):
    """What a pass gives.

    Attributes:
        memory: the one that was given with this segment after it, padding left out; None where
            none was given, and after a cache, which continues a segment.
    """

    memory: DecoderMemory | None = None


class RetroForCausalLM(RetroGenerationMixin, RetroPreTrainedModel):
    """Predicts tokens with the neighbours of the chunks before.

    Neighbours are given for each forward pass, or made by `generate` from a callable; without any,
    the same weights are a plain language model. Documents longer than a pass are read in segments;
    the `memorizing_layers` attend to those before (arXiv:2203.08913), state in and out::

        memory = model.empty_memory(batch=2)
        for ids, ended in segments:  # a row of the batch is a document
            output = model(ids, labels=ids, memory=memory)
            output.loss.backward()
            memory = output.memory.cleared(ended)
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RetroConfig) -> None:
        if config.pad_token_id < 0:
            raise SettingError("pad_token_id must be a token of the vocabulary: rows are padded")
        super().__init__(config)
        self.retro_config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.input_dim)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.input_dim)
            if config.absolute_positions
            else None
        )
        self.embed_project = (
            nn.Linear(config.input_dim, config.decoder_dim)
            if config.input_dim != config.decoder_dim
            else None
        )
        self.embed_neighbours = (
            None
            if config.share_embeddings or not config.cca_layers
            else nn.Embedding(config.vocab_size, config.encoder_dim)
        )
        if config.encoder == "base":
            raise SettingError(
                "encoder 'base' is the model that a RETROfit was made of: a model that is trained "
                "from scratch has an encoder of its own, so leave it out"
            )
        self.encoder = Encoder(config) if config.cca_layers else None
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        self.norm = (
            nn.Identity()
            if config.deepnet  # whose layers end with a norm
            else make_norm(config.norm, config.decoder_dim, config.gated_norm)
        )
        self.lm_head = nn.Linear(config.decoder_dim, config.vocab_size, bias=config.head_bias)
        self.post_init()  # type: ignore[no-untyped-call]

    def empty_memory(self, batch: int, index: KeyIndex | None = None) -> DecoderMemory:
        """What the memorizing layers remember before the first segment of so many documents.

        Args:
            batch: documents read side by side.
            index: as in `AttentionMemory`; None scores every key.

        Raises:
            SettingError: no layer memorizes, or the capacity is below 1.
        """
        config = self.config
        if not config.memorizing_layers:
            raise SettingError("no layer can read a memory: name some in memorizing_layers")
        nothing = AttentionMemory.empty(
            batch,
            config.decoder_heads,
            config.decoder_head_dim,
            config.memorizing_capacity,
            index=index,
            dtype=self.dtype,
            device=self.device,
        )
        return DecoderMemory((nothing,) * len(config.memorizing_layers))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "batch n"],
        attention_mask: Tensor | None = None,
        neighbour_ids: Tensor | None = None,
        labels: Int[Tensor, "batch n"] | None = None,
        memory: DecoderMemory | None = None,
        past_key_values: RetroCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RetroOutput:
        """Logits of the next tokens, and the loss where labels are given.

        Args:
            input_ids: tokens; after a cache, only those it has not seen.
            attention_mask: (batch, tokens so far), 0 where padding stands; leading zeros shift a
                row's positions and chunks. Where none is given, see `mask_input_pads`.
            neighbour_ids: int64 (batch, chunks, neighbours, length), of ⌈n/m⌉ or ⌊n/m⌋ chunks (see
                `chunk_count`), after a cache of those that end in this pass; −1 and pad_token_id
                are padding. None: no retrieval.
            labels: token ids, −100 where none is to be predicted; see `shift_labels`.
            memory: of the segments before, one row for each of the batch; None: no memory is read.
            past_key_values: of the passes before; updated.
            use_cache: return a cache; by default outside training.
            logits_to_keep: the last so many positions, or positions, get logits; 0 for all.
            output_hidden_states: return the states after the embedding and each layer.
            **kwargs: num_items_in_batch, for the loss.

        Raises:
            SettingError: shapes, dtypes or ids that do not fit.
            ModelError: a memory of other sizes.
        """
        if unknown := set(kwargs) - {"num_items_in_batch"}:
            raise SettingError(f"forward knows no argument {sorted(unknown)[0]!r}: leave it out")
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if past_key_values is None and use_cache:
            past_key_values = RetroCache(config=self.config)
        states: list[Tensor] | None = [] if output_hidden_states else None
        x, memory = self._decode(
            input_ids, attention_mask, neighbour_ids, memory, past_key_values, states
        )
        logits = self.lm_head(slice_logits_to_keep(x, logits_to_keep))
        return RetroOutput(
            loss=None if labels is None else self._loss(logits, labels, kwargs),
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else tuple(states),
            memory=memory,
        )

    def _decode(
        self,
        input_ids: Int[Tensor, "batch n"],
        attention_mask: Tensor | None,
        neighbour_ids: Tensor | None,
        memory: DecoderMemory | None,
        cache: RetroCache | None,
        states: list[Tensor] | None,
    ) -> tuple[Float[Tensor, "batch n dim"], DecoderMemory | None]:
        """Normed states of the last layer, and the memory after a whole segment.

        `states` gathers the states before each layer, and the normed ones.
        """
        layout = layout_of(self.config, input_ids, attention_mask, cache)
        if neighbour_ids is not None:
            check_call(self.config, layout, neighbour_ids, cache)
        mask = self._input_mask(input_ids, attention_mask, cache)
        places = layout.positions.to(input_ids.device)
        x = self._embed(input_ids, layout, places)
        hidden = None if mask is None else hidden_keys(self.config, mask, x)
        turns = None
        if self.config.positions == "rotary":
            cos, sin = rotation(places, self.config.rotary_dim, x)
            turns = cos[:, None], sin[:, None]
        read = None
        if neighbour_ids is not None and self.encoder is not None:
            read = NeighbourReader(
                self.config,
                encoding(self.config, self.encoder, self.embed_neighbours or self.embed_tokens),
                layout,
                neighbour_ids,
                chunks_seen(mask, layout),
                cache.chunk if cache is not None else None,
            )
        recall = self._recall(memory)
        for layer in self.layers:
            if states is not None:
                states.append(x)
            x = layer(x, hidden, turns, cache, read, recall)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        if recall is None or layout.seen:
            return x, None
        return x, recall.remembered(mask)

    def _recall(self, memory: DecoderMemory | None) -> Recall | None:
        """What this pass reads and writes of a memory; SettingError where it has other layers."""
        if memory is None:
            return None
        given, layers = len(memory.layers), self.config.memorizing_layers
        if not layers or given != len(layers):
            raise SettingError(
                f"the memory is of {given} layers, but memorizing_layers is {layers}: begin with "
                "empty_memory of this model"
            )
        return Recall(memory)

    def _embed(
        self, input_ids: Int[Tensor, "batch n"], layout: ChunkLayout, places: Int[Tensor, "_ n"]
    ) -> Float[Tensor, "batch n dim"]:
        check_ids("input_ids", input_ids, 0, self.config.vocab_size)
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            longest = layout.seen + layout.columns - min(layout.starts)
            if longest > self.config.max_position_embeddings:
                raise SettingError(
                    f"the input is {longest} tokens long, but the model has "
                    f"{self.config.max_position_embeddings} positions: shorten it"
                )
            x = x + self.embed_positions(places)
        return x if self.embed_project is None else self.embed_project(x)

    def _input_mask(
        self,
        input_ids: Int[Tensor, "batch n"],
        attention_mask: Tensor | None,
        cache: RetroCache | None,
    ) -> Bool[Tensor, "batch seen"] | None:
        """Which tokens so far are no padding; None where it does not matter."""
        if attention_mask is not None:
            return attention_mask.bool()
        if not self.config.mask_input_pads:
            return None
        mask = input_ids != self.config.pad_token_id
        if cache is not None:
            if "input" in cache.chunk.tensors:
                mask = torch.cat([cache.chunk.tensors["input"], mask], dim=1)
            cache.chunk.tensors["input"] = mask
        return mask

    def _loss(
        self, logits: Float[Tensor, "batch _ vocab"], labels: Tensor, options: dict[str, Any]
    ) -> Float[Tensor, ""]:
        if self.config.ignore_pad_labels:
            labels = labels.masked_fill(labels == self.config.pad_token_id, IGNORED)
        if self.config.shift_labels:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return next_token_loss(logits, labels, options.get("num_items_in_batch"))


AutoConfig.register(RetroConfig.model_type, RetroConfig)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)
