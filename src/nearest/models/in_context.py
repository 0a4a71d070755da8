"""Read a text with passages of a memory before it: in-context retrieval (arXiv:2302.00083).

Every `passage_stride` tokens the passages that are best for the last `query_tokens` of the text are
put before the window that the model reads. Passages are chosen at multiples of the stride from a
document's beginning, where a text is scored as where it is written. All else stays as it is without
them: windows, targets, and the tokens that count as context of a query.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nearest.corpus.batches import WindowBatch
from nearest.corpus.tokens import Tokens
from nearest.corpus.windows import Window, windows
from nearest.encode.identity import AnyModel, max_positions, reads_sources
from nearest.encode.layers import LanguageModel
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.scoring import ReadText, ScoredBlock, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.passages import NO_DOCUMENT, Passages, cut_passages
from nearest.retrieval.settings import Settings, passage_settings


@dataclass(frozen=True, eq=False)
class PassageChooser:
    """What stands before a text whenever passages are chosen anew.

    Attributes:
        passages: of the memory.
        settings: how many, how long, how often.
        start_token: of the memory's documents; it comes before the passages.
    """

    passages: Passages
    settings: Settings
    start_token: int

    @classmethod
    def of(
        cls,
        memories: Sequence[Memory],
        model: LanguageModel,
        settings: Settings,
    ) -> "PassageChooser":
        """Cut the memory's documents into passages.

        Raises:
            SettingError: there are several memories, the model reads texts with an encoder, or its
                positions do not hold passages and text.
        """
        if len(memories) != 1:
            raise SettingError(
                f"passages are taken from one memory, and {len(memories)} are given: give one"
            )
        if reads_sources(model):
            raise SettingError(
                "an encoder–decoder reads its own text and no passages: choose another method than "
                "in-context"
            )
        memory, positions = memories[0], max_positions(model)
        room = settings.passage_room + settings.passage_stride
        if positions is not None and room > positions:
            raise SettingError(
                f"{settings.passages} passages of {settings.passage_tokens} tokens, their start "
                f"token and {settings.passage_stride} tokens of text exceed the model's "
                f"{positions} positions: give fewer, or shorter ones (--passages, "
                "--passage-tokens, --passage-stride)"
            )
        passages = cut_passages(memory, settings.passage_tokens)
        return cls(passages, settings, memory.manifest.model.start_token)

    def chosen_at(self, position: int) -> int:
        """The position of the last choice of passages for the token after `position`."""
        return position - position % self.settings.passage_stride

    def before(self, text: Tokens, position: int, without: int = NO_DOCUMENT) -> Tokens:
        """Start token and passages, the best one last; nothing where none is found.

        Args:
            text: token ids, the start token first.
            position: in the text; passages are chosen by the tokens up to here.
            without: the number of a document of the memory that gives no passages.
        """
        return self.front(self.best(text, position, without))

    def best(self, text: Tokens, position: int, without: int = NO_DOCUMENT) -> list[int]:
        """The passages that `before` puts before a text, by their numbers, best first."""
        query = self.query(text, position)
        return self.passages.best(query, self.settings.passages, without)

    def query(self, text: Tokens, position: int) -> Tokens:
        """The tokens of a text that passages are chosen by."""
        return text[max(1, position + 1 - self.settings.query_tokens) : position + 1]

    def front(self, passages: Sequence[int]) -> Tokens:
        """Start token and passages, given best first; nothing where there are none."""
        if not passages:
            return np.empty(0, dtype=np.int64)
        parts = [self.passages.tokens(number) for number in reversed(passages)]
        return np.concatenate([np.array([self.start_token], dtype=np.int64), *parts])


class _Row(NamedTuple):
    """The model reads `front`, then [start, stop) of a sequence, and predicts from `first` on."""

    sequence: int
    front: Tokens
    start: int
    first: int
    stop: int

    @property
    def length(self) -> int:
        return len(self.front) + self.stop - self.start


@dataclass(frozen=True, eq=False)
class PassageScorer:
    """A text as a `Scorer` reads it, with passages before each window.

    `blocks` are as a Scorer's, and `seconds` of theirs include the choice of passages.
    """

    scorer: Scorer
    chooser: PassageChooser
    memory: Memory

    def blocks(
        self, progress: Progress, stage: str, with_view: bool = False
    ) -> Iterator[ScoredBlock]:
        """Every prediction of the text exactly once, in its order."""
        sequences, total, done = self.scorer.text.sequences, self.scorer.text.predictions, 0
        progress(stage, 0, total)
        for run in self.scorer.runs:
            started = time.perf_counter()
            rows = [row for n in run for row in self._rows(n, sequences[n])]
            choosing, scored = time.perf_counter() - started, []
            for batch in _batches(rows, sequences, self._budget):
                scored.append(self.scorer.encoder.score(batch, with_view))
                done += len(batch.targets)
                progress(stage, done, total)
            if scored:
                yield self.scorer.block(scored, sequences, choosing)

    @property
    def _budget(self) -> int:
        return self.scorer.encoder.batch_size * self.scorer.encoder.window

    def _rows(self, number: int, tokens: Tokens) -> Iterator[_Row]:
        encoder = self.scorer.encoder
        positions = max_positions(encoder.model)
        for part in windows(len(tokens), encoder.window, encoder.stride):
            row: _Row | None = None
            for first, stop in self._runs(part):
                at = self.chooser.chosen_at(first)
                front = self.chooser.before(tokens, at, self._own(number, at))
                room = stop if positions is None else positions - len(front)
                start = max(part.start, stop - room)
                if row is not None and start == row.start and np.array_equal(front, row.front):
                    row = row._replace(stop=stop)
                    continue
                if row is not None:
                    yield row
                row = _Row(number, front, start, first, stop)
            if row is not None:
                yield row

    def _runs(self, part: Window) -> Iterator[tuple[int, int]]:
        """What a window predicts, cut where passages are chosen anew."""
        first, stride = part.first, self.chooser.settings.passage_stride
        while first < part.stop:
            stop = min(part.stop, self.chooser.chosen_at(first) + stride)
            yield first, stop
            first = stop

    def _own(self, sequence: int, position: int) -> int:
        """The document of the memory that a position is in itself (leave-one-out)."""
        if self.scorer.own is None:
            return NO_DOCUMENT
        documents, _ = self.scorer.text.places(np.array([sequence]), np.array([position + 1]))
        entry = int(self.scorer.own[documents[0]])
        return NO_DOCUMENT if entry < 0 else self.memory.place(entry).document


Reader = Scorer | ReadText | PassageScorer


def reader_of(
    scorer: Scorer | ReadText,
    memories: Sequence[Memory],
    passages: Settings | None,
) -> Reader:
    """What reads the text with passages as settings say, or without any.

    Raises:
        SettingError: the text was read already, in another way; or as for a `PassageChooser`.
    """
    wanted = None if passages is None else Settings(**passage_settings(passages))
    if isinstance(scorer, ReadText):
        if scorer.passages != wanted:
            ways = ["without passages" if one is None else f"with {passage_settings(one)}"
                    for one in (scorer.passages, wanted)]  # fmt: skip
            raise SettingError(
                f"the text was read already, {ways[0]}, and is to be read {ways[1]}: give "
                "documents, or read them so (read_text, read_with_passages)"
            )
        return scorer
    if passages is None:
        return scorer
    chooser = PassageChooser.of(memories, scorer.encoder.model, passages)
    return PassageScorer(scorer, chooser, memories[0])


def read_with_passages(
    model: AnyModel,
    memory: Memory,
    documents: ScoredInput,
    *,
    progress: Progress = no_progress,
    settings: Settings | None = None,
    **options: Any,
) -> ReadText:
    """`read_text`, with passages before the text, for several methods "in-context+…".

    Args:
        model, memory, documents, progress, **options: as in `read_text`.
        settings: how many passages, how long, how often; the defaults when not given.

    Raises:
        NearestError: they do not fit.
    """
    chosen = settings or Settings()
    scorer = Scorer.prepare(model, memory, documents, **options)
    reader = reader_of(scorer, [memory], chosen)
    blocks = tuple(reader.blocks(progress, "read", with_view=True))
    own_of = None if scorer.own is None else memory.path
    passages = Settings(**passage_settings(chosen))
    return ReadText(scorer.text, blocks, scorer.own, passages, own_of)


def _batches(
    rows: Sequence[_Row], sequences: Sequence[Tokens], budget: int
) -> Iterator[WindowBatch]:
    """Batches of rows of about one length, each with at most `budget` inputs or a single row."""
    rows = sorted(rows, key=lambda row: row.length, reverse=True)
    while rows:
        count = max(1, budget // rows[0].length)
        yield _batch(rows[:count], sequences)
        rows = rows[count:]


def _batch(rows: Sequence[_Row], sequences: Sequence[Tokens]) -> WindowBatch:
    inputs = np.zeros((len(rows), max(row.length for row in rows)), dtype=np.int64)
    predicts = np.zeros(inputs.shape, dtype=bool)
    for at, row in enumerate(rows):
        front, tokens = len(row.front), sequences[row.sequence]
        inputs[at, :front] = row.front
        inputs[at, front : row.length] = tokens[row.start : row.stop]
        predicts[at, front + row.first - row.start : row.length] = True
    return WindowBatch(
        inputs,
        predicts,
        np.concatenate([np.full(row.stop - row.first, row.sequence) for row in rows]),
        np.concatenate([np.arange(row.first, row.stop) for row in rows]),
        np.concatenate(
            [sequences[row.sequence][row.first + 1 : row.stop + 1] for row in rows]
        ).astype(np.int64),
    )
