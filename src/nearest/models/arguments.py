"""Which arguments of a model say what its text goes on from.

A causal model goes on from `input_ids`. A decoder with an encoder beside it goes on from
`decoder_input_ids`, and `input_ids` are the source that the encoder reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from nearest.corpus.batches import EncoderInputs
from nearest.corpus.tokens import Tokens
from nearest.encode.identity import reads_sources


@dataclass(frozen=True)
class TextArguments:
    """The names of the arguments that hold a text so far, as ids or embeddings, and its mask."""

    model: PreTrainedModel
    ids: str = "input_ids"
    embeddings: str = "inputs_embeds"
    mask: str = "attention_mask"

    @classmethod
    def of(cls, model: PreTrainedModel) -> "TextArguments":
        """The argument names of a model."""
        if reads_sources(model):
            return cls(
                model, "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask"
            )
        return cls(model)

    def tokens(self, named: Mapping[str, Any]) -> Tensor | None:
        """The text's ids in a call of the model; None where the call does not show them.

        A decoder that is given labels alone reads these, shifted to the right.
        """
        ids, labels = named.get(self.ids), named.get("labels")
        shifted = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if ids is None and labels is not None and named.get(self.embeddings) is None and shifted:
            ids = shifted(labels)
        return ids

    def encoder_inputs(self, named: Mapping[str, Any]) -> EncoderInputs | None:
        """What an encoder is given to read; None where there is none, or no token ids."""
        given = named.get("inputs") if named.get("input_ids") is None else named["input_ids"]
        if not reads_sources(self.model) or not isinstance(given, Tensor):
            return None
        if given.is_floating_point():
            return None
        mask = named.get("attention_mask")
        mask = torch.ones_like(given) if mask is None else mask
        return EncoderInputs(given.cpu().numpy(), mask.bool().cpu().numpy())

    def sources(self, named: Mapping[str, Any]) -> list[Tokens] | None:
        """The tokens of `encoder_inputs`, a row each."""
        read = self.encoder_inputs(named)
        return None if read is None else read.unpadded()

    def shape(self, named: Mapping[str, Any]) -> torch.Size:
        """Rows and columns of the text in a call of the model."""
        names = (self.ids, self.embeddings, "labels", "input_ids")  # BART may write what it reads
        given = next((named[name] for name in names if named.get(name) is not None), None)
        return torch.Size((0, 0)) if given is None else given.shape[:2]

    def loss(self, logits: Tensor, labels: Tensor, rest: Mapping[str, Any]) -> Tensor:
        """The loss as the model computes it: causal labels are shifted, a decoder's are not."""
        if reads_sources(self.model):
            return functional.cross_entropy(
                logits.flatten(0, 1), labels.to(logits.device).flatten()
            )
        loss: Tensor = self.model.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], **rest
        )
        return loss
