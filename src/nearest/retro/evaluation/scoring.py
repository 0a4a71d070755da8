"""The loss of every token of a corpus that a model reads in passages."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from nearest.errors import SettingError
from nearest.progress import Progress, no_progress
from nearest.retro.data.dataset import NOT_SCORED, Collate
from nearest.retro.loss import token_losses
from nearest.retro.passages import PassageCollate, Passages, next_labels
from nearest.retro.retrofit import RetrofitForCausalLM

ON, OFF, BASE = "on", "off", "base"


@dataclass(frozen=True)
class ScoredTokens:
    """What is predicted in one passage.

    Attributes:
        document: its number. positions: of the tokens, in the document.
        nll: of each, in nats, float64.
    """

    document: int
    positions: Int[np.ndarray, " n"]
    nll: Float[np.ndarray, " n"]


def collate_of(model: PreTrainedModel, chunk_size: int) -> Collate:
    """Makes batches as a model wants them."""
    config = retro_config(model)
    return Collate(max(config.pad_token_id, 0), chunk_size, config.chunk_count)


def retro_config(model: PreTrainedModel) -> Any:
    """A RETRO or RETROfit model's settings of chunks and neighbours."""
    return model.retro_config


def scored_tokens(
    model: PreTrainedModel,
    passages: Passages,
    *,
    reading: str = ON,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
    progress: Progress = no_progress,
) -> Iterator[ScoredTokens]:
    """The losses of a corpus, passage after passage, the longest first.

    Args:
        model: in evaluation mode from the first passage on until the last.
        passages: each of its labels is predicted once.
        reading: ON with neighbours, OFF without, BASE: by what a RETROfit was made of.
        batch_size: passages read at once.
        share: (i, n): every n-th batch from the i-th on, of n processes.
        progress: told of passages.
    """
    order = np.argsort(-passages.sizes, kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    collate = PassageCollate(collate_of(model, passages.dataset.chunks.size))
    training = model.training
    model.eval()
    try:
        own = range(share[0], len(batches), share[1])
        done, total = 0, sum(len(batches[number]) for number in own)
        for number in own:
            rows = batches[number]
            yield from _scored(model, passages, rows, collate, reading)
            done += len(rows)
            progress(f"evaluate {reading}", done, total)
    finally:
        model.train(training)


def _scored(
    model: PreTrainedModel,
    passages: Passages,
    rows: Int[np.ndarray, " n"],
    collate: PassageCollate,
    reading: str,
) -> Iterator[ScoredTokens]:
    batch = collate([passages[int(row)] for row in rows])
    given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    reader: Any = model
    if reading == ON and retro_config(model).cca_layers:
        given["neighbour_ids"] = batch["neighbour_ids"].to(model.device)
    elif reading == BASE:
        assert isinstance(model, RetrofitForCausalLM)  # `readings_of` has seen to it
        reader = model.base
    labels = next_labels(batch["labels"])
    with torch.no_grad():
        logits: Tensor = reader(**given, use_cache=False).logits
        nll = token_losses(logits, labels.to(logits.device)).double().cpu().numpy()
    scored = (labels != NOT_SCORED).numpy()
    for row, passage in enumerate(rows.tolist()):
        columns = np.flatnonzero(scored[row])
        yield ScoredTokens(
            int(batch["documents"][row]),
            passages.begin(passage) + columns + 1,
            nll[row, columns],
        )


def by_document(
    scored: Iterator[ScoredTokens], documents: int
) -> tuple[Float[np.ndarray, " documents"], Float[np.ndarray, " documents"]]:
    """The summed loss of each document, and how many of its tokens were predicted."""
    nll, tokens = np.zeros(documents), np.zeros(documents)
    for some in scored:
        nll[some.document] += some.nll.sum()
        tokens[some.document] += len(some.nll)
    return nll, tokens


def mean_loss(
    model: PreTrainedModel,
    passages: Passages,
    batch_size: int,
    share: tuple[int, int],
    sum_all: Callable[[Tensor], Tensor],
) -> float:
    """Mean loss of a corpus with neighbours, the batches shared out to processes.

    Args:
        model, passages, batch_size: as in `scored_tokens`.
        share: (which process this is, how many there are).
        sum_all: adds a tensor of float64 over all processes.
    """
    total, count = 0.0, 0
    for some in scored_tokens(model, passages, batch_size=batch_size, share=share):
        total += float(some.nll.sum())
        count += len(some.nll)
    sums = sum_all(torch.tensor([total, float(count)], dtype=torch.float64))
    return float(sums[0] / sums[1])


def check_fit(model: PreTrainedModel, passages: Passages) -> None:
    """Refuse a corpus that a model cannot read (SettingError)."""
    config, data = retro_config(model), passages.dataset
    if data.chunks.size != config.chunk_size:
        raise SettingError(
            f"the model reads chunks of {config.chunk_size} tokens, the corpus has chunks of "
            f"{data.chunks.size}: prepare it with --chunk-size {config.chunk_size}"
        )
    for name, chunks in (("corpus", data.chunks), ("database", data.database)):
        largest = chunks.largest
        if largest >= config.vocab_size:
            raise SettingError(
                f"the {name} has the token {largest}, but the model's vocabulary has "
                f"{config.vocab_size}: it was made with another tokenizer; prepare it with the "
                "model's own"
            )
    positions = getattr(model.config, "max_position_embeddings", None)
    bounded = isinstance(model, RetrofitForCausalLM) or config.absolute_positions
    if bounded and positions is not None and passages.window > positions:
        raise SettingError(
            f"passages of {passages.window} tokens exceed the model's {positions} positions: "
            + (
                f"read at most {most} at once (--max-len, --window)"
                if (most := positions // config.chunk_size * config.chunk_size)
                else f"it cannot read a chunk of {config.chunk_size}; prepare smaller ones"
            )
        )
