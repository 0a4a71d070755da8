"""What the routes share: the model by name, its vocabulary, memories, engine and metrics."""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

from anyio import to_thread
from starlette.requests import Request

from nearest.encode.layers import LanguageModel
from nearest.serve.answers import Choice
from nearest.serve.engine import Engine
from nearest.serve.errors import ApiError
from nearest.serve.library import Library, Retrieval
from nearest.serve.metrics import Metrics
from nearest.serve.provenance import Provenance
from nearest.serve.schema import NearestOptions, Sampling
from nearest.serve.vocabulary import Vocabulary
from nearest.serve.work import Failure, Listener, News, Wanted, Work

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One model with its memories.

    Attributes:
        model_name: what requests call it; `NAME@METHOD` is the same model with another method.
        positions: the longest sequence that the model reads, None without limit.
        timeout: seconds that a request may take in all.
        started: when, in seconds since 1970.
        writer: the model that reads documents to be added; None where the memories stay as are.
    """

    model_name: str
    vocabulary: Vocabulary
    library: Library
    engine: Engine
    metrics: Metrics
    positions: int | None
    timeout: float = 600.0
    started: float = 0.0
    writer: LanguageModel | None = None

    @property
    def model_names(self) -> list[str]:
        """The model, and with each of its methods."""
        return [self.model_name, *(f"{self.model_name}@{m}" for m in self.library.methods)]

    def method(self, model: str) -> str | None:
        """The method that a model's name asks for; None for the server's own.

        Raises:
            ApiError: there is no such model.
        """
        if model not in self.model_names:
            raise ApiError(
                404,
                f"there is no model {model!r} here: choose among {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )
        name = model.removeprefix(self.model_name).removeprefix("@")
        return name or None

    def max_tokens(
        self, prompt: Sequence[int], asked: int | None, default: int | None, beside: int
    ) -> int:
        """Tokens to generate after a prompt, where `beside` tokens may be read beside the text.

        Raises:
            ApiError: prompt and new tokens exceed the model's positions.
        """
        if self.positions is None:
            return asked if asked is not None else default or 4096
        room = self.positions - len(prompt) - beside
        # The last token that is generated is never read, and so may stand beyond the positions;
        # the prompt is, even where none is to come.
        if room + 1 < (asked or 1):
            raise ApiError(
                400,
                f"this model reads at most {self.positions:,} tokens, and the prompt has "
                f"{len(prompt):,}, with {1 if asked is None else asked:,} to come"
                + (f" and {beside:,} of passages" if beside else "")
                + ": shorten the prompt, or ask for fewer",
                param="max_tokens" if room >= 0 else "prompt",
                code="context_length_exceeded",
            )
        return asked if asked is not None else min(default or room + 1, room + 1)

    def wanted(
        self,
        request: Sampling,
        max_tokens: int,
        *,
        top: int = 0,
        echo: bool = False,
        seed: int,
        sources: bool,
    ) -> Wanted:
        """What a request wants of the engine."""
        options = request.nearest
        told = options if options is not None and options.sources else None
        temperature = 1.0 if request.temperature is None else float(request.temperature)
        replay = 0 if options is None else options.replay
        return Wanted(
            max_tokens,
            request.n or 1,
            temperature,
            1.0 if request.top_p is None else float(request.top_p),
            seed,
            request.stops,
            max(top, told.alternatives if told else 0),
            told.alternatives if told else 0,
            sources,
            echo,
            10**9 if replay == "full" else replay,
        )

    def choices(
        self,
        count: int,
        retrieval: Retrieval,
        options: NearestOptions | None,
        request: Request,
        *,
        cited: bool,
    ) -> list[Choice]:
        """Empty answers, with provenance where it is told."""
        tokens = options is not None and options.sources
        return [
            Choice(
                index,
                Provenance(retrieval, self.library, self.vocabulary, str(request.base_url))
                if tokens or cited
                else None,
                tokens,
            )
            for index in range(count)
        ]

    async def warm_up(self) -> None:
        """Answer once with the server's method, and name the answer's sources."""
        retrieval = self.library.retrieval(None, None)
        wanted = Wanted(4, temperature=0, sources=True)
        provenance = Provenance(retrieval, self.library, self.vocabulary, "")
        prompt = self.vocabulary.prompt("a", retrieval.start_token)
        # What is compiled may take longer than a request may.
        async for _, news in self.news([prompt], [wanted], retrieval, seconds=inf):
            for told in news.told:
                await in_thread(provenance.token, told)
        await in_thread(provenance.summary)

    async def news(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[Wanted],
        retrieval: Retrieval,
        *,
        seconds: float | None = None,
    ) -> AsyncGenerator[tuple[int, News], None]:
        """What happens to a request's continuations, each with its number, until all have ended.

        Leaving the iterator cancels what is under way. It may take `seconds` in all, by default the
        server's time-out.
        """
        inbox = Inbox()

        def listener(number: int) -> Listener:
            return lambda news: inbox.put(number, news)

        deadline = time.monotonic() + (self.timeout if seconds is None else seconds)
        works = [
            Work(prompt, one, retrieval.ensemble, listener(number), retrieval.reading, deadline)
            for number, (prompt, one) in enumerate(zip(prompts, wanted, strict=True))
        ]
        left = sum(one.n for one in wanted)
        self.engine.submit(works)
        try:
            while left:
                for number, news in await inbox.get():
                    left -= news.finished is not None
                    yield number * wanted[number].n + news.choice, news
        finally:
            for work in works:
                work.cancelled = True


class Inbox:
    """News from the engine's thread for one coroutine, which takes all that have come at once.

    Where several of one continuation have come they are one: a client that is slower than the
    model gets larger pieces, and costs less.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._news: deque[tuple[int, News | Failure]] = deque()

    def put(self, number: int, news: News | Failure) -> None:
        """Take news of the request's prompt of this number; from any thread."""
        self._news.append((number, news))
        if len(self._news) == 1:  # else the reader is awake, or about to be
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._came.set)

    async def get(self) -> list[tuple[int, News]]:
        """All news that have come.

        Raises:
            ApiError: the work was given up.
        """
        await self._came.wait()
        self._came.clear()
        merged: dict[tuple[int, int], News] = {}
        while self._news:
            number, news = self._news.popleft()
            if isinstance(news, Failure):
                if not merged:
                    raise news.error
                self._news.appendleft((number, news))  # after what came before it
                self._came.set()
                break
            which = number, news.choice
            before = merged.get(which)
            merged[which] = news if before is None else before.and_then(news)
        return [(number, news) for (number, _), news in merged.items()]


def new_seed(seed: int | None) -> int:
    """A request's seed, or a random one."""
    return secrets.randbits(63) if seed is None else seed


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run what reads files or takes long beside the event loop."""
    return await to_thread.run_sync(function, *args)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for an answer; stop the work when the client has closed its connection.

    Raises:
        ApiError: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await one


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
