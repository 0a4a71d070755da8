"""The sequences of a forward pass, and what a method carries from one prediction to the next.

State belongs to a prefix of tokens (after a source, where an encoder read one) and not to a row of
a batch: beams that change places, drafts that are taken back and rows that are padded then need no
care. What is kept is the last pass's predictions, for the next pass goes on from one of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from nearest.corpus.tokens import Tokens
from nearest.encode.view import LmView, lm_view
from nearest.errors import ModelError
from nearest.index.neighbours import NO_ENTRY
from nearest.models.arguments import TextArguments
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.gates.guard import gained, guarded
from nearest.retrieval.lookup import Lookup, stacked
from nearest.retrieval.queries import Queries

_BETWEEN = np.array([-1])  # no token: a context ends where the next row's begins


@dataclass(frozen=True)
class Sequences:
    """All tokens of the rows of a forward pass, those that its cache holds included.

    Attributes:
        ids: int64 [rows, columns], on the CPU; a pass sees the last columns.
        starts: the column at which each row begins, after its left padding.
        first: the first column whose prediction is looked up; None for the first with logits.
        sources: a number for what an encoder read with each row, the same for the same.
    """

    ids: Int[np.ndarray, "rows columns"]
    starts: Int[np.ndarray, " rows"]
    first: int | None
    sources: Int[np.ndarray, " rows"]

    @classmethod
    def of(
        cls,
        ids: Tensor,
        mask: Tensor | None,
        first: int | None = None,
        sources: Int[np.ndarray, " rows"] | None = None,
    ) -> "Sequences":
        """From token ids and the attention mask, whose zeros in front are padding."""
        rows, columns = ids.shape
        starts = np.zeros(rows, dtype=np.int64)
        if mask is not None and mask.shape == ids.shape:
            attended = mask.cpu().numpy() > 0
            starts = np.where(attended.any(axis=1), attended.argmax(axis=1), columns)
        if sources is None:
            sources = np.zeros(rows, dtype=np.int64)
        return cls(ids.cpu().numpy(), starts, first, sources)

    @classmethod
    def of_call(cls, text: TextArguments, named: Mapping[str, Any]) -> "Sequences":
        """From the arguments of a call of the model, when they hold whole sequences.

        Raises:
            ModelError: there are no tokens, or a cache stands for those before.
        """
        ids, cache = text.tokens(named), named.get("past_key_values")
        if ids is None or (cache is not None and int(cache.get_seq_length()) > 0):
            raise ModelError(
                "this method looks at the tokens before a prediction, and a call with a cache or "
                "with embeddings does not show them: use model.generate with input_ids, or give "
                f"whole sequences ({text.ids})"
            )
        return cls.of(ids, named.get(text.mask))


def row_hashes(states: Tensor) -> Int[np.ndarray, " rows"]:
    """A number for each row of a tensor, the same for the same values."""
    rows = states.detach().float().cpu().numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], np.int64)


class Row(NamedTuple):
    """One sequence without padding, and its positions that are looked up: e predicts e + 1.

    The model's log-probabilities are there for the last of the positions, or for all. `source` is a
    number for what an encoder read with it.
    """

    tokens: Tokens  # int64
    ends: Int[np.ndarray, " n"]  # consecutive
    keys: Float[np.ndarray, "n dim"]
    lm_log_probs: Float[Tensor, "m vocab"]
    source: int = 0


class Pass:
    """Which columns of a forward pass are looked up in each row."""

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
        columns_of = torch.arange(width, device=keep.device if isinstance(keep, Tensor) else None)
        kept: Tensor = slice_logits_to_keep(columns_of.expand(rows, width)[:, :, None], keep)
        begin, end = int(kept.min()), int(kept.max()) + 1
        if sequences.first is not None:
            first = max(0, sequences.first - self._offset)
            begin = first if keeps_state else max(begin, first)
        begins: list[int] = np.maximum(begin, sequences.starts - self._offset).tolist()
        self._spans = [(begin, max(begin, end)) for begin in begins]  # of each row's columns

    @property
    def reach(self) -> int:
        """How many columns from the end hold all that are looked up."""
        return self._width - min(begin for begin, _ in self._spans)

    def rows(
        self,
        hidden: Float[Tensor, "rows states dim"],
        lm_log_probs: Float[Tensor, "rows logits vocab"],
    ) -> list[Row]:
        """The rows of the pass; both tensors hold its last columns."""
        rows = []
        for row, (begin, end) in enumerate(self._spans):
            start = int(self._sequences.starts[row])
            rows.append(
                Row(
                    self._sequences.ids[row, start : self._offset + end],
                    np.arange(begin, end) + self._offset - start,
                    self._columns(hidden[row], begin, end).float().cpu().numpy(),
                    self._columns(lm_log_probs[row], begin, end),
                    int(self._sequences.sources[row]),
                )
            )
        return rows

    def put(
        self, mixed: Sequence[Float[Tensor, "_ vocab"]], into: Float[Tensor, "rows logits vocab"]
    ) -> None:
        """Write each row's mixtures into the log-probabilities that they belong to."""
        for row, (begin, end) in enumerate(self._spans):
            self._columns(into[row], begin, end)[:] = mixed[row]

    def _columns(
        self, of_row: Float[Tensor, "columns size"], begin: int, end: int
    ) -> Float[Tensor, "some size"]:
        """Those from `begin` to `end` that there are; `of_row` holds the last of the pass."""
        missing = self._width - len(of_row)
        return of_row[max(0, begin - missing) : max(0, end - missing)]


class _Reached(NamedTuple):
    """What was found after a prefix, and how well it has been predicted so far."""

    candidates: Candidates  # of one query
    gained: float
    predicted: tuple[Tensor, Tensor, Tensor] | None  # base, with memory, and guarded, [vocab] each


class Prefixes:
    """Mixtures for the sequences of one forward pass after another."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._last: list[tuple[Row, list[_Reached]]] = []

    def mix(self, rows: Sequence[Row]) -> list[Float[Tensor, "_ vocab"]]:
        """Log-probabilities of base and memory together, where the rows have those of the base.

        A method without state takes all positions at once; else the rows advance side by side, each
        from the prefix in the last pass that it goes on from, or from nothing.
        """
        if not self._lookup.keeps_state and not self._lookup.settings.guard:
            return self._mix_at_once(rows)
        reached: list[list[_Reached]] = [[] for _ in rows]
        for left in range(max(len(row.ends) for row in rows), 0, -1):  # rows end together
            going = [r for r, row in enumerate(rows) if len(row.ends) >= left]
            before = [reached[r][-1] if reached[r] else self._parent(r, rows[r]) for r in going]
            for r, found in zip(
                going, self._step([rows[r] for r in going], left, before), strict=True
            ):
                reached[r].append(found)
        self._last = list(zip(rows, reached, strict=True))
        return [
            torch.stack([one.predicted[2] for one in found if one.predicted])
            if len(row.lm_log_probs)
            else row.lm_log_probs
            for row, found in self._last
        ]

    def _mix_at_once(self, rows: Sequence[Row]) -> list[Float[Tensor, "_ vocab"]]:
        counts = [len(row.lm_log_probs) for row in rows]
        at = [slice(len(row.ends) - n, None) for row, n in zip(rows, counts, strict=True)]
        base = torch.cat([row.lm_log_probs for row in rows])
        if not len(base):
            return [row.lm_log_probs for row in rows]
        queries = _queries(rows, at, lm_view(base) if self._lookup.needs_lm else None)
        mixed = self._lookup.log_probs(queries, self._lookup.candidates(queries), base)
        return list(mixed.split(counts))

    def _step(
        self, rows: Sequence[Row], left: int, before: Sequence[_Reached | None]
    ) -> list[_Reached]:
        """The position of each row that is `left` from its end, from what was found before it."""
        lookup = self._lookup
        tokens = [int(row.tokens[row.ends[-left]]) for row in rows]
        pointers, gains = [], []
        for found, token in zip(before, tokens, strict=True):
            if found is None:
                pointers.append(np.full(1, NO_ENTRY, dtype=np.int64))
                gains.append(0.0)
            else:
                pointers.append(lookup.follow(found.candidates, np.array([token]))[0])
                gains.append(found.gained + _gain(found, token))
        at = [slice(len(row.ends) - left, len(row.ends) - left + 1) for row in rows]
        predicted: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(rows)
        if left > len(rows[0].lm_log_probs):
            candidates = lookup.candidates(_queries(rows, at), stacked(pointers))
        else:
            base = torch.stack([row.lm_log_probs[-left] for row in rows])
            queries = _queries(rows, at, lm_view(base) if lookup.needs_lm else None)
            candidates = lookup.candidates(queries, stacked(pointers))
            gated = mixed = lookup.log_probs(queries, candidates, base)
            if lookup.settings.guard:
                mixed = guarded(base, gated, gated.new_tensor(gains)[:, None])
            predicted = list(zip(base, gated, mixed, strict=True))
        return [
            _Reached(candidates.rows(slice(r, r + 1)), gains[r], predicted[r])
            for r in range(len(rows))
        ]

    def _parent(self, number: int, row: Row) -> _Reached | None:
        """What the last pass found before a row's first position; most often in the same row."""
        prefix = row.tokens[: int(row.ends[0])]
        for other in sorted(range(len(self._last)), key=lambda other: other != number):
            last, found = self._last[other]
            nth = len(prefix) - 1 - int(last.ends[0]) if found else -1
            if not 0 <= nth < len(found) or last.source != row.source:
                continue
            if np.array_equal(last.tokens[: len(prefix)], prefix):
                return found[nth]
        return None


def _gain(found: _Reached, token: int) -> float:
    """What the memory gained on a token that came."""
    if found.predicted is None:
        return 0.0
    base, mixed = (log_probs[token : token + 1].detach() for log_probs in found.predicted[:2])
    return float(gained(base, mixed))


def _queries(rows: Sequence[Row], at: Sequence[slice], lm: LmView | None = None) -> Queries:
    """Some positions of each row as one batch."""
    starts = np.cumsum([0, *(len(row.tokens) + 1 for row in rows)])
    return Queries(
        np.concatenate([row.keys[part] for row, part in zip(rows, at, strict=True)]),
        np.concatenate([part for row in rows for part in (row.tokens, _BETWEEN)]),
        np.concatenate(
            [start + row.ends[part] for start, row, part in zip(starts, rows, at, strict=False)]
        ),
        lm,
    )
