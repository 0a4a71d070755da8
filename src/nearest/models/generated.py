"""The arguments and output of generate(), kept so that a sequence can be read again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nearest.corpus.batches import EncoderInputs
from nearest.corpus.tokens import Tokens
from nearest.encode.identity import reads_sources
from nearest.models.arguments import TextArguments
from nearest.retrieval.ensemble import Ensemble

TWO_STARTS = (
    "the prompt begins with two start tokens (BOS), where a memory's documents begin with one, so "
    "that hardly any stored state is near: leave the tokenizer's or your own out "
    "(add_special_tokens=False)"
)


@dataclass(frozen=True)
class Prompt:
    """What generate() goes on from.

    Attributes:
        length: its columns, start token and padding included; 0 for embeddings.
        first: of each row, where its tokens start after left padding.
        encoder_inputs: what the encoder reads for each row, where there is one.
        shown: whether all tokens were given, so that they can be read again; not embeddings.
    """

    length: int
    first: list[int]
    encoder_inputs: EncoderInputs | None
    shown: bool

    @classmethod
    def of(cls, text: TextArguments, named: Mapping[str, Any]) -> "Prompt":
        """Build from the arguments of generate()."""
        given = named.get("inputs") if named.get("input_ids") is None else named["input_ids"]
        tokens = given if isinstance(given, Tensor) and not given.is_floating_point() else None
        mask = named.get("attention_mask")
        if reads_sources(text.model):
            length, starts = _decoder_prompt(text, named)
            read = text.encoder_inputs(named)
            if read is None:
                return cls(length, starts, None, False)
            return cls(length, starts or [0] * len(read.tokens), read, True)
        if tokens is None:
            return cls(0, [], None, False)
        pad = _padding(text.model, named)
        if mask is None and pad is not None and pad not in stop_tokens(text.model, named):
            mask = tokens != pad  # as generate() infers it
        starts = [0] * len(tokens) if mask is None else _starts(mask)
        # A mask that is longer than the tokens is also of those that a cache stands for.
        return cls(tokens.shape[1], starts, None, mask is None or mask.shape == tokens.shape)

    def sources(self, rows: int) -> list[Tokens] | None:
        """What the encoder read with each of so many rows; several may be of one prompt."""
        if self.encoder_inputs is None:
            return None
        read = self.encoder_inputs.unpadded()
        return [read[row * len(read) // rows] for row in range(rows)]


def begins_twice(prompt: Prompt, named: Mapping[str, Any], start_token: int) -> bool:
    """Whether a causal model's row begins with two start tokens, where documents have one."""
    given = named.get("inputs") if named.get("input_ids") is None else named["input_ids"]
    if prompt.encoder_inputs is not None or not prompt.first or given is None:
        return False
    rows = zip(given, prompt.first, strict=True)
    return any(row[at : at + 2].tolist() == [start_token] * 2 for row, at in rows)


def _decoder_prompt(text: TextArguments, named: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Columns of the decoder's prompt, and where given rows start.

    generate() puts the start token in front, unless some row begins with it.
    """
    ids, mask = named.get(text.ids), named.get(text.mask)
    if ids is None:
        return 1, []
    start = torch.as_tensor(generation_option(text.model, named, "decoder_start_token_id"))
    prepended = bool((ids[:, 0].cpu() != start.cpu().reshape(-1)).all())
    starts = [0] * len(ids) if mask is None or prepended else _starts(mask)
    return ids.shape[1] + prepended, starts


class GeneratedRow(NamedTuple):
    """A sequence without padding at either end, its prompt's tokens, and what the encoder read."""

    tokens: Tensor
    prompt: int
    encoder_inputs: EncoderInputs | None


@dataclass(frozen=True)
class Generated:
    """The result of one call of generate()."""

    sequences: Tensor
    prompt: Prompt
    stops: set[int]
    pad: int | None
    ensemble: Ensemble | None  # that predicted; None: the base model alone

    @classmethod
    def of(
        cls,
        output: Any,
        model: PreTrainedModel,
        prompt: Prompt,
        named: Mapping[str, Any],
        ensemble: Ensemble | None,
    ) -> "Generated | None":
        """Build from its output and arguments; None if the prompt cannot be read again."""
        sequences = getattr(output, "sequences", output)
        if not prompt.shown or not isinstance(sequences, Tensor):
            return None
        return cls(sequences, prompt, stop_tokens(model, named), _padding(model, named), ensemble)

    def row(self, row: int) -> GeneratedRow:
        """One of its sequences (IndexError where there is none)."""
        rows, given = len(self.sequences), len(self.prompt.first)
        if not 0 <= row < rows:
            raise IndexError(f"row {row} is outside the {rows} generated")
        number = row * given // rows
        first, encoder_inputs = self.prompt.first[number], self.prompt.encoder_inputs
        new = self.sequences[row, self.prompt.length :].tolist()
        stops = [i for i, token in enumerate(new) if token in self.stops]
        length = stops[0] + 1 if stops else len(new)
        while not stops and length and new[length - 1] == self.pad:
            length -= 1  # a row ended by something else, such as a stop string, is padded too
        prompt = self.prompt.length - first
        if encoder_inputs is not None:
            one = slice(number, number + 1)
            encoder_inputs = EncoderInputs(encoder_inputs.tokens[one], encoder_inputs.mask[one])
        return GeneratedRow(
            self.sequences[row, first:][: prompt + length].cpu(), prompt, encoder_inputs
        )


def stop_tokens(model: PreTrainedModel, named: Mapping[str, Any]) -> set[int]:
    """The ids with which generate() ends a text."""
    return set(_token_ids(generation_option(model, named, "eos_token_id")))


def _padding(model: PreTrainedModel, named: Mapping[str, Any]) -> int | None:
    return next(iter(_token_ids(generation_option(model, named, "pad_token_id"))), None)


def generation_option(model: PreTrainedModel, named: Mapping[str, Any], name: str) -> Any:
    """The value that generate() uses: its argument, else the given config's, else the model's."""
    if name in named:
        return named[name]
    given = getattr(named.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _starts(mask: Tensor) -> list[int]:
    """Where each row's tokens start after left padding."""
    starts: list[int] = mask.int().argmax(dim=1).tolist()
    return starts


def _token_ids(value: int | list[int] | Tensor | None) -> list[int]:
    """Zero, one or several token ids, however they were given, as a list."""
    ids: list[int] = torch.as_tensor([] if value is None else value).reshape(-1).tolist()
    return ids
