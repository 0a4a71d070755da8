"""Documents with the neighbours of their chunks, as training and evaluation read them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from nearest.errors import CorpusError, SettingError
from nearest.retro.data.chunks import Chunks
from nearest.retro.data.table import NeighbourTable

NOT_SCORED = -100


class RetroDataset(Dataset[dict[str, Tensor]]):
    """An item is a document: `input_ids` [n], `labels` [n], `neighbour_ids` [chunks, k, length].

    Labels are the input, unshifted, −100 where nothing is scored. Items differ in length: `collate`
    makes a batch of them. Documents without tokens are left out.
    """

    def __init__(
        self,
        chunks: Chunks,
        database: Chunks,
        table: NeighbourTable,
        *,
        neighbours: int = 2,
        continuation: int = 1,
        max_len: int | None = None,
        subset: Sequence[int] | None = None,
    ) -> None:
        """Documents of a corpus with neighbours from a database.

        Args:
            chunks: what is read.
            database: what the table's ids count.
            table: of these two.
            neighbours: read of each chunk, the nearest.
            continuation: chunks that follow each neighbour, never past its document's end.
            max_len: tokens read of each document, the first; whole chunks. None: all.
            subset: documents by number, in their order; see `read_subset`.

        Raises:
            SettingError: the table is of other corpora, or a number is out of its range.
        """
        table.check(chunks, database)
        if max_len is not None and (max_len < 1 or max_len % chunks.size):
            raise SettingError(
                f"max_len {max_len} must be a multiple of the chunk size, {chunks.size}: "
                "neighbours belong to whole chunks"
            )
        if continuation < 0:
            raise SettingError(f"continuation must be 0 chunks or more, got {continuation}")
        self.chunks = chunks
        self.database = database
        self.table = table
        self._ids = table.first(neighbours)
        self.neighbours = neighbours
        self.continuation = continuation
        self._most = None if max_len is None else max_len // chunks.size
        wanted = np.arange(chunks.documents) if subset is None else np.asarray(subset, np.int64)
        _check_subset(wanted, chunks.documents)
        self.documents = wanted[np.diff(chunks.first)[wanted] > 0]

    def __len__(self) -> int:
        """Documents."""
        return len(self.documents)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """A document; IndexError past the last, as sequences have it."""
        return self.part(item, 0, self._most)

    def lengths(self) -> Int[np.ndarray, " items"]:
        """Tokens of each document that are read."""
        found: np.ndarray = self.chunks.lengths[self.documents]
        return found if self._most is None else found.clip(max=self._most * self.chunks.size)

    def part(self, item: int, first: int, stop: int | None) -> dict[str, Tensor]:
        """Some chunks of a document, counted within it, as an item of its own."""
        ids = np.asarray(self.chunks.of_document(int(self.documents[item]))[first:stop])
        tokens = self.chunks.rows(ids)
        tokens = tokens[tokens >= 0]
        neighbours = self.database.rows(self._ids[ids], self.continuation)
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(tokens.copy()),
            "neighbour_ids": torch.from_numpy(neighbours),
        }

    @property
    def table_digest(self) -> str:
        """Another one where chunks have other neighbours, among those that are read."""
        return digest_of(self._ids)

    def ordered(self, seed: int, steps: int) -> "OrderedDataset":
        """Items in a shuffled order that a step's number alone decides: to be read in sequence."""
        return OrderedDataset(self, seed, steps)


@runtime_checkable
class Items(Protocol):
    """A data set of known size."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> dict[str, Tensor]: ...


class OrderedDataset(Dataset[dict[str, Tensor]]):
    """A data set read for so many steps, shuffled anew in each pass over it.

    Item i is a pure function of (seed, i): a resumed run, or one on more processes, reads the same.
    """

    def __init__(self, dataset: Items, seed: int, steps: int) -> None:
        if not len(dataset):
            raise CorpusError("no document has a token: there is nothing to train on")
        self.dataset = dataset
        self.seed = seed
        self.steps = steps
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch read last

    def __len__(self) -> int:
        """Items."""
        return self.steps

    def number(self, step: int) -> int:
        """Which item of the data set a step reads."""
        epoch, place = divmod(step, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._order = epoch, random.permutation(len(self.dataset))
        return int(self._order[1][place])

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """What a step reads."""
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return self.dataset[self.number(step)]


class Collate:
    """Makes a batch of items: padded on the right, with an attention mask.

    >>> item = {name: torch.tensor([5, 6]) for name in ("input_ids", "labels")}
    >>> item["neighbour_ids"] = torch.tensor([[[7]]])
    >>> Collate(pad_token_id=0, chunk_size=2)([item])["attention_mask"].tolist()
    [[1, 1]]
    """

    def __init__(self, pad_token_id: int, chunk_size: int, chunk_count: str = "ceil") -> None:
        """For a model with these settings (`RetroConfig`)."""
        self.pad_token_id = pad_token_id
        self.chunk_size = chunk_size
        self.chunk_count = chunk_count

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels`, and `neighbour_ids` of as many chunks as fit."""
        longest = max(len(item["input_ids"]) for item in items)
        whole, rest = divmod(longest, self.chunk_size)
        chunks = whole + (rest > 0 and self.chunk_count == "ceil")
        shape = items[0]["neighbour_ids"].shape[1:]
        batch = {
            "input_ids": torch.full((len(items), longest), self.pad_token_id),
            "attention_mask": torch.zeros((len(items), longest), dtype=torch.int64),
            "labels": torch.full((len(items), longest), NOT_SCORED),
            "neighbour_ids": torch.full((len(items), chunks, *shape), -1),
        }
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            batch["input_ids"][row, :length] = item["input_ids"]
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = item["labels"]
            found = item["neighbour_ids"][:chunks]
            batch["neighbour_ids"][row, : len(found)] = found
        return batch


def read_subset(path: Path | str, documents: int) -> list[int]:
    """Document numbers from a file, one a line, their order kept.

    Raises:
        CorpusError: a line is blank, no number, or of no document; it is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read ({error}): give a number a line") from error
    numbers: list[int] = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            raise CorpusError(f"{path}, line {line} is blank: remove it, or write a number")
        if not text.strip().isdecimal():
            raise CorpusError(f"{path}, line {line} is {text!r}: write a document's number")
        if int(text) >= documents:
            raise CorpusError(
                f"{path}, line {line} is {int(text)}, but documents are numbered 0 to "
                f"{documents - 1}: remove it, or take the right corpus"
            )
        numbers.append(int(text))
    return numbers


def digest_of(*arrays: np.ndarray) -> str:
    """The same for the same numbers in the same types; what lies on disk is read in pieces."""
    found = hashlib.sha256()
    for array in arrays:
        for begin in range(0, len(array), 1 << 16):
            found.update(np.ascontiguousarray(array[begin : begin + (1 << 16)]).data)
    return found.hexdigest()[:16]


def _check_subset(numbers: Int[np.ndarray, " n"], documents: int) -> None:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < documents):
        raise SettingError(
            f"the subset names documents {numbers.min()} to {numbers.max()}, but there are "
            f"{documents}, numbered from 0: leave the others out"
        )
