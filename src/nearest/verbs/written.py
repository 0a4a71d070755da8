"""Let a model write a text for each encoder text of a set of pairs, in batches."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from nearest.corpus.batches import EncoderInputs
from nearest.corpus.documents import encoder_text_of
from nearest.corpus.incoming import Documents, incoming_documents
from nearest.corpus.reading import Corpus, read_documents
from nearest.corpus.tokens import Tokens
from nearest.encode.identity import input_device, reads_sources, token_rules
from nearest.errors import CorpusError
from nearest.memory import Memory
from nearest.models.attach import attach
from nearest.progress import Progress
from nearest.retrieval.ensemble import memories_of
from nearest.retrieval.settings import BASE, Settings
from nearest.store.tuned import SettingsFrom
from nearest.verbs.prompt import prompt_tokens

_BATCH_TOKENS = 4096  # encoder texts and new tokens of a batch, where no batch size is given


@dataclass(frozen=True)
class Pairs:
    """Encoder texts as a model reads them, and the texts wanted; `ids` are of the documents."""

    ids: list[str]
    encoder_texts: list[str]
    references: list[str]
    prompts: list[Tokens]


@dataclass(frozen=True)
class Written:
    """Texts, one a pair in the order of the pairs, and what they took.

    Attributes:
        texts: without special tokens.
        tokens: that were written in all, the last of each text included.
        seconds: of all.
        settings, settings_from: in use; None for the base model.
    """

    texts: list[str]
    tokens: int
    seconds: float
    settings: Settings | None = None
    settings_from: SettingsFrom | None = None


def read_pairs(
    model: PreTrainedModel, tokenizer: Any, documents: Documents, max_new_tokens: int
) -> Pairs:
    """Documents with an `encoder_text`, as what a model goes on from; a causal model continues it.

    Raises:
        CorpusError: a document has no such text, or it is too long.
        SettingError: the model has no room for so many new tokens, or none are asked for.
    """
    if isinstance(documents, Path):
        documents = read_documents(documents)
    if isinstance(documents, Corpus):
        read = list(documents.read(for_encoder=True))
    else:
        read = list(incoming_documents(documents, token_rules(model, tokenizer)))
    if not read:
        raise CorpusError("there are no documents to write texts for: give some")
    for document in read:
        if not document.encoder_text:
            encoder_text_of(document) if reads_sources(model) else _refuse(document.origin)
    encoder_texts = [str(document.encoder_text) for document in read]
    prompts = [prompt_tokens(model, tokenizer, text) for text in encoder_texts]
    max(prompts, key=lambda prompt: len(prompt.text)).check_length(model, max_new_tokens)
    return Pairs(
        [document.id for document in read],
        encoder_texts,
        [document.text for document in read],
        [np.array(prompt.inputs, dtype=np.int64) for prompt in prompts],
    )


def _refuse(origin: str) -> None:
    raise CorpusError(
        f"{origin} has no prompt: to score what a causal model writes, give each document an "
        "'encoder_text' or a 'source', which is continued, beside its 'text', which is wanted"
    )


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: Memory | Sequence[Memory] | None,
    pairs: Pairs,
    method: str,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int | None = None,
    weights: Sequence[float] | None = None,
    force: bool = False,
    settings: Settings | None = None,
    given: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    progress: Progress,
) -> Written:
    """Write a text for each encoder text by one method; arguments as of `evaluate_generated`."""
    texts = [""] * len(pairs.prompts)
    tokens = done = 0
    arguments = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    session = (
        nullcontext()
        if method == BASE
        else attach(
            model,
            memories_of(memory),
            method,
            weights=weights,
            tokenizer=tokenizer,
            force=force,
            settings=settings,
            **(given or {}),
        )
    )
    started = time.perf_counter()
    with session as attached:
        for rows in _batches(pairs.prompts, max_new_tokens, num_beams, batch_size):
            inputs = _inputs(model, tokenizer, [pairs.prompts[row] for row in rows])
            output = model.generate(**inputs, **arguments, **(generation or {}))  # type: ignore[operator]
            first = 1 if reads_sources(model) else inputs["input_ids"].shape[1]
            for row, new in zip(rows, output[:, first:].tolist(), strict=True):
                texts[row] = tokenizer.decode(new, skip_special_tokens=True)
                tokens += _written(new, _ends(model))
            done += len(rows)
            progress(f"write {method}", done, len(texts))
    seconds = time.perf_counter() - started
    if attached is None:
        return Written(texts, tokens, seconds)
    return Written(texts, tokens, seconds, attached.settings, attached.settings_from)


def _batches(
    prompts: Sequence[Tokens], new: int, beams: int, batch_size: int | None
) -> Iterator[list[int]]:
    """Numbers of prompts that are read together: of like length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    start = 0
    while start < len(order):
        a_row = (len(prompts[order[start]]) + new) * beams
        size = batch_size or max(1, _BATCH_TOKENS // a_row)
        yield order[start : start + size]
        start += size


def _inputs(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Tokens]) -> dict[str, Any]:
    """A batch: padded at the right for an encoder, at the left for what is continued."""
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    if reads_sources(model):
        padded = EncoderInputs.from_rows(prompts)
        ids, mask = np.where(padded.mask, padded.tokens, pad), padded.mask
    else:
        padded = EncoderInputs.from_rows([prompt[::-1] for prompt in prompts])
        mask = padded.mask[:, ::-1].copy()
        ids = np.where(mask, padded.tokens[:, ::-1], pad)
    device = input_device(model)
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device),
    }
    return inputs if reads_sources(model) else {**inputs, "pad_token_id": pad}


def _ends(model: PreTrainedModel) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(torch.as_tensor([] if end is None else end).reshape(-1).tolist())


def _written(new: Sequence[int], ends: set[int]) -> int:
    """Tokens of a row up to the end token; all where there is none."""
    return next((n for n, token in enumerate(new, 1) if token in ends), len(new))
