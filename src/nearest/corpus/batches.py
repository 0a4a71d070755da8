"""Windows of many documents as rectangular batches for a model, with little padding."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from nearest.corpus.tokens import Tokens
from nearest.corpus.windows import Window, windows
from nearest.errors import SettingError

_BATCHES_SORTED_TOGETHER = 32


@dataclass(frozen=True)
class WindowBatch:
    """Right-padded windows and the positions in them that predict their successor.

    The n predictions are ordered by row, then by position. Right padding is safe without an
    attention mask: a causal model never looks at what comes later.
    """

    inputs: Int[np.ndarray, "rows width"]
    predicts: Bool[np.ndarray, "rows width"]
    documents: Int[np.ndarray, " n"]  # number of the document in the stream
    positions: Int[np.ndarray, " n"]  # position in that document
    targets: Int[np.ndarray, " n"]  # the token that follows


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch of no windows (SettingError); None stands for a size chosen later."""
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"the batch size must be at least 1, got {batch_size}")


def batch_windows(
    documents: Iterable[Tokens], window: int, stride: int, batch_size: int
) -> Iterator[WindowBatch]:
    """Cut documents into windows and batch them, each batch at most batch_size * window inputs."""
    for group in grouped_batches(documents, window, stride, batch_size):
        yield from group


def grouped_batches(
    documents: Iterable[Tokens],
    window: int,
    stride: int,
    batch_size: int,
    together: int = _BATCHES_SORTED_TOGETHER,
) -> Iterator[Iterator[WindowBatch]]:
    """Batches of windows, in groups of about `together` that go through the text in order.

    The windows of a group are sorted by length, so that short documents share wide batches and
    little is spent on padding; memory stays bounded for a corpus of any size.
    """
    planned: list[tuple[int, Tokens, Window]] = []
    inputs = 0
    budget = batch_size * window
    for number, tokens in enumerate(documents):
        for part in windows(len(tokens), window, stride):
            planned.append((number, tokens, part))
            inputs += part.length
            if inputs >= budget * together:
                yield _sorted_batches(planned, budget)
                planned, inputs = [], 0
    if planned:
        yield _sorted_batches(planned, budget)


def _sorted_batches(
    planned: list[tuple[int, Tokens, Window]], budget: int
) -> Iterator[WindowBatch]:
    planned = sorted(planned, key=lambda item: item[2].length, reverse=True)
    while planned:
        rows = max(1, budget // planned[0][2].length)
        yield _batch(planned[:rows])
        planned = planned[rows:]


def _batch(rows: list[tuple[int, Tokens, Window]]) -> WindowBatch:
    width = max(part.length for _, _, part in rows)
    inputs = np.zeros((len(rows), width), dtype=np.int64)
    predicts = np.zeros((len(rows), width), dtype=bool)
    for row, (_, tokens, part) in enumerate(rows):
        inputs[row, : part.length] = tokens[part.start : part.stop]
        predicts[row, part.first - part.start : part.length] = True
    return WindowBatch(
        inputs=inputs,
        predicts=predicts,
        documents=np.concatenate(
            [np.full(part.stop - part.first, number) for number, _, part in rows]
        ),
        positions=np.concatenate([np.arange(part.first, part.stop) for _, _, part in rows]),
        targets=np.concatenate(
            [tokens[part.first + 1 : part.stop + 1] for _, tokens, part in rows]
        ).astype(np.int64),
    )
