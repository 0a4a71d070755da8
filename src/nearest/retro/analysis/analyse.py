"""Losses of a text's tokens, with and without neighbours, beside what it shares with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedModel

from nearest.errors import SettingError
from nearest.metrics import Interval, bits_per_byte, bootstrap_interval
from nearest.progress import Progress, no_progress
from nearest.retro.analysis.overlap import longest_shared, matches_read
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.table import NeighbourTable
from nearest.retro.evaluation.readings import Reading, dataset_for, readings_of
from nearest.retro.evaluation.scoring import ON, check_fit, scored_tokens
from nearest.retro.passages import overlapping

SHARES = (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of a chunk, up to which it is shared with a neighbour: where the curve has its points."""
MATCHES = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, None))
"""Lengths of matches, grouped: from, up to."""
UNSHARED = 0.125  # chunks that share so little can't have been copied (the paper's α = 12.5 %)
LEAKED = 32  # tokens in a row
COMPARED = 10  # nearest neighbours of a chunk, each with the chunk after it, as in the paper
_BLOCK = 1024  # chunks compared at once


@dataclass(frozen=True)
class Point:
    """Chunks of which at most a part stands in a neighbour, or tokens by their match.

    Attributes:
        low, high: the group's bounds; high is None where it has none.
        chunks, tokens, documents: in it, predicted.
        losses: by reading: bits a byte of chunks, nats a token of tokens.
        gain: how much less the first reading loses than the second, in the same unit.
        interval: of the gain, 95 % by document bootstrap.
        share: of the whole gain.
    """

    low: float
    high: float | None
    chunks: int
    tokens: int
    documents: int
    losses: dict[str, float]
    gain: float
    interval: Interval
    share: float


@dataclass(frozen=True)
class Leak:
    """How much of a text stands in what it is read with.

    Attributes:
        chunks: with a predecessor, whose neighbours could help.
        half, whole: share of chunks with r of at least 0.5, or 1.
        tokens: share of tokens that end a match of at least LEAKED tokens.
        documents: the ids with most such tokens, and how many.
    """

    chunks: int
    half: float
    whole: float
    tokens: float
    documents: list[tuple[str, int]]


@dataclass(frozen=True)
class Analysis:
    """Tokens of a text that were predicted, in the order of the text, and its chunks.

    Attributes:
        readings: names; the gain is the second's loss minus the first's.
        losses: nats of each token, by reading.
        documents, chunks: of each token: its document, and its chunk by the row of `shares`.
        matches: tokens in a row, each token the last, that stand in a neighbour which was read.
        shares: r of each chunk, s/m: its longest run of tokens, s, that stands in one of its own
            nearest neighbours or the chunk after it, over the size of chunks (arXiv:2112.04426,
            2.6); chunk_bytes, chunk_documents: its UTF-8 bytes, and document.
        names: of documents.
        compared: neighbours for r: COMPARED, or as many as the table stores.
    """

    readings: tuple[str, ...]
    losses: dict[str, Float[np.ndarray, " tokens"]]
    documents: Int[np.ndarray, " tokens"]
    chunks: Int[np.ndarray, " tokens"]
    matches: Int[np.ndarray, " tokens"]
    shares: Float[np.ndarray, " chunks"]
    chunk_bytes: Int[np.ndarray, " chunks"]
    chunk_documents: Int[np.ndarray, " chunks"]
    names: Sequence[str]
    compared: int

    @property
    def gains(self) -> Float[np.ndarray, " tokens"]:
        """Of each token, nats."""
        first, second = self.readings[:2]
        return self.losses[second] - self.losses[first]

    def by_share(self, shares: Sequence[float] = SHARES) -> list[Point]:
        """Bits a byte over the chunks that share at most so much; empty groups are left out."""
        points = []
        for share in shares:
            kept = self.shares <= share + 1e-9
            if self.chunk_bytes[kept].any():
                points.append(self._chunk_point(share, kept))
        return points

    def _chunk_point(self, share: float, kept: Bool[np.ndarray, " chunks"]) -> Point:
        tokens = kept[self.chunks]
        sizes = np.zeros(len(self.names))
        np.add.at(sizes, self.chunk_documents[kept], self.chunk_bytes[kept])
        bits = self._of_documents(tokens, self.gains) / np.log(2)
        total = int(self.chunk_bytes[kept].sum())
        return Point(
            0.0,
            share,
            int(kept.sum()),
            int(tokens.sum()),
            len(np.unique(self.documents[tokens])),
            {
                name: bits_per_byte(float(nll[tokens].sum()), total)
                for name, nll in self.losses.items()
            },
            float(bits.sum() / total),
            bootstrap_interval(bits, sizes),
            self._part(tokens),
        )

    def by_match(self, groups: Sequence[tuple[int, int | None]] = MATCHES) -> list[Point]:
        """Nats a token, by the longest match that ends there; empty groups are left out."""
        points = []
        for low, high in groups:
            tokens = (self.matches >= low) & (high is None or self.matches <= high)
            if not tokens.any():
                continue
            counts = self._of_documents(tokens, np.ones(len(tokens)))
            gains = self._of_documents(tokens, self.gains)
            points.append(
                Point(
                    low,
                    high,
                    len(np.unique(self.chunks[tokens])),
                    int(tokens.sum()),
                    int((counts > 0).sum()),
                    {name: float(nll[tokens].mean()) for name, nll in self.losses.items()},
                    float(gains.sum() / counts.sum()),
                    bootstrap_interval(gains, counts),
                    self._part(tokens),
                )
            )
        return points

    def leak(self, documents: int = 10) -> Leak:
        """What of the text was retrieved word for word."""
        copied = self._of_documents(self.matches >= LEAKED, np.ones(len(self.matches)))
        most = np.argsort(-copied, kind="stable")[:documents]
        return Leak(
            len(self.shares),
            float((self.shares >= 0.5).mean()),
            float((self.shares >= 1.0).mean()),
            float((self.matches >= LEAKED).mean()),
            [(self.names[i], int(copied[i])) for i in most.tolist() if copied[i]],
        )

    def _of_documents(
        self, tokens: Bool[np.ndarray, " tokens"], values: Float[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " documents"]:
        sums = np.zeros(len(self.names))
        np.add.at(sums, self.documents[tokens], values[tokens])
        return sums

    def _part(self, tokens: Bool[np.ndarray, " tokens"]) -> float:
        whole = float(self.gains.sum())
        return float(self.gains[tokens].sum()) / whole if whole else float("nan")


def analyse(
    model: PreTrainedModel,
    data: RetroDataset,
    table: NeighbourTable,
    decode: Callable[[list[int]], str],
    *,
    readings: Sequence[str] = ("on", "off"),
    neighbours: int = 2,
    continuation: int = 1,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> Analysis:
    """Read a text in several ways, and compare it to its neighbours.

    Of each chunk, r says how much of it the database holds, whatever the model read: it is of the
    chunk's own neighbours. A token's match is with what the model read: the neighbours of the chunk
    before. Chunks are those with a predecessor: no neighbour acts on a document's first chunk.
    Bytes of a chunk are those of its decoded tokens.

    Args:
        model, data, table, decode: as in `evaluate_retro`.
        readings: two or more; the gain is of the first over the second.
        neighbours, continuation: of the readings whose names do not say.
        window, stride, batch_size, progress: as in `evaluate_retro`.

    Raises:
        SettingError: there are fewer than two readings, no chunk has a predecessor, or something
            does not fit.
    """
    wanted = readings_of(readings, model, table, neighbours, continuation)
    if len(wanted) < 2:
        raise SettingError("the gain is of one reading over another: name two, such as on,off")
    chunks = data.chunks
    numbers = np.unique(data.documents)  # a subset may name one twice
    data = RetroDataset(chunks, data.database, table, neighbours=1, subset=numbers.tolist())
    widest = max(wanted, key=lambda reading: (reading.neighbours, reading.continuation))
    if not widest.neighbours:
        widest = Reading(ON, neighbours, continuation)
    shared = _shared(data, table, widest.neighbours, widest.continuation)
    if not len(shared.ids):
        raise SettingError(
            "no document of the text has a second chunk, on which neighbours could act: give "
            f"longer ones than {chunks.size} tokens"
        )
    lengths = chunks.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    losses = {}
    for reading in wanted:
        read = dataset_for(reading, data, table, None)
        passages = overlapping(read, window, stride)
        check_fit(model, passages)
        flat = np.full(int(offsets[-1]), np.nan)
        for some in scored_tokens(
            model, passages, reading=reading.kind, batch_size=batch_size, progress=progress
        ):
            flat[offsets[some.document] + some.positions] = some.nll
        losses[reading.name] = flat
    scored = ~np.isnan(losses[wanted[0].name])
    documents = np.repeat(np.arange(chunks.documents), lengths)
    places = np.arange(len(scored)) - offsets[documents]
    number = chunks.first[documents] + places // chunks.size
    kept = scored & (places >= chunks.size)
    rows = np.full(len(chunks), -1)
    rows[shared.ids] = np.arange(len(shared.ids))
    sizes = [len(decode(row[row >= 0].tolist()).encode()) for row in chunks.rows(shared.ids)]
    return Analysis(
        tuple(reading.name for reading in wanted),
        {name: nll[kept] for name, nll in losses.items()},
        documents[kept],
        rows[number[kept]],
        shared.matches[rows[number[kept]], places[kept] % chunks.size],
        shared.shares,
        np.array(sizes, dtype=np.int64),
        chunks.document_of(shared.ids),
        [chunks.name(i) for i in range(chunks.documents)],
        min(COMPARED, table.saved),
    )


@dataclass(frozen=True)
class _Shared:
    ids: Int[np.ndarray, " chunks"]
    matches: Int[np.ndarray, "chunks m"]
    shares: Float[np.ndarray, " chunks"]


def _shared(
    data: RetroDataset, table: NeighbourTable, neighbours: int, continuation: int
) -> _Shared:
    """Of all chunks with a predecessor in the documents that are read."""
    read, nearest = table.first(neighbours), table.first(min(COMPARED, table.saved))
    chunks = data.chunks
    ids = np.concatenate(
        [np.arange(chunks.first[d] + 1, chunks.first[d + 1]) for d in data.documents]
        or [np.empty(0, np.int64)]
    ).astype(np.int64)
    matches = np.zeros((len(ids), chunks.size), np.int64)
    shares = np.zeros(len(ids))
    for begin in range(0, len(ids), _BLOCK):
        some = ids[begin : begin + _BLOCK]
        own, block = chunks.rows(some), slice(begin, begin + _BLOCK)
        acting = data.database.rows(read[some - 1], continuation)
        matches[block] = matches_read(own, chunks.rows(some - 1), acting)
        shares[block] = longest_shared(own, data.database.rows(nearest[some], 1)) / chunks.size
    return _Shared(ids, matches, shares)
