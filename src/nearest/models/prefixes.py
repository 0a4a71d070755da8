"""The sequences of a forward pass, and what a method carries from one prediction to the next.

State belongs to a prefix of tokens and not to a row of a batch: beams that change places, drafts
that are taken back and rows that are padded then need no care. What is kept is the last pass's
predictions, for the next pass goes on from one of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from nearest.corpus.tokens import Tokens
from nearest.errors import ModelError
from nearest.index.neighbours import NO_ENTRY
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.lookup import Lookup, Queries, stacked

_BETWEEN = np.array([-1])  # no token: a context ends where the next row's begins


@dataclass(frozen=True)
class Sequences:
    """All tokens of the rows of a forward pass, those that its cache holds included.

    Attributes:
        ids: int64 [rows, columns], on the CPU; a pass sees the last columns.
        starts: the column at which each row begins, after its left padding.
        first: the first column whose prediction is looked up; None for the first with logits.
    """

    ids: Int[np.ndarray, "rows columns"]
    starts: Int[np.ndarray, " rows"]
    first: int | None

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, first: int | None = None) -> "Sequences":
        """From token ids and the attention mask, whose zeros in front are padding."""
        rows, columns = ids.shape
        starts = np.zeros(rows, dtype=np.int64)
        if mask is not None and mask.shape == ids.shape:
            attended = mask.cpu().numpy() > 0
            starts = np.where(attended.any(axis=1), attended.argmax(axis=1), columns)
        return cls(ids.cpu().numpy(), starts, first)

    @classmethod
    def of_call(cls, named: Mapping[str, Any]) -> "Sequences":
        """From the arguments of a call of the model, when they hold whole sequences.

        Raises:
            ModelError: there are no tokens, or a cache stands for those before.
        """
        ids, cache = named.get("input_ids"), named.get("past_key_values")
        if ids is None or (cache is not None and int(cache.get_seq_length()) > 0):
            raise ModelError(
                "this method looks at the tokens before a prediction, and a call with a cache or "
                "with embeddings does not show them: use model.generate with input_ids, or give "
                "whole sequences"
            )
        return cls.of(ids, named.get("attention_mask"))


class Row(NamedTuple):
    """One sequence without padding, and its positions that are looked up: e predicts e + 1."""

    tokens: Tokens  # int64
    ends: Int[np.ndarray, " n"]  # consecutive
    keys: Float[np.ndarray, "n dim"]


class Place(NamedTuple):
    """A position that is looked up: of which row, the nth of its positions."""

    row: int
    nth: int


class Pass:
    """Which positions of a forward pass get logits, and which are looked up."""

    def __init__(
        self, sequences: Sequences, width: int, keep: int | Tensor, keeps_state: bool
    ) -> None:
        rows, columns = sequences.ids.shape
        if columns < width:
            raise ModelError(
                "this method looks at the tokens before a prediction, and embeddings do not show "
                "them: give input_ids"
            )
        self._sequences = sequences
        self._width = width
        self._offset = columns - width
        grid = torch.arange(rows * width).reshape(rows, width, 1)
        kept: Tensor = slice_logits_to_keep(grid, keep)
        self._with_logits: Int[np.ndarray, " n"] = kept.reshape(-1).numpy()
        last = np.full(rows, -1)
        np.maximum.at(last, self._with_logits // width, self._with_logits % width)
        begin = np.full(rows, width)
        np.minimum.at(begin, self._with_logits // width, self._with_logits % width)
        if sequences.first is not None:
            first = max(0, sequences.first - self._offset)
            begin = np.full(rows, first) if keeps_state else np.maximum(begin, first)
        self._begin = np.maximum(begin, sequences.starts - self._offset)
        self._end = last + 1

    @property
    def positions(self) -> int:
        """How many positions from the end reach all that is looked up."""
        some = self._begin < self._end
        return int(self._width - self._begin[some].min()) if some.any() else 0

    def rows(self, hidden: Float[Tensor, "rows states dim"]) -> list[Row]:
        """The rows with the states of their positions, the last of each in `hidden`."""
        missing = self._width - hidden.shape[1]
        rows = []
        for row, (begin, end) in enumerate(zip(self._begin, self._end, strict=True)):
            start = int(self._sequences.starts[row])
            stop = max(int(begin), int(end))
            rows.append(
                Row(
                    self._sequences.ids[row, start : self._offset + stop],
                    np.arange(begin, stop) + self._offset - start,
                    hidden[row, int(begin) - missing : stop - missing].float().cpu().numpy(),
                )
            )
        return rows

    def logits_of(self, places: Sequence[Place]) -> Int[np.ndarray, " places"]:
        """Which of the flattened logits belongs to each place; -1 where there is none."""
        number = np.full(len(self._begin) * self._width, -1)
        number[self._with_logits] = np.arange(len(self._with_logits))
        at = [place.row * self._width + int(self._begin[place.row]) + place.nth for place in places]
        found: Int[np.ndarray, " places"] = number[at]
        return found


class Prefixes:
    """Candidates for the sequences of one forward pass after another."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._last: list[tuple[Row, list[Candidates]]] = []

    def predict(self, rows: Sequence[Row]) -> list[tuple[list[Place], Candidates]]:
        """Candidates of every position of the rows, in batches.

        A method without state takes all at once; else the rows advance side by side, each from the
        prefix in the last pass that it goes on from, or from nothing.
        """
        places = [Place(r, n) for r, row in enumerate(rows) for n in range(len(row.ends))]
        if not self._lookup.keeps_state:
            return [(places, self._lookup.candidates(_queries(rows, places)))] if places else []
        batches = []
        found: list[list[Candidates]] = [[] for _ in rows]
        for time in range(max((len(row.ends) for row in rows), default=0)):
            now = [place for place in places if place.nth == time]
            pointers = [self._pointers(r, rows[r], found[r]) for r, _ in now]
            candidates = self._lookup.candidates(_queries(rows, now), stacked(pointers))
            for i, place in enumerate(now):
                found[place.row].append(candidates.rows(slice(i, i + 1)))
            batches.append((now, candidates))
        self._last = list(zip(rows, found, strict=True))
        return batches

    def _pointers(self, number: int, row: Row, found: list[Candidates]) -> Int[np.ndarray, "_"]:
        """What the row's prefix points to, at the position after those found."""
        end = int(row.ends[len(found)])
        before = found[-1] if found else self._parent(number, row.tokens[:end])
        if before is None:
            return np.full(1, NO_ENTRY, dtype=np.int64)
        pointers: Int[np.ndarray, "_"] = self._lookup.follow(before, row.tokens[end : end + 1])[0]
        return pointers

    def _parent(self, number: int, prefix: Tokens) -> Candidates | None:
        """What the last pass found after these tokens; most often in the row of the same number."""
        for other in sorted(range(len(self._last)), key=lambda other: other != number):
            row, found = self._last[other]
            nth = len(prefix) - 1 - int(row.ends[0]) if found else -1
            if 0 <= nth < len(found) and np.array_equal(row.tokens[: len(prefix)], prefix):
                return found[nth]
        return None


def _queries(rows: Sequence[Row], places: Sequence[Place]) -> Queries:
    starts = np.cumsum([0, *(len(row.tokens) + 1 for row in rows)])
    return Queries(
        np.stack([rows[r].keys[n] for r, n in places]),
        np.concatenate([part for row in rows for part in (row.tokens, _BETWEEN)]),
        np.array([starts[r] + rows[r].ends[n] for r, n in places]),
    )
