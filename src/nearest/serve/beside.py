"""What a model reads beside a text: nothing, RETRO's neighbours, or passages before it.

A request that reads something beside its text runs by itself, for what was found for one text is of
no use to another. Where it is asked, the text alone is read too, to be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from nearest.encode.hooks import captured_input
from nearest.memory import Memory
from nearest.models.in_context import PassageChooser
from nearest.retro.cache import RetroCache
from nearest.retro.data.database import ChunkDatabase
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.generation import gather_neighbours
from nearest.retro.layout import ChunkLayout
from nearest.retro.neighbours import NeighbourCache
from nearest.retro.reading import neighbour_chunks
from nearest.serve.passes import Batch, Passed, Passes, PlainBatch, Read, ReadPassage, passed
from nearest.store.snapshot import Snapshot


@runtime_checkable
class Reading(Protocol):
    """How texts are read.

    Attributes:
        room: tokens that are read beside a text at most, and take of the model's positions.
    """

    @property
    def room(self) -> int: ...

    def begin(self, passes: Passes, *, compare: bool) -> Batch:
        """One row without tokens; `compare` asks for what the model says of the text alone."""
        ...


class AsItIs:
    """The text alone."""

    room = 0

    def begin(self, passes: Passes, *, compare: bool) -> Batch:
        """One row without tokens."""
        return passes.begin()


AS_IT_IS = AsItIs()


@dataclass(frozen=True, eq=False)
class SearchedChunks:
    """The chunks of a memory that can be found.

    Documents that were added since have none yet; those that were removed are gone.

    Attributes:
        memory: its number among those of a request.
        database: of the segments whose chunks are indexed.
        documents: the numbers of its documents in the whole memory.
    """

    memory: int
    database: ChunkDatabase
    documents: Int[np.ndarray, " documents"]

    @classmethod
    def of(cls, memory: Memory, number: int, *, by_words: bool) -> "SearchedChunks | None":
        """Those of a memory; None where no chunk can be found: by words all can."""
        if memory.manifest.chunks is None:
            return None
        if by_words:
            return cls(number, ChunkDatabase(memory), np.arange(memory.documents))
        firsts = np.cumsum([0, *(len(segment.numbers) for segment in memory.segments)])
        indexed = [n for n, s in enumerate(memory.segments) if s.record.chunk_index is not None]
        if not indexed:
            return None
        documents = np.concatenate([np.arange(firsts[n], firsts[n + 1]) for n in indexed])
        if len(indexed) < len(memory.segments):
            kept = [memory.segments[n] for n in indexed]
            memory = Memory(Snapshot(memory.path, memory.manifest, kept), memory.search_on, memory)
        return cls(number, ChunkDatabase(memory), documents)


@dataclass(eq=False)
class WithNeighbours:
    """RETRO: every chunk of the text acts with its neighbours, from its last token on.

    Attributes:
        model: RETRO or RETROfit.
        chunks: of the memories that are searched; `search` finds neighbours among them.
        keys_alone: whether token memories are looked up by states of the text alone.
    """

    model: PreTrainedModel
    chunks: Sequence[SearchedChunks]
    search: MemoryNeighbours
    keys_alone: bool
    room: int = 0
    _known: NeighbourCache = field(init=False)  # the engine's thread alone uses it

    def __post_init__(self) -> None:
        self._known = NeighbourCache(self.search)

    @property
    def start_token(self) -> int | None:
        """That texts were trained to begin with, if any."""
        return self.chunks[0].database.cut.start

    def begin(self, passes: Passes, *, compare: bool) -> Batch:
        """One row without tokens; `compare` asks for what the model says of the text alone."""
        alone = passes.begin() if compare or self.keys_alone else None
        return _Beside(_NeighbourRows(self, passes), alone, pieces=True, keys_alone=self.keys_alone)

    def find(self, chunks: Int[Tensor, "n m"]) -> tuple[Tensor, list[Read]]:
        """The neighbours of chunks, as the model reads them and as they are told."""
        found = self._known(chunks)
        assert self._known.sources is not None
        told = [
            Read(tuple(chunk), tuple(self._passages(rows, sources, len(chunk))))
            for chunk, rows, sources in zip(
                chunks.tolist(), found.tolist(), self._known.sources, strict=True
            )
        ]
        return found, told

    def _passages(
        self, rows: list[list[int]], sources: list[Any], size: int
    ) -> Iterator[ReadPassage]:
        for tokens, source in zip(rows, sources, strict=True):
            if source.chunk >= 0:
                number, document = self.search.place(source.chunk)
                searched = self.chunks[number]
                stored_start = searched.database.cut.start is None  # which chunks then leave out
                yield ReadPassage(
                    searched.memory,
                    int(searched.documents[document]),
                    source.position + int(stored_start),
                    tuple(t for t in tokens[:size] if t >= 0),
                    tuple(t for t in tokens[size:] if t >= 0),
                    source.distance,
                )


@dataclass(frozen=True, eq=False)
class WithPassages:
    """In-context retrieval: passages of a memory stand before the text, chosen anew as it grows."""

    chooser: PassageChooser

    @property
    def room(self) -> int:
        """Tokens that are read before a text at most."""
        return self.chooser.settings.passage_room

    def begin(self, passes: Passes, *, compare: bool) -> Batch:
        """One row without tokens; `compare` asks for what the model says of the text alone."""
        alone = passes.begin() if compare else None
        rows = _PassageRows([_PassageRow(self.chooser, passes)])
        return _Beside(rows, alone, pieces=passes.pieces)


@runtime_checkable
class _Rows(Protocol):
    """Rows that are read with something beside them."""

    def read(self, new: Sequence[Sequence[int]], keep: int) -> Passed: ...
    def select(self, rows: Sequence[int]) -> None: ...


class _Beside:
    """Rows of one prompt, read with something beside them and, where it is asked, alone."""

    def __init__(
        self, rows: _Rows, alone: PlainBatch | None, *, pieces: bool, keys_alone: bool = False
    ) -> None:
        self.pieces = pieces
        self._rows = rows
        self._alone = alone
        self._keys_alone = keys_alone

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], keep: int) -> Passed:
        alone = None if self._alone is None else self._alone.read(tokens, keep)
        return self._both(self._rows.read([tokens], keep), alone)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Passed:
        alone = None if self._alone is None else self._alone.step(tokens)
        return self._both(self._rows.read([[token] for token in tokens], 1), alone)

    @torch.inference_mode()
    def repeat(self, times: int) -> None:
        if times > 1:
            self._rows.select([0] * times)
            if self._alone is not None:
                self._alone.repeat(times)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> list[int]:
        self._rows.select(rows)
        if self._alone is not None:
            self._alone.keep(rows)
        return list(rows)

    def _both(self, read: Passed, alone: Passed | None) -> Passed:
        if alone is None:
            return read
        keys = alone.keys if self._keys_alone else read.keys
        return read._replace(keys=keys, alone=alone.log_probs)


class _NeighbourRows:
    """Rows of RETRO, all of one length."""

    def __init__(self, reading: WithNeighbours, passes: Passes) -> None:
        self._reading = reading
        self._layer = passes.layer
        self._cache = RetroCache(reading.model.config)
        self._texts: list[list[int]] = [[]]
        self._found: dict[tuple[int, ...], Read] = {}

    def read(self, new: Sequence[Sequence[int]], keep: int) -> Passed:
        """Go on with as many tokens in each row; the last `keep` are predicted from."""
        model, keep = self._reading.model, max(1, keep)
        config: Any = model.retro_config
        for text, tokens in zip(self._texts, new, strict=True):
            text += tokens
        seen, columns = int(self._cache.get_seq_length()), len(new[0])
        ids = torch.tensor(self._texts, device=model.device)
        layout = ChunkLayout(config.chunk_size, columns, seen, (0,) * len(new))
        needed = neighbour_chunks(config, layout)
        neighbours = gather_neighbours(ids, layout, needed, None, self._find)
        with captured_input(self._layer.module) as states:
            logits = model(
                ids[:, seen:],
                neighbour_ids=neighbours,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        positions = range(seen + columns - keep, seen + columns)
        read = [
            [self._acting(text, n, config.chunk_size) for n in positions] for text in self._texts
        ]
        return passed(states[0], logits, keep)._replace(read=read)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        self._cache.batch_select_indices(
            torch.tensor(list(rows), device=self._reading.model.device)
        )
        self._texts = [list(self._texts[row]) for row in rows]

    def _find(self, chunks: Tensor) -> Tensor:
        found, told = self._reading.find(chunks)
        self._found.update((one.query, one) for one in told)
        return found

    def _acting(self, text: Sequence[int], position: int, size: int) -> Read | None:
        """The neighbours that a position attends to: those of the last chunk that ended by it."""
        end = (position + 1) // size * size
        return self._found[tuple(text[end - size : end])] if end else None


class _PassageRows:
    """Rows with passages before each, which are chosen for it alone."""

    def __init__(self, rows: list["_PassageRow"]) -> None:
        self._rows = rows

    def read(self, new: Sequence[Sequence[int]], keep: int) -> Passed:
        """Go on with tokens in each row; the last `keep` are predicted from."""
        return _joined([row.read(t, keep) for row, t in zip(self._rows, new, strict=True)], 0)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows."""
        first = {row: place for place, row in reversed(list(enumerate(rows)))}
        self._rows = [
            self._rows[row] if first[row] == place else self._rows[row].copy()
            for place, row in enumerate(rows)
        ]


class _PassageRow:
    """A text, and what has been read of it with the passages that were chosen last."""

    def __init__(self, chooser: PassageChooser, passes: Passes, text: Sequence[int] = ()) -> None:
        self._chooser = chooser
        self._passes = passes
        self._text = list(text)
        self._passages: list[int] | None = None
        self._chosen_at = -1
        self._batch = passes.begin()
        self._done = 0  # tokens of the text that the batch has read
        self._read = Read((), ())

    def copy(self) -> "_PassageRow":
        """The same text, which is read anew."""
        return _PassageRow(self._chooser, self._passes, self._text)

    def read(self, tokens: Sequence[int], keep: int) -> Passed:
        """Go on with tokens; what stands before those that are predicted from is read with them."""
        self._text += tokens
        parts, stride = [], self._chooser.settings.passage_stride
        position = len(self._text) - keep
        while position < len(self._text):
            chosen_at = self._chooser.chosen_at(position)
            stop = min(len(self._text), chosen_at + stride)
            parts.append(self._read_to(stop, chosen_at, stop - position))
            position = stop
        return _joined(parts, 1) if parts else _NOTHING

    def _read_to(self, stop: int, chosen_at: int, keep: int) -> Passed:
        front = self._choose(chosen_at) if chosen_at != self._chosen_at else []
        given = self._batch.read([*front, *self._text[self._done : stop]], keep)
        self._done = stop
        return given._replace(read=[[self._read if self._passages else None] * keep])

    def _choose(self, at: int) -> list[int]:
        """Choose passages; what is to be read of them, where they are others than before."""
        text = np.array(self._text, dtype=np.int64)
        passages, self._chosen_at = self._chooser.best(text, at), at
        if passages == self._passages and self._passes.pieces:
            return []
        self._batch, self._done, self._passages = self._passes.begin(), 0, passages
        query = self._chooser.query(text, at).tolist()
        self._read = Read(tuple(query), tuple(map(self._told, passages)))
        front: list[int] = self._chooser.front(passages).tolist()
        return front

    def _told(self, passage: int) -> ReadPassage:
        passages = self._chooser.passages
        document = int(passages.documents[passage])
        number = passage - int(np.searchsorted(passages.documents, document))
        position = 1 + number * self._chooser.settings.passage_tokens
        return ReadPassage(0, document, position, tuple(passages.tokens(passage).tolist()))


_NOTHING = Passed(torch.empty(1, 0, 0), torch.empty(1, 0, 0))


def _joined(parts: Sequence[Passed], dim: int) -> Passed:
    """Several rows (dim 0), or positions of one row (dim 1), as one."""
    if len(parts) == 1:
        return parts[0]
    keys, log_probs = (torch.cat(list(c), dim) for c in zip(*(p[:2] for p in parts), strict=True))
    read: list[Sequence[Read | None]]
    if dim == 0:
        read = [row for part in parts for row in part.read]
    else:
        read = [[one for part in parts for one in part.read[0]]]
    return Passed(keys, log_probs, None, read)
