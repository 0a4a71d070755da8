"""The batching loop: requests join and leave between steps, and share passes and searches.

One thread owns the model. Each round reads a piece of a long prompt, or as many short ones as make
one, so that prompts delay running continuations by no more than a piece, and then advances all
running continuations by one token. Prompts take turns. News go to listeners that must not block, so
that a slow client delays nobody.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nearest.errors import NearestError
from nearest.retrieval.drafts import NO_DRAFT
from nearest.serve.drafts import Drafts
from nearest.serve.errors import ApiError, of_error
from nearest.serve.metrics import Metrics
from nearest.serve.mixing import Mixture, row_queries
from nearest.serve.passes import Batch, Passed, Passes, PlainBatch
from nearest.serve.prompts import PIECE, Prompt, tell
from nearest.serve.sampling import choose_each
from nearest.serve.vocabulary import Vocabulary
from nearest.serve.work import Failure, News, Row, Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on.

    Attributes:
        running: continuations that advance together.
        waiting: prompts that may wait; more are refused.
    """

    running: int = 64
    waiting: int = 256


class Engine:
    """Runs work in a thread of its own; `submit` may be called from any thread."""

    def __init__(
        self,
        passes: Passes,
        vocabulary: Vocabulary,
        metrics: Metrics,
        limits: Limits | None = None,
        *,
        draft: bool = False,
    ) -> None:
        self._drafts = Drafts(vocabulary.size) if draft else None
        self._passes = passes
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._limits = limits or Limits()
        self._changed = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._prompts: deque[Prompt] = deque()
        self._running: list[_Running] = []
        self._draining = False
        self._end = float("inf")  # of time.monotonic()
        self.failed = False  # the thread has ended without being told to
        self._thread = threading.Thread(target=self._run, name="nearest-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop_soon(self, grace: float) -> None:
        """Refuse new work, and end with 503 what is still under way after `grace` seconds."""
        with self._changed:
            self._draining = True
            self._end = time.monotonic() + grace
            self._changed.notify_all()

    def stop(self) -> None:
        """End now, and wait for the thread."""
        self.stop_soon(0)
        if self._thread.is_alive():
            self._thread.join(30)

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def accepts(self) -> bool:
        """Whether work is taken, and there is room for it."""
        return self.alive and not self._draining and len(self._waiting) < self._limits.waiting

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._waiting or self._prompts or self._running)

    def submit(self, works: Sequence[Work]) -> None:
        """Take on all of the prompts of a request, or none.

        Raises:
            ApiError: 429 when too many wait, 503 when the server is going down, 400 when there can
                never be room for all of them.
        """
        if len(works) > self._limits.waiting:
            raise ApiError(
                400,
                f"the request has {len(works)} prompts, and here at most {self._limits.waiting} "
                "can wait: send fewer at once",
                param="prompt",
            )
        with self._changed:
            if self._draining or not self._thread.is_alive():
                raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
            if len(self._waiting) + len(works) > self._limits.waiting:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} prompts are waiting and the limit is "
                    f"{self._limits.waiting}: try again in a moment",
                    code="queue_full",
                    headers={"Retry-After": str(1 + len(self._waiting) // 16)},
                )
            self._waiting.extend(works)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self.busy or self._draining):
                        self._changed.wait()
                    if self._draining and (not self.busy or time.monotonic() > self._end):
                        break
                self._round()
        except Exception as error:
            self.failed = True
            log.critical("the engine has ended, and so does the server", exc_info=error)
        finally:
            with self._changed:
                self._draining = True
                left = [*self._waiting, *(prompt.work for prompt in self._prompts)]
                self._waiting.clear()
            gone = ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
            left += _works_of([row for one in self._running for row in one.rows])
            for work in left:
                work.listener(Failure(gone))

    @property
    def _rows(self) -> int:
        return sum(len(one.rows) for one in self._running)

    def _round(self) -> None:
        self._drop_ended()
        self._admit()
        read = 0
        while self._prompts and read < PIECE:
            read += self._read_piece(self._prompts.popleft())
        for running in list(self._running):
            self._advance(running)
        self._running = [one for one in self._running if one.rows]
        self._metrics.running.set(self._rows + len(self._prompts))

    def _admit(self) -> None:
        while (work := self._next()) is not None:
            self._metrics.queue_seconds.observe(time.monotonic() - work.submitted)
            try:
                self._prompts.append(Prompt(work, self._passes, self._vocabulary))
            except Exception as error:
                self._fail([work], error)

    def _next(self) -> Work | None:
        """The first that waits, where there is room for it."""
        taken = self._rows + sum(prompt.work.wanted.n for prompt in self._prompts)
        with self._changed:
            if not self._waiting:
                return None
            if taken and taken + self._waiting[0].wanted.n > self._limits.running:
                return None
            work = self._waiting.popleft()
            self._metrics.waiting.set(len(self._waiting))
            return work

    def _drop_ended(self) -> None:
        """Forget work that was cancelled or has taken too long."""
        now = time.monotonic()
        with self._changed:
            for work in [work for work in self._waiting if _ended(work, now)]:
                self._waiting.remove(work)
                _give_up(work)
        for prompt in [prompt for prompt in self._prompts if _ended(prompt.work, now)]:
            self._prompts.remove(prompt)
            _give_up(prompt.work)
        for running in self._running:
            ended = [row for row in running.rows if _ended(row.work, now)]
            if ended:
                self._keep(running, [r for r in running.rows if not _ended(r.work, now)])
                for work in _works_of(ended):
                    _give_up(work)
        self._running = [one for one in self._running if one.rows]

    def _read_piece(self, prompt: Prompt) -> int:
        """Read a piece of a prompt; after the last, choose each continuation's first token.

        Returns the number of tokens read. A prompt of which more is to be read waits for its turn.
        """
        try:
            read = prompt.read_piece()
            if prompt.done:
                self._begin(prompt)
            else:
                self._prompts.append(prompt)
            return read
        except Exception as error:
            self._fail([prompt.work], error)
            return PIECE

    def _begin(self, prompt: Prompt) -> None:
        work, wanted = prompt.work, prompt.work.wanted
        self._metrics.prompt_tokens.inc(len(work.prompt))
        rows = [Row(work, n, self._vocabulary) for n in range(wanted.n)]
        for row in rows:
            if prompt.echoed:
                work.listener(News(row.choice, prompt.echoed))
            if not wanted.max_tokens:
                row.finished = "length"
                work.listener(News(row.choice, [], row.finished))
        if wanted.max_tokens:
            self._tell(rows, prompt.prediction, [prompt.number] * len(rows))
        self._metrics.first_token.observe(time.monotonic() - work.submitted)
        going = [row for row in rows if row.finished is None]
        if not going:
            return
        batch = prompt.batch
        batch.repeat(len(going))
        if not isinstance(batch, PlainBatch) or not batch.joins:
            self._running.append(_Running(going, batch))
            return
        for running in self._running:
            if isinstance(running.batch, PlainBatch):
                self._join(running, going, batch)
                return
        batch.share()
        self._running.append(_Running(going, batch))

    def _join(self, running: "_Running", rows: list[Row], batch: PlainBatch) -> None:
        """Have rows advance with others; where that fails, these are given up, too.

        For want of memory, some layers may have moved what the others have kept their states in.
        """
        assert isinstance(running.batch, PlainBatch)
        try:
            running.batch.join(batch)
        except Exception as error:
            self._fail(_works_of(running.rows), error)
            self._running.remove(running)
            raise
        running.rows += rows

    def _advance(self, running: "_Running") -> None:
        """Go on with rows, or give them all up where that fails."""
        try:
            self._step(running)
        except Exception as error:
            self._fail(_works_of([r for r in running.rows if r.finished is None]), error)
            running.rows = []

    def _step(self, running: "_Running") -> None:
        """One more token for each of the rows, or several where drafts of them prove right."""
        rows, batch = running.rows, running.batch
        joined = batch if isinstance(batch, PlainBatch) and batch.joins else None
        found = [NO_DRAFT] * len(rows)
        if joined is not None and self._drafts is not None:
            found = self._drafts.find(rows)
        drafts: list[list[int]] = [one.tokens.tolist() for one in found]
        width = 1 + max(map(len, drafts))
        if width > 1 and self._drafts is not None:
            width = max(width, 1 + self._drafts.least(len(rows)))
        last = [row.tokens[-1] for row in rows]
        with self._metrics.pass_seconds.time():
            if joined is not None and width > 1:
                read = [[t, *own] for t, own in zip(last, drafts, strict=True)]
                passed = joined.verify(read, width)
            else:
                passed = batch.step(last)
        right, going = [0] * len(rows), list(range(len(rows)))
        for place in range(width):
            self._predict_each(rows, going, passed.at(place))
            going = [
                n
                for n in going
                if rows[n].finished is None and rows[n].tokens[-1:] == drafts[n][place : place + 1]
            ]
            for n in going:
                right[n] += 1
        if joined is not None and self._drafts is not None:
            joined.take_back([width - 1 - count for count in right])
            self._drafts.saw(found, right)
        self._keep(running, [row for row in rows if row.finished is None])

    def _predict_each(self, rows: Sequence[Row], going: Sequence[int], passed: Passed) -> None:
        """The next token of some rows; those of one method are looked up together."""
        alike: dict[int, list[int]] = {}
        for number in going:
            alike.setdefault(id(rows[number].work.ensemble), []).append(number)
        for numbers in alike.values():
            some = [rows[number] for number in numbers]
            try:
                self._predict(some, passed.rows(numbers))
            except Exception as error:
                self._fail(_works_of(some), error)
                for row in some:
                    row.finished = "error"

    def _predict(self, rows: Sequence[Row], passed: Passed) -> None:
        ensemble = rows[0].work.ensemble
        # Contexts that are not looked at need not be put together.
        contexts = [row.tokens if ensemble.needs_context else row.tokens[-1:] for row in rows]
        with self._metrics.mix_seconds.time():
            prediction = Mixture(
                ensemble,
                row_queries(passed.keys[:, -1].numpy(), contexts, ensemble.reach),
                [row.state for row in rows],
                passed.log_probs[:, -1],
                None if passed.alone is None else passed.alone[:, -1],
                [of_row[-1] for of_row in passed.read],
            )
        self._tell(rows, prediction, range(len(rows)))

    def _tell(self, rows: Sequence[Row], prediction: Mixture, numbers: Sequence[int]) -> None:
        """Choose each row's next token, tell its listener, and carry its state on.

        `numbers` are the rows' places in the prediction. A row whose own part fails is given up
        without the others.
        """
        chosen = choose_each(
            prediction.log_probs,
            numbers,
            [row.work.wanted for row in rows],
            [row.rng for row in rows],
        )
        going, at, tokens = [], [], []
        for row, number, token in zip(rows, numbers, chosen, strict=True):
            if isinstance(token, Exception):
                self._fail_row(row, token)
            else:
                going.append(row)
                at.append(number)
                tokens.append(token)
        if not going:
            return
        told = tell([row.work.wanted for row in going], prediction, at, tokens)
        states = prediction.after(at, tokens)
        self._metrics.generated_tokens.inc(len(going))
        for row, one, state in zip(going, told, states, strict=True):
            try:
                final = row.add(one)
            except Exception as error:
                self._fail_row(row, error)
                continue
            row.state = state
            if final or row.finished:
                row.work.listener(News(row.choice, final, row.finished, row.new))

    def _keep(self, running: "_Running", rows: list[Row]) -> None:
        """Go on with some rows, or with none where that fails."""
        try:
            running.keep(rows)
        except Exception as error:
            self._fail(_works_of(rows), error)
            running.rows = []

    def _fail_row(self, row: Row, error: Exception) -> None:
        row.finished = "error"
        self._fail([row.work], error)

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        """Give up work; what the user cannot mend goes to the log.

        Raises:
            RuntimeError: the model's device fails for good.
        """
        if not isinstance(error, NearestError | ApiError):
            log.error("a step of the engine failed", exc_info=error)
        for work in works:
            work.listener(Failure(of_error(error)))
        if isinstance(error, RuntimeError):
            _check(self._passes.model.device)


class _Running:
    """Continuations that advance together."""

    def __init__(self, rows: list[Row], batch: Batch) -> None:
        self.rows = rows
        self.batch = batch

    def keep(self, rows: list[Row]) -> None:
        """Go on with some of the rows."""
        if rows and len(rows) < len(self.rows):
            kept = {id(row) for row in rows}
            numbers = [n for n, row in enumerate(self.rows) if id(row) in kept]
            rows = [self.rows[n] for n in self.batch.keep(numbers)]
        self.rows = rows


def _ended(work: Work, now: float) -> bool:
    return work.cancelled or now > work.deadline


def _give_up(work: Work) -> None:
    message = "the request took longer than the server allows: ask for fewer tokens"
    work.listener(Failure(ApiError(504, message, code="timeout")))


def _works_of(rows: Sequence[Row]) -> list[Work]:
    return list({id(row.work): row.work for row in rows}.values())


def _check(device: torch.device) -> None:
    """Raise what the device raises at every call, as CUDA does after a failed assertion."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
