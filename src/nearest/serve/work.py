"""What the engine is asked to do for one prompt, what it tells, and each continuation's state."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nearest.retrieval.ensemble import Ensemble
from nearest.serve.beside import AS_IT_IS, Reading
from nearest.serve.errors import ApiError
from nearest.serve.mixing import Spoke, States
from nearest.serve.passes import Read
from nearest.serve.vocabulary import Stops, TextStream, Vocabulary


@dataclass(frozen=True)
class Wanted:
    """What is to be generated, and what is to be told about each token.

    Attributes:
        max_tokens: generated at most, for each of `n` continuations.
        top: candidates of the mixture to tell, with their log-probabilities.
        base_top: candidates of the model alone.
        sources: whether to tell which entries spoke for a token.
        echo: whether to tell the prompt's tokens as well.
        replay: positions of the prompt that are looked up before the last.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    top: int = 0
    base_top: int = 0
    sources: bool = False
    echo: bool = False
    replay: int = 0


class Told(NamedTuple):
    """A token of a continuation, or of the prompt with `echo`.

    Attributes:
        text: what it adds to the text; "" for a special token, and within a character.
        log_prob: by model and memory, in nats; None for a prompt's first token.
        base_log_prob: by the model alone.
        top, base_top: likeliest tokens with their log-probabilities, of both.
        spoke: entries that spoke for it.
        of_text: what earlier places of the text itself added to its probability.
        read: what the model had read beside the text when it predicted it.
        read_log_prob: by the model that had, and no memory's candidates.
    """

    token: int
    text: str
    log_prob: float | None
    base_log_prob: float | None
    top: list[tuple[int, float]]
    base_top: list[tuple[int, float]]
    spoke: list[Spoke]
    of_text: float = 0.0
    read: Read | None = None
    read_log_prob: float | None = None
    prompt: bool = False


class News(NamedTuple):
    """Tokens of one continuation, and why it ended, if it did."""

    choice: int
    told: list[Told]
    finished: str | None = None  # "stop" or "length"
    generated: int = 0  # so far, with tokens whose text is held back or cut

    def and_then(self, later: "News") -> "News":
        """These and the next of the same continuation, as one."""
        return later._replace(told=self.told + later.told)


class Failure(NamedTuple):
    """The work was given up."""

    error: ApiError


@runtime_checkable
class Listener(Protocol):
    """Takes news from the engine's thread; must not block."""

    def __call__(self, news: News | Failure) -> None:
        """Take what happened."""


@dataclass(eq=False)
class Work:
    """One prompt with its continuations, in the engine's hands."""

    prompt: Sequence[int]
    wanted: Wanted
    ensemble: Ensemble  # of no memory for the model alone
    listener: Listener
    reading: Reading = AS_IT_IS
    deadline: float = float("inf")  # of time.monotonic()
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False


class Row:
    """One continuation: its tokens, its state, and the text that is final so far."""

    def __init__(self, work: Work, choice: int, vocabulary: Vocabulary) -> None:
        wanted = work.wanted
        self.work = work
        self.choice = choice
        self.state: States = ()
        self.tokens = list(work.prompt)
        self.new = 0
        self.rng = np.random.default_rng([wanted.seed & (2**64 - 1), choice])
        self.finished: str | None = None
        self._stop_tokens = vocabulary.stop_tokens
        self._text = TextStream(vocabulary, work.prompt)
        self._stops = Stops(wanted.stops)
        self._held: list[tuple[int, Told]] = []  # with where its text begins
        self._length = 0

    def add(self, told: Told) -> list[Told]:
        """Add a token (its text is found here); the tokens whose text is final now."""
        self.tokens.append(told.token)
        self.new += 1
        ended = told.token in self._stop_tokens
        full = self.new >= self.work.wanted.max_tokens
        piece = self._text.push(told.token)
        if ended or full:
            piece += self._text.flush()
        self._held.append((self._length, told._replace(text=piece)))
        self._length += len(piece)
        final = self._stops.push(piece)
        if self._stops.found is not None:
            self.finished = "stop"
            return self._cut(self._stops.found)
        if ended or full:
            self.finished = "stop" if ended else "length"
            final = self._length
        return self._released(final)

    def _released(self, end: int) -> list[Told]:
        count = 0
        while (
            count < len(self._held) and self._held[count][0] + len(self._held[count][1].text) <= end
        ):
            count += 1
        released = [told for _, told in self._held[:count]]
        del self._held[:count]
        return released

    def _cut(self, end: int) -> list[Told]:
        """Tokens before the stop string; the last one's text ends there."""
        return [
            told._replace(text=told.text[: end - begin])
            for begin, told in self._held
            if begin < end or (begin == end == 0 and not told.text)
        ]


def finite(log_prob: float | None) -> Any:
    """A log-probability as JSON, which has no infinity: OpenAI writes −9999 for the impossible."""
    return None if log_prob is None else max(log_prob, -9999.0)
