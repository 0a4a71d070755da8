"""What a memorizing layer remembers: the keys and values of a document's earlier segments.

State goes in and comes out: every change makes a new memory and leaves the old one as it was, so
that a pass can be repeated (gradient checkpointing) and beams can share what they began with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearest.errors import FolderError, ModelError, SettingError
from nearest.index.neighbours import NO_ENTRY, VectorIndex
from nearest.tensors import load_tensors, save_tensors

KeyIndex = Callable[[Float[np.ndarray, "n dim"]], VectorIndex]
_KIND = "attention memory"
_SCORES_AT_ONCE = 1 << 24  # elements of the score block that exact search holds


@dataclass(frozen=True, eq=False)
class AttentionMemory:
    """Cached keys and values, one memory for each sequence of a batch. arXiv:2203.08913 §3.

    Rows may hold different numbers of pairs: they end together, and `held` tells pairs from the
    gap in front of the shorter ones. At most `capacity` pairs a row are kept, the latest.

    With `index` given, the pairs that a query attends to are found by what it makes of one head's
    keys, float32 [n, dim], searched by inner product; the ids it gives are rows of these keys. It
    is made once for each head at the first search after a change. Without it every key is scored.

    >>> memory = AttentionMemory.empty(batch=1, heads=2, dim=4, capacity=3)
    >>> pairs = torch.arange(40.0).reshape(1, 2, 5, 4)
    >>> memory.extended(pairs, pairs).keys[0, 1, :, 0].tolist()
    [28.0, 32.0, 36.0]
    """

    keys: Float[Tensor, "batch heads n dim"]
    values: Float[Tensor, "batch heads n value_dim"]
    held: Bool[Tensor, "batch n"]
    capacity: int
    index: KeyIndex | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise SettingError(f"capacity must be at least 1 pair a row, got {self.capacity}")

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        dim: int,
        capacity: int,
        *,
        value_dim: int | None = None,
        index: KeyIndex | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "AttentionMemory":
        """A memory of nothing.

        Args:
            batch: sequences.
            heads: key-value heads, which are fewer than query heads in grouped attention.
            dim: of each head's keys.
            capacity: pairs kept for each sequence; the oldest are dropped.
            value_dim: of each head's values; as the keys' unless given.
            index: makes the index over one head's keys; None scores every key.
            dtype: of the stored keys and values.
            device: where they are.
        """
        keys = torch.empty(batch, heads, 0, dim, dtype=dtype, device=device)
        values = keys if value_dim is None else keys.new_empty(batch, heads, 0, value_dim)
        held = torch.empty(batch, 0, dtype=torch.bool, device=device)
        return cls(keys, values, held, capacity, index)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Pairs that each row holds."""
        return self.held.sum(1)

    def extended(
        self,
        keys: Float[Tensor, "_ _ _ _"],
        values: Float[Tensor, "_ _ _ _"],
        valid: Bool[Tensor, "_ _"] | Int[Tensor, "_ _"] | None = None,
    ) -> "AttentionMemory":
        """A memory with a segment's pairs after its own; beyond the capacity the oldest go.

        Args:
            keys: [batch, heads, length, dim]; gradients end here.
            values: [batch, heads, length, value_dim].
            valid: [batch, length], False where a row is padded: nothing is kept of padding.

        Raises:
            ModelError: the pairs do not fit the memory, or are not finite.
        """
        if valid is None:
            valid = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
        self._check_fit(keys, values, valid)
        valid = valid.bool()  # tokenizers give integers, whose complement is something else
        gap = ~valid[:, None, :, None]
        keys = keys.detach().to(self.keys).masked_fill(gap, 0)
        values = values.detach().to(self.values).masked_fill(gap, 0)
        _check_finite(keys, "keys")
        _check_finite(values, "values")
        return self._kept(
            torch.cat([self.keys, keys], dim=2),
            torch.cat([self.values, values], dim=2),
            torch.cat([self.held, valid], dim=1),
        )

    def cleared(self, ended: Bool[Tensor, " _"] | Int[Tensor, " _"]) -> "AttentionMemory":
        """A memory with nothing in the rows whose document has ended.

        Raises:
            ModelError: `ended` does not have one value for each row.
        """
        if ended.shape != self.held.shape[:1]:
            raise ModelError(
                f"the ends of documents are {tuple(ended.shape)}, this memory takes "
                f"{tuple(self.held.shape[:1])}: say of each row whether its document has ended"
            )
        return self._kept(self.keys, self.values, self.held & ~ended.bool()[:, None])

    def rows(self, chosen: Int[Tensor, " chosen"]) -> "AttentionMemory":
        """The memories of chosen rows, which may repeat: for beams and re-ordered batches."""
        return self._kept(self.keys[chosen], self.values[chosen], self.held[chosen])

    def nearest(
        self, queries: Float[Tensor, "batch heads q dim"], k: int
    ) -> Int[Tensor, "batch heads q k_or_n"]:
        """Columns of the k keys with the largest inner product, or of all where there are fewer.

        Column -1 stands where a row holds fewer than that.
        """
        k = min(k, self.keys.shape[2])
        with torch.no_grad():
            if self.index is not None:
                return self._indexed(queries, k)
            batch, heads, _, _ = queries.shape
            block = max(1, _SCORES_AT_ONCE // max(1, batch * heads * self.keys.shape[2]))
            gap = ~self.held[:, None, None, :]
            columns = [
                (part @ self.keys.mT).masked_fill_(gap, -torch.inf).topk(k).indices
                for part in queries.split(block, dim=2)
            ]
            found = torch.cat(columns, dim=2)
            return found.masked_fill_(~self.held_at(found), NO_ENTRY)

    def held_at(self, columns: Int[Tensor, "batch heads q k"]) -> Bool[Tensor, "batch heads q k"]:
        """Whether each column of its row is a pair; column -1 is none."""
        held = self.held[:, None, None, :].expand(*columns.shape[:3], -1)
        return held.gather(3, columns.clamp(min=0)) & (columns != NO_ENTRY)

    def _indexed(
        self, queries: Float[Tensor, "batch heads q dim"], k: int
    ) -> Int[Tensor, "batch heads q k"]:
        found = torch.full((*queries.shape[:3], k), NO_ENTRY)
        asked = queries.float().cpu().numpy()
        for (row, head), index in self._indexes.items():
            length = int(self.lengths[row])
            ids = torch.from_numpy(index.search(asked[row, head], min(k, length)).ids)
            gap = self.keys.shape[2] - length
            found[row, head, :, : ids.shape[1]] = torch.where(ids == NO_ENTRY, ids, ids + gap)
        return found.to(queries.device)

    @cached_property
    def _indexes(self) -> dict[tuple[int, int], VectorIndex]:
        """The index of each row and head that holds anything."""
        if self.index is None:
            return {}
        keys = self.keys.float().cpu().numpy()
        return {
            (row, head): self.index(np.ascontiguousarray(keys[row, head, -length:]))
            for row, length in enumerate(self.lengths.tolist())
            for head in range(keys.shape[1])
            if length
        }

    def _kept(
        self,
        keys: Float[Tensor, "b heads n dim"],
        values: Float[Tensor, "b heads n value_dim"],
        held: Bool[Tensor, "b n"],
    ) -> "AttentionMemory":
        """The latest pairs of each row, moved to the end; what is not held is zeroed."""
        width = min(self.capacity, int(held.sum(1).max())) if held.numel() else 0
        latest = slice(held.shape[1] - width, None)
        if bool(held.all()):  # nothing to move, and no copies
            return replace(
                self, keys=keys[:, :, latest], values=values[:, :, latest], held=held[:, latest]
            )
        order = held.int().argsort(dim=1, stable=True)[:, latest]
        held = held.gather(1, order)
        columns = order[:, None, :, None]
        return replace(
            self,
            keys=keys.take_along_dim(columns, 2).masked_fill(~held[:, None, :, None], 0),
            values=values.take_along_dim(columns, 2).masked_fill(~held[:, None, :, None], 0),
            held=held,
        )

    def _check_fit(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        batch, heads, _, dim = self.keys.shape
        length = keys.shape[2]
        for name, found, expected in (
            ("keys", keys.shape, (batch, heads, length, dim)),
            ("values", values.shape, (batch, heads, length, self.values.shape[3])),
            ("valid positions", valid.shape, (batch, length)),
        ):
            if tuple(found) != expected:
                raise ModelError(
                    f"the {name} are {tuple(found)}, this memory takes {expected}: give what "
                    "matches it, or begin an empty memory of the model's own sizes"
                )

    def save(self, path: Path | str) -> None:
        """Write the memory as one safetensors file, which appears whole or not at all.

        Raises:
            FolderError: it cannot be written.
        """
        tensors = {"keys": self.keys, "values": self.values, "held": self.held}
        save_tensors(Path(path), _KIND, tensors, {"capacity": self.capacity})

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        index: KeyIndex | None = None,
        device: torch.device | str = "cpu",
    ) -> "AttentionMemory":
        """Read what `save` wrote; an index is no part of it and is given anew.

        Raises:
            FolderError: the file is missing, damaged, or of another kind.
        """
        tensors, settings = load_tensors(Path(path), _KIND)
        try:
            keys, values, held = (tensors[name].to(device) for name in ("keys", "values", "held"))
            return cls(keys, values, held, settings["capacity"], index)
        except KeyError as error:
            raise FolderError(
                f"{path} has no {error}: another version of nearest wrote it; write it again"
            ) from error


def _check_finite(tensor: Float[Tensor, "batch heads length dim"], name: str) -> None:
    wrong = ~tensor.isfinite().flatten(1).all(1)
    if bool(wrong.any()):
        raise ModelError(
            f"the {name} of batch row {int(wrong.nonzero()[0])} are not all finite in "
            f"{tensor.dtype}, which would spoil every later segment: check the model's weights, "
            "or use a wider dtype"
        )
