"""Small random encoder–decoders, a tokenizer that reads sources and targets apart, and pairs."""

import copy
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from conftest import BYTES_AND_SPECIALS, POSITIONS
from nearest.corpus.documents import Document

PAD, EOS = 0, 1
_COMMON = {"vocab_size": BYTES_AND_SPECIALS, "pad_token_id": PAD, "eos_token_id": EOS}
_T5 = {**_COMMON, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
_T5 |= {"num_heads": 2, "decoder_start_token_id": PAD}
_BART = {**_COMMON, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2}
_BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": POSITIONS}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None}
CONFIGS: dict[str, Any] = {
    "t5": T5Config(**_T5),
    "t5-gated": T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": BartConfig(**_BART, bos_token_id=PAD, decoder_start_token_id=EOS),
    "marian": MarianConfig(**_BART, decoder_start_token_id=PAD),
}


SCALES = {"t5": 1.5, "t5-gated": 1.1}


def make_pair_model(name: str = "t5") -> PreTrainedModel:
    """A random model whose predictions are far from uniform and depend on its source."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSeq2SeqLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
        for path, weight in model.named_parameters():
            if "embed_positions" not in path:  # Marian's are computed, and not saved
                weight.data.mul_(SCALES.get(name, 6))
        if "final_logits_bias" in dict(model.named_buffers()):
            model.final_logits_bias.normal_()  # type: ignore[union-attr, operator]
    return model


class PairTokenizer(PreTrainedTokenizerFast):
    """One token a byte, and EOS at the end; targets are read with their case swapped, as Marian's
    are with another vocabulary.
    """

    _swapped = False

    def _switch_to_target_mode(self) -> None:
        self._swapped = True

    def _switch_to_input_mode(self) -> None:
        self._swapped = False

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        if self._swapped:
            text = [t.swapcase() for t in text] if isinstance(text, list) else text.swapcase()
        return super()._encode_plus(text, *args, **kwargs)


def make_pair_tokenizer(kind: Any = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Padding 0 and EOS 1 in front of the bytes."""
    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    made: PreTrainedTokenizerFast = kind(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    return made


def pair_documents(count: int = 8, seed: int = 0, longest: int = 60) -> list[Document]:
    """Random texts, some longer than a window, with sources of many lengths."""
    rng = np.random.default_rng(seed)

    def text(size: int) -> str:
        return bytes(rng.integers(33, 127, size=size).tolist()).decode()

    return [
        Document(
            f"pair-{i}",
            text(int(rng.integers(20, longest))),
            {"title": f"Title {i}"},
            encoder_text=text(int(rng.integers(3, 40))),
        )
        for i in range(count)
    ]
