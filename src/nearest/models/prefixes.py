"""The sequences of a forward pass, and what a method carries from one pass to the next.

State belongs to a prefix of tokens (after a source, where an encoder read one) and not to a row of
a batch: beams that change places, drafts that are taken back and padded rows then need no care. The
predictions of the last pass are kept, since the next pass goes on from one of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from nearest.corpus.tokens import Tokens
from nearest.encode.view import LmView, lm_view
from nearest.errors import ModelError
from nearest.machine import code_can_be_cached
from nearest.models.arguments import TextArguments
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries, Sources
from nearest.retrieval.step import UNKNOWN, Prediction, State, advance, step, steps

_BLOCK = 1 << 20  # log-probabilities that are made at once for positions whose rows nobody gets


@dataclass(frozen=True)
class Sequences:
    """All tokens of the rows of a forward pass, those that its cache holds included.

    Attributes:
        ids: int64 [rows, columns], on the CPU; a pass sees the last columns.
        starts: the column at which each row begins, after its left padding.
        first: the first column whose prediction is looked up; None for the first with logits.
        encoded: a number for what an encoder read with each row, the same for the same.
        sources: the tokens that it read with each row; None where they are not shown.
    """

    ids: Int[np.ndarray, "rows columns"]
    starts: Int[np.ndarray, " rows"]
    first: int | None
    encoded: Int[np.ndarray, " rows"]
    sources: Sequence[Tokens] | None = None

    @classmethod
    def of(
        cls,
        ids: Tensor,
        mask: Tensor | None,
        first: int | None = None,
        encoded: Int[np.ndarray, " rows"] | None = None,
        sources: Sequence[Tokens] | None = None,
    ) -> "Sequences":
        """Build from token ids and an attention mask, whose leading zeros are padding."""
        rows, columns = ids.shape
        starts = np.zeros(rows, dtype=np.int64)
        if mask is not None and mask.shape == ids.shape:
            attended = mask.cpu().numpy() > 0
            starts = np.where(attended.any(axis=1), attended.argmax(axis=1), columns)
        if encoded is None:
            encoded = np.zeros(rows, dtype=np.int64)
        return cls(ids.cpu().numpy(), starts, first, encoded, sources)

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
        return cls.of(ids, named.get(text.mask), sources=text.sources(named))


def row_hashes(states: Tensor) -> Int[np.ndarray, " rows"]:
    """A number for each row of a tensor, the same for the same values."""
    rows = states.detach().float().cpu().numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], np.int64)


class LookedUp(NamedTuple):
    """The n positions of a pass that are looked up, row after row; position e predicts e + 1.

    Attributes:
        tokens: of each row, without its left padding.
        encoded: as in `Sequences`.
        queries: one a position.
        rows: the row of each.
        ends: its position in the row's tokens; consecutive in a row.
        targets: the token that comes after it, UNKNOWN at the end of a row.
        lm_log_probs: the model's of each target, where a guard asks for them.
        returned: the number of its row among the m rows of log-probabilities that the caller gets;
            -1 for one that the caller does not ask for.
    """

    tokens: list[Tokens]
    encoded: Int[np.ndarray, " rows"]
    queries: Queries
    rows: Int[np.ndarray, " n"]
    ends: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    lm_log_probs: Float[Tensor, " n"]
    returned: Int[np.ndarray, " n"]


class LookupSpans:
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
        # Of the cells of the pass, those whose logits the caller gets, in their order.
        cells = np.arange(rows * width).reshape(rows, width)
        if isinstance(keep, int):
            kept = cells[:, -keep:].ravel()
            begin, end = int(kept[0]), width
        else:
            of_torch = torch.from_numpy(cells)[..., None].to(keep.device)
            kept = slice_logits_to_keep(of_torch, keep).reshape(-1).cpu().numpy()
            begin, end = int((kept % width).min()), int((kept % width).max()) + 1
        self._where = np.full(rows * width, -1, dtype=np.int64)
        self._where[kept] = np.arange(len(kept))
        self.filled = self._where[kept]  # a cell that is asked for twice is filled once
        if sequences.first is not None:
            first = max(0, sequences.first - self._offset)
            begin = first if keeps_state else max(begin, first)
        self._begins = np.maximum(begin, sequences.starts - self._offset)
        self._ends = np.maximum(self._begins, end)

    @property
    def reach(self) -> int:
        """How many columns from the end hold all that are looked up."""
        return self._width - int(self._begins.min())

    def looked_up(
        self,
        hidden: Float[Tensor, "rows states dim"],
        logits: Float[Tensor, "rows logits vocab"],
        log_probs: Float[Tensor, "kept vocab"],
        *,
        with_view: bool,
        with_lm: bool,
    ) -> LookedUp:
        """The positions of the pass with what the model makes of them.

        Args:
            hidden, logits: of the pass's last columns.
            log_probs: the model's, of what the caller gets.
            with_view: what gates see of the model's predictions is asked for.
            with_lm: the model's log-probabilities of the targets are.
        """
        starts = self._sequences.starts
        tokens = [
            row[start : self._offset + end]
            for row, start, end in zip(self._sequences.ids, starts, self._ends, strict=True)
        ]
        rows, columns, ends, context, at = _laid_out(
            self._sequences.ids, starts, self._offset, self._begins, self._ends
        )
        targets = context[at + 1]
        returned = self._where[rows * self._width + columns]
        keys = _cells(hidden, rows, columns, self._width).float().cpu().numpy()
        lm_log_probs, view = torch.zeros(len(rows)), None
        if with_view or with_lm:
            lm_log_probs, view = self._model_says(
                logits, log_probs, rows, columns, targets, returned, with_view=with_view
            )
        read = self._sequences.sources
        sources = None if read is None else Sources(read, rows)
        queries = Queries(keys, context, at, view, sources=sources)
        return LookedUp(
            tokens, self._sequences.encoded, queries, rows, ends, targets, lm_log_probs, returned
        )

    def _model_says(
        self,
        logits: Float[Tensor, "rows logits vocab"],
        log_probs: Float[Tensor, "kept vocab"],
        rows: Int[np.ndarray, " n"],
        columns: Int[np.ndarray, " n"],
        targets: Int[np.ndarray, " n"],
        returned: Int[np.ndarray, " n"],
        *,
        with_view: bool,
    ) -> tuple[Float[Tensor, " n"], LmView | None]:
        """The model's log-probability of each target, and the view; nothing larger is kept."""
        if (targets == UNKNOWN).all() and _counts_up(returned, len(log_probs)):
            return torch.zeros(len(rows)), lm_view(log_probs) if with_view else None
        targeted = torch.zeros(len(rows))
        view = LmView(*np.empty((2, len(rows)), dtype=np.float32)) if with_view else None
        block = max(1, _BLOCK // logits.shape[-1])
        for shown in (False, True):
            at = np.flatnonzero((returned >= 0) == shown)
            for start in range(0, len(at), block):
                some = at[start : start + block]
                if shown:
                    part = log_probs.detach()[torch.from_numpy(returned[some]).to(logits.device)]
                else:
                    part = _cells(logits.detach(), rows[some], columns[some], self._width)
                    part = part.float().log_softmax(-1)
                came = torch.from_numpy(targets[some]).to(part.device).clamp(min=0)
                targeted[torch.from_numpy(some)] = part.gather(-1, came[:, None])[:, 0].cpu()
                if view is not None:
                    for whole, found in zip(view, lm_view(part), strict=True):
                        whole[some] = found
        return targeted, view


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, cache=code_can_be_cached())
def _laid_out(ids: Any, starts: Any, offset: Any, begins: Any, stops: Any) -> Any:
    """Row after row the cells of a pass that are looked up, and the context that they are of.

    Of each its row, its column, its position in the row's tokens and that in the context, in which
    UNKNOWN comes after each row's tokens.
    """
    size = (stops - begins).sum()
    rows, columns, ends, at = np.empty((4, size), np.int64)
    lasts = np.minimum(offset + stops, ids.shape[1])
    context = np.empty((lasts - starts + 1).sum(), np.int64)
    n = place = 0
    for row in range(len(ids)):
        for column in range(begins[row], stops[row]):
            rows[n], columns[n], ends[n] = row, column, offset + column - starts[row]
            at[n] = place + ends[n]
            n += 1
        for column in range(starts[row], lasts[row]):
            context[place] = ids[row, column]
            place += 1
        context[place] = UNKNOWN
        place += 1
    return rows, columns, ends, context, at


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _counts_up(numbers: Any, to: Any) -> Any:
    """Whether they are 0, 1, 2 … up to below `to`."""
    wrong = len(numbers) != to
    for i in range(len(numbers)):
        wrong = wrong or numbers[i] != i
    return not wrong
# fmt: on


def _cells(
    of_pass: Float[Tensor, "rows columns size"],
    rows: Int[np.ndarray, " n"],
    columns: Int[np.ndarray, " n"],
    width: int,
) -> Float[Tensor, "n size"]:
    """Some cells of what holds the last columns of a pass, in their order."""
    device, missing = of_pass.device, width - of_pass.shape[1]
    if len(rows) == of_pass.shape[0] * of_pass.shape[1]:
        return of_pass.flatten(0, 1)  # all of them
    at = torch.from_numpy(columns - missing).to(device)
    return of_pass[torch.from_numpy(rows).to(device), at]


def rows_of(
    log_probs: Float[Tensor, "n vocab"], rows: Int[np.ndarray, " m"]
) -> Float[Tensor, "m vocab"]:
    """Some rows; the same tensor, not a copy, where these are all of them in their order."""
    if _counts_up(rows, len(log_probs)):
        return log_probs
    return log_probs[torch.from_numpy(rows).to(log_probs.device)]


class Prefixes:
    """One memory's predictions for the sequences of one forward pass after another."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._tokens: list[Tokens] = []
        self._encoded = np.empty(0, dtype=np.int64)
        # By row and position: a prediction of the last pass, its row there, and its row in `_base`.
        self._reached: dict[tuple[int, int], tuple[Prediction, int, int]] = {}
        self._base: Tensor | None = None

    def mix(
        self, these: LookedUp, base: Float[Tensor, "m vocab"], *, follow: bool
    ) -> Float[Tensor, "m vocab"]:
        """Log-probabilities of base and memory together, of the positions that are returned.

        Args:
            these: the positions of the pass.
            base: the model's log-probabilities of those that are returned, in their order.
            follow: keep what a later pass may go on from.
        """
        shown = np.flatnonzero(these.returned >= 0)
        if not (self._lookup.keeps_state or self._lookup.settings.guard):
            queries = these.queries.rows(shown)
            return step(self._lookup, queries, State.start(len(shown))).log_probs(base)
        rank = np.full(len(these.returned), -1)
        rank[shown] = np.arange(len(shown))
        mixed, ranks = [], []
        reached: dict[tuple[int, int], tuple[Prediction, int, int]] = {}
        for one in steps(
            self._lookup,
            these.queries,
            these.rows,
            these.targets,
            these.lm_log_probs,
            self._begun(these),
        ):
            at = np.flatnonzero(rank[one.rows] >= 0)
            if not len(at):
                continue
            prediction = one.prediction if len(at) == len(one.rows) else one.prediction.rows(at)
            places = rank[one.rows[at]]
            mixed.append(prediction.log_probs(rows_of(base, places)))
            ranks.append(places)
            if follow:
                for i, row in enumerate(one.rows[at].tolist()):
                    key = int(these.rows[row]), int(these.ends[row])
                    reached[key] = prediction, i, int(places[i])
        if follow:
            self._tokens, self._encoded = these.tokens, these.encoded
            self._reached, self._base = reached, base.detach()
        if len(mixed) == 1 and _counts_up(ranks[0], len(shown)):
            return mixed[0]
        order = torch.from_numpy(np.argsort(np.concatenate(ranks)))
        return torch.cat(mixed)[order.to(base.device)]

    def _begun(self, these: LookedUp) -> dict[int, State]:
        """The state of each row whose first position goes on from a prefix of the last pass."""
        states: dict[int, State] = {}
        if self._base is None:
            return states
        firsts = np.searchsorted(these.rows, np.arange(len(these.tokens)))
        for row, first in enumerate(firsts.tolist()):
            if first == len(these.rows) or these.rows[first] != row:
                continue  # nothing of it is looked up
            end = int(these.ends[first])
            found = self._parent(row, these.tokens[row][:end], these.encoded[row])
            if found is not None:
                prediction, i, place = found
                token = these.tokens[row][end : end + 1]
                lm = self._base[place, int(token[0])].reshape(1).cpu()
                states[row] = advance(prediction.row(i), token, lm)
        return states

    def _parent(
        self, number: int, prefix: Tokens, encoded: np.int64
    ) -> tuple[Prediction, int, int] | None:
        """The last pass's prediction after a prefix, looked for in row `number` first."""
        for other in sorted(range(len(self._tokens)), key=lambda other: other != number):
            found = self._reached.get((other, len(prefix) - 1))
            if found is None or self._encoded[other] != encoded:
                continue
            if np.array_equal(self._tokens[other][: len(prefix)], prefix):
                return found
        return None
