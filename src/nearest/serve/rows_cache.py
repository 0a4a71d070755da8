"""A cache of rows of different lengths that are written in place.

Appending a column to a `DynamicCache` copies all of it, and so does taking a row out: with many
rows that costs more than the model. Here every layer has one buffer with room to spare. All rows
end at the same column, so that a step writes the same columns of each; a row that joins is copied
into the next free place, and one that leaves is overwritten by the last. A row that takes tokens
back leaves a gap, which is masked until rows are moved for want of room.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_SPARE_COLUMNS = 64


class RowsCache(Cache):
    """Cached states of several sequences, in columns that end at `end`.

    Attributes:
        rows: how many there are.
        lengths: of each row, in tokens.
        first: the first column that any row keeps.
    """

    def __init__(self, first: Any) -> None:
        """Begin with the rows of another cache, all of which have the same length."""
        self._buffers = [_RowsLayer(self, one.keys, one.values) for one in first.layers]
        super().__init__(layers=[*self._buffers])
        self.rows = 0
        self.end = int(first.get_seq_length())
        self._kept = np.zeros((0, self.end), dtype=bool)  # [room, capacity]
        self._count()
        self.add(first)

    @property
    def kept(self) -> Bool[np.ndarray, "rows columns"]:
        """Which of the columns that a pass sees are a row's own."""
        return self._kept[: self.rows, self.first : self.end]

    @torch.inference_mode()
    def add(self, other: Any) -> None:
        """Add the rows of a cache, all of which have the same length."""
        length, begin = int(other.get_seq_length()), self.rows
        stop = begin + len(other.layers[0].keys)
        if stop > len(self._kept):
            self._resize(max(length, *self.lengths, 0), stop + max(8, stop // 2))
        elif length > self.end:
            self._resize(length)
        own = slice(self.end - length, self.end)
        for buffer, layer in zip(self._buffers, other.layers, strict=True):
            buffer.all_keys[begin:stop, :, own] = layer.keys
            buffer.all_values[begin:stop, :, own] = layer.values
        self.rows = stop
        self._kept[begin:stop], self._kept[begin:stop, own] = False, True
        self._count()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> list[int]:
        """Forget the other rows; the numbers of the kept ones in the order that they have now."""
        order = [row for row in rows if row < len(rows)]
        last = [row for row in rows if row >= len(rows)]
        free = sorted(set(range(len(rows))) - set(order))
        columns = slice(self.first, self.end)
        for place, row in zip(free, last, strict=True):
            for buffer in self._buffers:
                buffer.all_keys[place, :, columns] = buffer.all_keys[row, :, columns]
                buffer.all_values[place, :, columns] = buffer.all_values[row, :, columns]
            self._kept[place] = self._kept[row]
        moved = dict(zip(free, last, strict=True))
        self.rows = len(rows)
        self._count()
        return [moved.get(place, place) for place in range(len(rows))]

    def make_room(self, columns: int) -> None:
        """See to it that so many columns can be appended."""
        if self.end + columns > self._kept.shape[1]:
            self._resize(max(self.lengths), spare=columns)

    def appended(self, columns: int) -> None:
        """All layers have written so many columns."""
        self._kept[: self.rows, self.end : self.end + columns] = True
        self.end += columns
        self._count()

    def take_back(self, columns: Sequence[int]) -> None:
        """Forget so many of each row's last columns."""
        for row, count in enumerate(columns):
            self._kept[row, self.end - count : self.end] = False
        self.end -= min(columns)
        self._count()

    def _count(self) -> None:
        kept = self._kept[: self.rows, : self.end]
        self.lengths: list[int] = kept.sum(axis=1).tolist()
        seen = kept.any(axis=0)
        self.first = int(seen.argmax()) if seen.any() else self.end

    def _resize(self, end: int, room: int | None = None, spare: int = 0) -> None:
        """Move all that rows keep so that it ends at a column, with room for half as much after."""
        kept, lengths = self.kept, np.array(self.lengths, dtype=np.int64)
        room = len(self._kept) if room is None else room
        capacity = end + max(_SPARE_COLUMNS, spare, end // 2)
        # Where each column's states come from; columns that no row keeps get any.
        order = np.argsort(kept, axis=1, kind="stable")[:, max(0, kept.shape[1] - end) :]
        source = torch.from_numpy(self.first + order)
        for buffer in self._buffers:
            buffer.resize(room, capacity, end, source)
        self._kept = np.zeros((room, capacity), dtype=bool)
        self._kept[: self.rows, :end] = np.arange(end) >= end - lengths[:, None]
        self.end = end
        self._count()


class _RowsLayer(CacheLayerMixin):
    """One layer's buffers [room, heads, capacity, dim]; stale columns hold finite numbers."""

    def __init__(self, rows: RowsCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows
        self.all_keys = keys[:0]
        self.all_values = values[:0]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers are made with the cache."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append a pass's columns; the states that it attends to."""
        rows, end = len(key_states), self._rows.end
        stop = end + key_states.shape[-2]
        self.all_keys[:rows, :, end:stop] = key_states
        self.all_values[:rows, :, end:stop] = value_states
        seen = slice(self._rows.first, stop)
        return self.all_keys[:rows, :, seen], self.all_values[:rows, :, seen]

    def resize(self, room: int, capacity: int, end: int, source: Tensor) -> None:
        """Buffers of another size, with columns `source` of each row, which then end at `end`."""
        self.all_keys = _moved(self.all_keys, room, capacity, end, source)
        self.all_values = _moved(self.all_values, room, capacity, end, source)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the longest row."""
        return self._rows.end - self._rows.first

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _moved(states: Tensor, room: int, capacity: int, end: int, source: Tensor) -> Tensor:
    heads, dim = states.shape[1], states.shape[3]
    buffer = states.new_zeros(room, heads, capacity, dim)
    rows, columns = source.shape
    at = source.to(states.device)[:, None, :, None]
    buffer[:rows, :, end - columns : end] = states[:rows].take_along_dim(at, dim=2)
    return buffer
