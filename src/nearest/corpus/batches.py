"""Windows of many documents as rectangular batches for a model, with little padding."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from nearest.corpus.tokens import Tokens
from nearest.corpus.windows import Window, windows
from nearest.errors import SettingError

_BATCHES_SORTED_TOGETHER = 32


class _Planned(NamedTuple):
    """A window of a document, and the tokens that the encoder reads beside it."""

    number: int
    tokens: Tokens
    part: Window
    encoder_tokens: Tokens | None

    @property
    def size(self) -> int:
        """Inputs it takes in a batch: the longer of the decoder's and the encoder's."""
        return max(self.part.length, 0 if self.encoder_tokens is None else len(self.encoder_tokens))


@dataclass(frozen=True)
class EncoderInputs:
    """Right-padded inputs of an encoder, a row for each window; `mask` is True on tokens."""

    tokens: Int[np.ndarray, "rows encoder_width"]
    mask: Bool[np.ndarray, "rows encoder_width"]

    @classmethod
    def from_rows(cls, rows: Sequence[Tokens]) -> "EncoderInputs":
        """Pad the tokens of each row."""
        tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=bool)
        for row, found in enumerate(rows):
            tokens[row, : len(found)], mask[row, : len(found)] = found, True
        return cls(tokens, mask)

    def unpadded(self) -> list[Tokens]:
        """The tokens of each row."""
        return [row[found] for row, found in zip(self.tokens, self.mask, strict=True)]


@dataclass(frozen=True)
class WindowBatch:
    """Right-padded windows and the positions in them that predict their successor.

    The n predictions are ordered by row, then by position. Right padding is safe without an
    attention mask: a causal model never looks at what comes later. An encoder does, so each row
    has the whole encoder text of its document, with a mask.
    """

    inputs: Int[np.ndarray, "rows width"]
    predicts: Bool[np.ndarray, "rows width"]
    documents: Int[np.ndarray, " n"]  # number of the document in the stream
    positions: Int[np.ndarray, " n"]  # position in that document
    targets: Int[np.ndarray, " n"]  # the token that follows
    encoder_inputs: EncoderInputs | None = None


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch of no windows (SettingError); None stands for a size chosen later."""
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"the batch size must be at least 1, got {batch_size}")


def batch_windows(
    documents: Iterable[Tokens],
    window: int,
    stride: int,
    batch_size: int,
    encoder_tokens: Iterable[Tokens] | None = None,
) -> Iterator[WindowBatch]:
    """Cut documents into windows and batch them, each batch at most batch_size * window inputs.

    `encoder_tokens` are what an encoder reads for each document.
    """
    for group in grouped_batches(documents, window, stride, batch_size, encoder_tokens):
        yield from group


def grouped_batches(
    documents: Iterable[Tokens],
    window: int,
    stride: int,
    batch_size: int,
    encoder_tokens: Iterable[Tokens] | None = None,
    together: int = _BATCHES_SORTED_TOGETHER,
) -> Iterator[Iterator[WindowBatch]]:
    """Batches of windows, in groups of about `together` that go through the text in order.

    The windows of a group are sorted by length, so that short documents share wide batches and
    little is spent on padding; memory stays bounded for a corpus of any size.
    """
    planned: list[_Planned] = []
    inputs = 0
    budget = batch_size * window
    read: Iterable[Tokens | None] = (
        itertools.repeat(None) if encoder_tokens is None else encoder_tokens
    )
    for number, (tokens, beside) in enumerate(zip(documents, read, strict=False)):
        for part in windows(len(tokens), window, stride):
            planned.append(_Planned(number, tokens, part, beside))
            inputs += planned[-1].size
            if inputs >= budget * together:
                yield _sorted_batches(planned, budget)
                planned, inputs = [], 0
    if planned:
        yield _sorted_batches(planned, budget)


def _sorted_batches(planned: list[_Planned], budget: int) -> Iterator[WindowBatch]:
    planned = sorted(planned, key=lambda item: item.size, reverse=True)
    while planned:
        rows = max(1, budget // planned[0].size)
        yield _batch(planned[:rows])
        planned = planned[rows:]


def _batch(rows: list[_Planned]) -> WindowBatch:
    width = max(item.part.length for item in rows)
    inputs = np.zeros((len(rows), width), dtype=np.int64)
    predicts = np.zeros((len(rows), width), dtype=bool)
    for row, (_, tokens, part, _) in enumerate(rows):
        inputs[row, : part.length] = tokens[part.start : part.stop]
        predicts[row, part.first - part.start : part.length] = True
    beside = [item.encoder_tokens for item in rows if item.encoder_tokens is not None]
    return WindowBatch(
        inputs=inputs,
        predicts=predicts,
        documents=np.concatenate(
            [np.full(part.stop - part.first, number) for number, _, part, _ in rows]
        ),
        positions=np.concatenate([np.arange(part.first, part.stop) for _, _, part, _ in rows]),
        targets=np.concatenate(
            [tokens[part.first + 1 : part.stop + 1] for _, tokens, part, _ in rows]
        ).astype(np.int64),
        encoder_inputs=EncoderInputs.from_rows(beside) if beside else None,
    )
