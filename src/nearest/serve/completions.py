"""`/v1/completions` and `/v1/chat/completions`, whole or as server-sent events."""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from nearest.errors import NearestError
from nearest.retrieval.settings import IN_CONTEXT
from nearest.serve.answers import (
    Choice,
    chat_log_probs,
    new_id,
    now,
    text_log_probs,
    usage,
)
from nearest.serve.errors import ApiError, of_error
from nearest.serve.library import Retrieval
from nearest.serve.readings import of_method
from nearest.serve.schema import ChatRequest, CompletionRequest, Sampling
from nearest.serve.service import Service, in_thread, new_seed, unless_gone
from nearest.serve.work import News, Told, Wanted

T = TypeVar("T")

_DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
_ONE_ANSWER = 1 << 22  # tokens of all continuations, at most
_CUTTING = 4  # threads for requests that may wait for documents to be cut into passages


@dataclass(frozen=True)
class _Asked:
    """A request as the engine takes it, and how its answer is written."""

    request: Sampling
    prompts: Sequence[Sequence[int]]
    wanted: Sequence[Wanted]
    retrieval: Retrieval
    choices: list[Choice]
    id: str
    kind: str  # of the whole answer
    kind_of_piece: str
    whole: Callable[[Choice], dict[str, Any]]
    piece: Callable[[Choice, Sequence[Told], str | None], dict[str, Any]]
    first: dict[str, Any] | None = None  # of each choice, before its first token


def router(service: Service) -> APIRouter:
    """The routes that generate."""
    routes = APIRouter()
    few = CapacityLimiter(_CUTTING)

    async def prepared(prepare: Callable[..., _Asked], body: Sampling, request: Request) -> _Asked:
        method = service.library.method_of(service.method(body.model), body.nearest)
        limiter = few if of_method(method)[0] == IN_CONTEXT else None
        return await to_thread.run_sync(prepare, service, body, request, limiter=limiter)

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        asked = await prepared(_completion, body, request)
        return await _answer(service, asked, request)

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = await prepared(_chat, body, request)
        return await _answer(service, asked, request)

    return routes


def _completion(service: Service, body: CompletionRequest, request: Request) -> _Asked:
    vocabulary, echo = service.vocabulary, bool(body.echo)
    retrieval = service.library.retrieval(service.method(body.model), body.nearest)
    start, room = retrieval.start_token, retrieval.reading.room
    texts, prompts = [], []
    for prompt in body.prompts:
        texts.append(isinstance(prompt, str))
        if isinstance(prompt, str):
            prompt = vocabulary.prompt(prompt, start, special_tokens=body.special_tokens)
        else:
            vocabulary.check(prompt, "prompt")
        prompts.append(prompt)
    seed = new_seed(body.seed)
    sources = body.nearest is not None and body.nearest.sources
    wanted = [
        service.wanted(
            body,
            service.max_tokens(prompt, body.max_tokens, _DEFAULT_TOKENS, room),
            # The chosen token's own probability is told with the likeliest's beside it.
            top=0 if body.logprobs is None else max(1, body.logprobs),
            echo=echo,
            seed=seed + number,
            sources=sources,
        )
        for number, prompt in enumerate(prompts)
    ]
    _check_size(wanted)
    count = sum(one.n for one in wanted)
    choices = service.choices(count, retrieval, body.nearest, request, cited=False)
    per_prompt = body.n or 1

    def shown(choice: Choice, told: Sequence[Told]) -> list[Told]:
        """Without the start token, which a text's client has not sent."""
        hide = echo and start is not None and texts[choice.index // per_prompt]
        return [t for t in told if not (hide and t.prompt and t.log_prob is None)]

    def log_probs(choice: Choice, told: Sequence[Told], offset: int) -> dict[str, Any] | None:
        if body.logprobs is None:
            return None
        return text_log_probs(shown(choice, told), vocabulary, body.logprobs, offset)

    def whole(choice: Choice) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": log_probs(choice, choice.told, 0)}

    def piece(choice: Choice, told: Sequence[Told], finished: str | None) -> dict[str, Any]:
        text = "".join(one.text for one in told)
        return {"text": text, "logprobs": log_probs(choice, told, len(choice.text) - len(text))}

    kind = "text_completion"
    return _Asked(
        body, prompts, wanted, retrieval, choices, new_id("cmpl"), kind, kind, whole, piece
    )


def _chat(service: Service, body: ChatRequest, request: Request) -> _Asked:
    vocabulary = service.vocabulary
    retrieval = service.library.retrieval(service.method(body.model), body.nearest)
    messages = [{"role": one.role, "content": one.text} for one in body.messages]
    prompt = vocabulary.conversation(messages)
    top = body.top_logprobs or 0
    asked = body.max_completion_tokens or body.max_tokens
    cited = bool(retrieval.memories) and (body.nearest is None or body.nearest.sources)
    wanted = service.wanted(
        body,
        service.max_tokens(prompt, asked, None, retrieval.reading.room),
        top=top,
        seed=new_seed(body.seed),
        sources=cited,
    )
    _check_size([wanted])
    choices = service.choices(wanted.n, retrieval, body.nearest, request, cited=cited)

    def log_probs(told: Sequence[Told]) -> dict[str, Any] | None:
        return chat_log_probs(told, vocabulary, top) if body.logprobs else None

    def citations(choice: Choice) -> list[dict[str, Any]]:
        return choice.provenance.citations() if choice.provenance else []

    def whole(choice: Choice) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": choice.text,
            "refusal": None,
            "annotations": citations(choice),
        }
        return {"message": message, "logprobs": log_probs(choice.told)}

    def piece(choice: Choice, told: Sequence[Told], finished: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": "".join(one.text for one in told)}
        if finished and (found := citations(choice)):
            delta["annotations"] = found
        return {"delta": delta, "logprobs": log_probs(told)}

    first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
    return _Asked(
        body,
        [prompt],
        [wanted],
        retrieval,
        choices,
        new_id("chatcmpl"),
        "chat.completion",
        "chat.completion.chunk",
        whole,
        piece,
        first,
    )


def _check_size(wanted: Sequence[Wanted]) -> None:
    if sum(one.n * max(1, one.max_tokens) for one in wanted) > _ONE_ANSWER:
        raise ApiError(
            400,
            f"the request asks for more than {_ONE_ANSWER:,} tokens: ask for fewer, or for fewer "
            "continuations",
            param="max_tokens",
        )


async def _answer(service: Service, asked: _Asked, request: Request) -> Response:
    if not asked.request.stream:
        with service.metrics.request_seconds.time():
            return JSONResponse(await unless_gone(request, _whole(service, asked)))
    events = _events(service, asked)
    first = await unless_gone(request, anext(events))  # what is refused has a status of its own
    return StreamingResponse(
        _chained(first, events),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _whole(service: Service, asked: _Asked) -> dict[str, Any]:
    async with aclosing(_news(service, asked)) as stream:
        async for number, news in stream:
            await _take(asked.choices[number], news)
    choices = await in_thread(_choices, asked)
    return {
        "id": asked.id,
        "object": asked.kind,
        "created": now(),
        "model": asked.request.model,
        "system_fingerprint": None,
        "choices": choices,
        "usage": usage(sum(map(len, asked.prompts)), asked.choices),
    }


def _choices(asked: _Asked) -> list[dict[str, Any]]:
    choices = []
    for choice in asked.choices:
        written = {"index": choice.index, **asked.whole(choice), "finish_reason": choice.finished}
        if (summary := choice.summary()) is not None:
            written["nearest"] = {**summary, "tokens": choice.tokens, "reads": choice.reads()}
        choices.append(written)
    return choices


async def _take(choice: Choice, news: News) -> list[dict[str, Any]]:
    """Add news to a choice; its tokens as the extension tells them."""
    choice.finished = news.finished or choice.finished
    choice.generated = news.generated
    if choice.provenance is None:
        return choice.add(news.told)
    tokens: list[dict[str, Any]] = await in_thread(choice.add, news.told)
    return tokens


async def _events(service: Service, asked: _Asked) -> AsyncGenerator[str, None]:
    """Server-sent events, one for every piece of text."""
    head = {
        "id": asked.id,
        "object": asked.kind_of_piece,
        "created": now(),
        "model": asked.request.model,
        "system_fingerprint": None,
    }
    options = asked.request.stream_options
    with_usage = options is not None and options.include_usage
    if with_usage:
        head["usage"] = None
    begun: set[int] = set()
    started = time.perf_counter()
    try:
        async with aclosing(_news(service, asked)) as stream:
            async for number, news in stream:
                choice = asked.choices[number]
                if asked.first is not None and number not in begun:
                    begun.add(number)
                    first = {"index": number, **asked.first, "finish_reason": None}
                    yield _event({**head, "choices": [first]})
                tokens = await _take(choice, news)
                begun.add(number)
                # The last piece cites documents, which are read.
                piece = in_thread if news.finished else _at_once
                written = {
                    "index": number,
                    **await piece(asked.piece, choice, news.told, news.finished),
                    "finish_reason": news.finished,
                }
                if choice.with_tokens:
                    summary = await in_thread(choice.summary) if news.finished else None
                    reads = await in_thread(choice.reads)
                    told = {"tokens": tokens, "reads": reads}
                    written["nearest"] = {**(summary or {"version": 1}), **told}
                yield _event({**head, "choices": [written]})
        if with_usage:
            counted = usage(sum(map(len, asked.prompts)), asked.choices)
            yield _event({**head, "choices": [], "usage": counted})
    except (ApiError, NearestError) as error:
        if not begun:  # nothing was sent, and the answer may have a status of its own
            raise
        yield _event(of_error(error).body())
    finally:
        service.metrics.request_seconds.observe(time.perf_counter() - started)
    yield "data: [DONE]\n\n"


async def _at_once(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


def _news(service: Service, asked: _Asked) -> AsyncGenerator[tuple[int, News], None]:
    return service.news(asked.prompts, asked.wanted, asked.retrieval)


async def _chained(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
