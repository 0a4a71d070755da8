"""A cache of rows of different lengths that are written in place.

Appending a column to a `DynamicCache` copies all of it, and so does taking a row out: with many
rows that costs more than the model. Here every layer has one buffer with room to spare. All rows
end at the same column, so that a step writes one column; a row that joins is copied into the next
free place, and one that leaves is overwritten by the last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_SPARE_COLUMNS = 64


class RowsCache(Cache):
    """Cached states of several sequences; a row's columns are [`end` − length, `end`).

    Attributes:
        lengths: of each row, in tokens.
    """

    def __init__(self, first: Any) -> None:
        """Begin with the rows of another cache, all of which have the same length."""
        self._buffers = [_RowsLayer(self, one.keys, one.values) for one in first.layers]
        super().__init__(layers=[*self._buffers])
        self.lengths: list[int] = []
        self.end = int(first.get_seq_length())
        self._room = 0
        self.add(first)

    @property
    def first(self) -> int:
        """The first column of the longest row."""
        return self.end - max(self.lengths, default=0)

    @property
    def padding(self) -> list[int]:
        """Columns before each row's own, of those that a pass sees."""
        longest = max(self.lengths, default=0)
        return [longest - length for length in self.lengths]

    @torch.inference_mode()
    def add(self, other: Any) -> None:
        """Add the rows of a cache, all of which have the same length."""
        length, begin = int(other.get_seq_length()), len(self.lengths)
        stop = begin + len(other.layers[0].keys)
        if stop > self._room:
            self._room = stop + max(8, stop // 2)
            self._resize(max(self.end - self.first, length))
        elif length > self.end:
            self._resize(length)
        own = slice(self.end - length, self.end)
        for buffer, layer in zip(self._buffers, other.layers, strict=True):
            buffer.all_keys[begin:stop, :, own] = layer.keys
            buffer.all_values[begin:stop, :, own] = layer.values
        self.lengths += [length] * (stop - begin)

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
        moved = dict(zip(free, last, strict=True))
        order = [moved.get(place, place) for place in range(len(rows))]
        self.lengths = [self.lengths[row] for row in order]
        return order

    def make_room(self, columns: int) -> None:
        """See to it that so many columns can be appended."""
        if self.end + columns > self._buffers[0].all_keys.shape[-2]:
            self._resize(self.end - self.first)

    def appended(self, columns: int) -> None:
        """All layers have written so many columns."""
        self.end += columns
        self.lengths = [length + columns for length in self.lengths]

    def _resize(self, end: int) -> None:
        """Move all rows so that they end at a column, with room for half as much after it."""
        capacity = end + max(_SPARE_COLUMNS, end // 2)
        for buffer in self._buffers:
            buffer.resize(self._room, capacity, end)
        self.end = end


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

    def resize(self, room: int, capacity: int, end: int) -> None:
        """Buffers of another size, with the columns that rows have moved to end at `end`."""
        columns = slice(self._rows.first, self._rows.end)
        self.all_keys = _moved(self.all_keys, columns, room, capacity, end)
        self.all_values = _moved(self.all_values, columns, room, capacity, end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the longest row."""
        return self._rows.end - self._rows.first

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _moved(states: Tensor, columns: slice, room: int, capacity: int, end: int) -> Tensor:
    heads, dim = states.shape[1], states.shape[3]
    buffer = states.new_zeros(room, heads, capacity, dim)
    kept = states[:, :, columns]
    buffer[: len(kept), :, end - kept.shape[2] : end] = kept
    return buffer
