"""The layout of one forward pass: where its tokens stand in their sequences' chunks of m tokens.

The neighbours of chunk u act on the m positions from (u+1)m − 1 on: position p belongs to block
(p+1) // m, in row (p+1) mod m, and block b attends to the neighbours of chunk b − 1. Sequences of a
batch may be padded on the left and so stand differently; a pass may continue others with a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True)
class ChunkLayout:
    """The columns of one forward pass; all counts in tokens, one number a row."""

    chunk_size: int
    columns: int
    seen: int  # columns read in earlier passes
    starts: tuple[int, ...]  # the column, counted from the first pass, of each row's first token

    @cached_property
    def past(self) -> tuple[int, ...]:
        """Tokens read in earlier passes, without padding."""
        return tuple(max(self.seen - start, 0) for start in self.starts)

    @cached_property
    def pads(self) -> tuple[int, ...]:
        """Columns of this pass before the row's first token."""
        return tuple(min(max(start - self.seen, 0), self.columns) for start in self.starts)

    @property
    def positions(self) -> Int[Tensor, "batch columns"]:
        """Of each token in its sequence; 0 for padding."""
        columns = torch.arange(self.seen, self.seen + self.columns)
        return (columns - torch.tensor(self.starts)[:, None]).clamp(min=0)

    @cached_property
    def uniform(self) -> bool:
        """All rows stand alike and none is padded."""
        return len(set(self.past)) == 1 and not any(self.pads)

    @cached_property
    def begun(self) -> tuple[int, ...]:
        """Tokens of the unfinished chunk read in earlier passes."""
        return tuple(past % self.chunk_size for past in self.past)

    @cached_property
    def finished(self) -> tuple[int, ...]:
        """Chunks whose last token is in this pass."""
        return tuple(
            (begun + self.columns - pads) // self.chunk_size
            for begun, pads in zip(self.begun, self.pads, strict=True)
        )

    @cached_property
    def chunks(self) -> int:
        """The most chunks that a row finishes in this pass."""
        return max(self.finished)

    @cached_property
    def first_block(self) -> int:
        """0 where the neighbours of an earlier pass still act, 1 where none do yet."""
        return 0 if max(self.past) >= self.chunk_size else 1

    @property
    def single(self) -> bool:
        """One token a row: its block needs no rows for the others."""
        return self.columns == 1

    @property
    def blocks(self) -> int:
        """Blocks that attend to neighbours in this pass, the same number in each row."""
        if self.single:
            return int(max(self.past) + 1 >= self.chunk_size)
        return self.chunks + 1 - self.first_block

    @cached_property
    def rows(self) -> Int[Tensor, "batch rows"] | Int[Tensor, "1 rows"]:
        """Row numbers of a block's queries."""
        if not self.single:
            return torch.arange(self.chunk_size)[None]
        rows = torch.tensor(self.begun)[:, None] + 1
        return rows[:1] % self.chunk_size if self.uniform else rows % self.chunk_size

    @cached_property
    def absent(self) -> list[list[bool]]:
        """For each row and block, that no chunk stands before it whose neighbours could act."""
        if self.single:
            return [[past + 1 < self.chunk_size] for past in self.past]
        return [
            [past < self.chunk_size * (1 - b) for b in range(self.first_block, self.chunks + 1)]
            for past in self.past
        ]

    def chunk_states(
        self, x: Float[Tensor, "batch columns dim"], carry: Float[Tensor, "batch _ dim"] | None
    ) -> tuple[Float[Tensor, "batch chunks m dim"], Float[Tensor, "batch _ dim"]]:
        """The states of the finished chunks, and those of the unfinished ones to carry over."""
        m, wide = self.chunk_size, 0 if carry is None else carry.shape[1]
        stream = x if carry is None else torch.cat([carry, x], dim=1)
        if self.uniform:
            cut = self.chunks * m
            return stream[:, :cut].unflatten(1, (self.chunks, m)), stream[:, cut:]
        begun, pads = _column(self.begun, x), _column(self.pads, x)
        slots = torch.arange(max(self.begun) + self.columns, device=x.device)[None]
        source = torch.where(slots < begun, slots, wide + pads + slots - begun)
        stream = _take(stream, source)
        left = [
            begun + self.columns - pads - done * m
            for begun, pads, done in zip(self.begun, self.pads, self.finished, strict=True)
        ]
        rest = torch.arange(max(left), device=x.device)[None] + _column(self.finished, x) * m
        chunks = stream[:, : self.chunks * m].unflatten(1, (self.chunks, m))
        return chunks, _take(stream, rest)

    def chunk_columns(self) -> Int[Tensor, "batch chunks m"]:
        """Column of each token of the finished chunks, counted from the first pass."""
        first = [
            start + past - begun
            for start, past, begun in zip(self.starts, self.past, self.begun, strict=True)
        ]
        within = torch.arange(self.chunks * self.chunk_size)
        within = within.reshape(1, self.chunks, self.chunk_size)
        return torch.tensor(first)[:, None, None] + within

    def into_blocks(
        self, queries: Float[Tensor, "batch columns dim"]
    ) -> Float[Tensor, "batch blocks rows dim"]:
        """Lay queries out by block and row; slots without a token hold anything finite."""
        if self.single:
            return queries[:, None]
        m, first = self.chunk_size, self.first_block * self.chunk_size
        if self.uniform:
            before = self.begun[0] + 1 - first
            laid = queries[:, -before:] if before < 0 else F.pad(queries, (0, 0, before, 0))
            laid = F.pad(laid, (0, 0, 0, self.blocks * m - laid.shape[1]))
        else:
            slots = torch.arange(self.blocks * m, device=queries.device)[None] + first
            laid = _take(
                queries, slots - _column(self.begun, queries) - 1 + _column(self.pads, queries)
            )
        return laid.unflatten(1, (self.blocks, m))

    def from_blocks(
        self, answers: Float[Tensor, "batch blocks rows dim"]
    ) -> Float[Tensor, "batch columns dim"]:
        """Undo `into_blocks`; columns before the first block get zeros."""
        if self.single:
            return answers[:, 0]
        flat, first = answers.flatten(1, 2), self.first_block * self.chunk_size
        if self.uniform:
            before = self.begun[0] + 1 - first
            flat = flat[:, max(before, 0) : before + self.columns]
            return F.pad(flat, (0, 0, max(-before, 0), 0))
        columns = torch.arange(self.columns, device=flat.device)[None]
        slots = columns + _column(self.begun, flat) + 1 - _column(self.pads, flat) - first
        return _take(flat, slots).masked_fill((slots < 0)[..., None], 0)

    def merge(self, old: Tensor | None, new: Tensor | None) -> tuple[Tensor, Tensor]:
        """What each block attends to, (batch, blocks, …), and what stays for the next pass.

        Args:
            old: of the chunk finished last before this pass, (batch, …); None before any has.
            new: of the chunks finished in this pass, (batch, chunks, …); None if none does.
        """
        parts = [] if old is None else [old[:, None]]
        parts += [] if new is None else [new]
        stack = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        current = self.current(stack)
        return (current[:, None] if self.single else stack), current

    def current(self, stack: Tensor) -> Tensor:
        """What acts after this pass, (batch, …), of what acts in its blocks."""
        last = [max(done - self.first_block, 0) for done in self.finished]
        if self.uniform:
            return stack[:, last[0]]
        return stack[torch.arange(len(stack)), torch.tensor(last)]


def _column(numbers: Sequence[int], like: Tensor) -> Int[Tensor, "batch 1"]:
    return torch.tensor(numbers, device=like.device)[:, None]


def _take(
    x: Float[Tensor, "batch n dim"], index: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k dim"]:
    """Rows of each sequence by number; numbers outside take the nearest row."""
    index = index.clamp(0, x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
