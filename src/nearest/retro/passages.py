"""Documents cut into passages that a model reads at once, with the neighbours of their chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from nearest.errors import CorpusError, SettingError
from nearest.retro.data.dataset import NOT_SCORED, Collate, OrderedDataset, RetroDataset, digest_of


class Passages(Dataset[dict[str, Tensor]]):
    """An item is a run of a document's chunks, as `RetroDataset`'s, and `document`, its number.

    Passages begin at chunks, `stride` tokens apart, so that every chunk keeps its neighbours. What
    an earlier passage predicts is context in the next: with stride < window each token but a
    document's first is predicted once, with at least window − stride tokens of context where they
    exist. With stride = window nothing is read twice, and the first token of each later passage
    is not predicted.
    """

    def __init__(
        self, dataset: RetroDataset, window: int, stride: int | None = None, least: int = 2
    ) -> None:
        """Passages of a data set's documents.

        Args:
            dataset: its `max_len` says how much of a document is read at all.
            window: tokens of a passage, whole chunks.
            stride: tokens from one passage to the next, whole chunks; None: the window.
            least: tokens that a passage must have; shorter ones are left out.

        Raises:
            SettingError: window or stride are no whole chunks, or the stride exceeds the window.
            CorpusError: no passage is left.
        """
        m = dataset.chunks.size
        stride = window if stride is None else stride
        for name, value in (("window", window), ("stride", stride)):
            if value < m or value % m:
                raise SettingError(
                    f"{name} {value} must be a multiple of the chunk size, {m}: neighbours belong "
                    "to whole chunks"
                )
        if stride > window:
            raise SettingError(
                f"stride {stride} exceeds the window, {window}: tokens would be lost"
            )
        self.dataset = dataset
        self.window = window
        self.stride = stride
        lengths = dataset.lengths()
        # a document's passages end with the first that reaches its end
        counts = 1 + np.maximum(-(-(lengths - window) // stride), 0)
        items = np.repeat(np.arange(len(lengths)), counts)
        first = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = first * stride
        sizes = np.minimum(lengths[items] - begins, window)
        kept = sizes >= least
        if not kept.any():
            raise CorpusError(
                f"no document has a passage of {least} tokens: there is nothing to read"
            )
        self._items, self._begins = items[kept], begins[kept]
        self.sizes: Int[np.ndarray, " passages"] = sizes[kept]  # tokens of each
        self.documents: Int[np.ndarray, " passages"] = dataset.documents[self._items]  # numbers

    def __len__(self) -> int:
        """Passages."""
        return len(self._items)

    @property
    def digest(self) -> str:
        """Another one where other documents, or other parts of them, are read."""
        return digest_of(self.documents, self._begins, self.sizes)

    def begin(self, passage: int) -> int:
        """Where a passage begins in its document, in tokens."""
        return int(self._begins[passage])

    def name(self, document: int) -> str:
        """A document's id."""
        return self.dataset.chunks.name(document)

    def __getitem__(self, passage: int) -> dict[str, Tensor]:
        """A passage; what an earlier one predicts has no labels."""
        m, begin = self.dataset.chunks.size, int(self._begins[passage])
        read = self.dataset.part(int(self._items[passage]), begin // m, (begin + self.window) // m)
        if begin:
            read["labels"][: self.window - self.stride] = NOT_SCORED
        return {**read, "document": torch.tensor(int(self.documents[passage]))}


def overlapping(dataset: RetroDataset, window: int, stride: int | None = None) -> Passages:
    """Passages in which every token but a document's first is predicted, as late as can be.

    Args:
        dataset, window: as of `Passages`.
        stride: None: half the window.

    Raises:
        SettingError: the stride is not below the window, or neither are whole chunks.
    """
    m = dataset.chunks.size
    stride = max(window // 2 // m, 1) * m if stride is None else stride
    if stride >= window:
        raise SettingError(
            f"stride {stride} must be below the window, {window}, or the first tokens of passages "
            f"would not be predicted: take a window of {2 * m} tokens or more, and a smaller stride"
        )
    return Passages(dataset, window, stride)


@dataclass(frozen=True)
class Variation:
    """What training does to neighbours, so that a model cannot rely on where they stand.

    Attributes:
        dropout: probability that a neighbour is left out.
        shuffle: put the neighbours of each chunk in a random order.
    """

    dropout: float = 0.0
    shuffle: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise SettingError(f"neighbour_dropout must lie in [0, 1], got {self.dropout}")

    def of(
        self, neighbours: Int[Tensor, "chunks k length"], random: np.random.Generator
    ) -> Int[Tensor, "chunks k length"]:
        """The neighbours, varied; those left out are padding."""
        chunks, k = neighbours.shape[:2]
        if self.shuffle:
            order = torch.from_numpy(random.random((chunks, k)).argsort(1))
            neighbours = neighbours.gather(1, order[..., None].expand_as(neighbours))
        if self.dropout:
            dropped = torch.from_numpy(random.random((chunks, k)) < self.dropout)
            neighbours = neighbours.masked_fill(dropped[..., None], -1)
        return neighbours


class Course(Dataset[dict[str, Tensor]]):
    """What training reads, item after item: a pure function of the seed and an item's number."""

    def __init__(
        self, passages: Passages, seed: int, items: int, variation: Variation | None = None
    ) -> None:
        self.passages = passages
        self._ordered = OrderedDataset(passages, seed, items)
        self._variation = variation or Variation()

    def __len__(self) -> int:
        """Items."""
        return len(self._ordered)

    def document(self, item: int) -> int:
        """Which document an item is of."""
        return int(self.passages.documents[self._ordered.number(item)])

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """What stands at a place of the course."""
        read = self._ordered[item]
        random = np.random.default_rng([self._ordered.seed, item, 1])
        return {**read, "neighbour_ids": self._variation.of(read["neighbour_ids"], random)}


class PassageCollate:
    """As `Collate`, with the `documents` of the batch."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, padded on the right."""
        return {
            **self._collate(items),
            "documents": torch.stack([item["document"] for item in items]),
        }


def next_labels(labels: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
    """Labels as a data set gives them → the token that each position predicts.

    Args:
        labels: the input's own tokens, NOT_SCORED where none is to be predicted; never shifted.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NOT_SCORED)
