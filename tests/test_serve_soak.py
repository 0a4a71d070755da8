"""Many clients for a while: what `benchmarks/serving.py` does for minutes, for one."""

import asyncio
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from nearest import Memory
from serving import roomy_model, serving, with_gates

WRITE_KEY = "a-key-to-write"
CLIENTS, LEAVING, WRITERS, ANSWERS = 64, 10, 2, 12
METHODS = ("base", "suffix", "hybrid", "knn")


def told(line: str) -> dict[str, Any] | None:
    if not line.startswith("data: {"):
        return None
    choice: dict[str, Any] = json.loads(line[6:])["choices"][0]["logprobs"]
    return choice


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            for name, values in (told(line) or {}).items():
                if name in answer:
                    answer[name] += values
    return answer


def differs(alone: dict[str, Any], other: dict[str, Any]) -> str | None:
    if len(alone["tokens"]) != len(other["tokens"]):
        return "tokens are lost"
    for n, (one, two) in enumerate(zip(alone["tokens"], other["tokens"], strict=True)):
        best = sorted(alone["top_logprobs"][n].values(), reverse=True)
        if one != two:
            return None if best[0] - best[1] <= 1e-4 else f"token {n} is {two!r}, not {one!r}"
        if abs(alone["token_logprobs"][n] - other["token_logprobs"][n]) > 1e-4:
            return f"the log-probability of token {n} differs"
    return None


@pytest.mark.slow
def test_sixty_four_clients_get_what_each_would_get_alone(
    build_memory: Callable[..., Memory], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Ten leave in the middle, two write documents into one of the memories.

    Suffix matches in that one are none with what is written; dense searches, in which a new entry
    may be near anything, go to the other.
    """
    model = roomy_model()
    still, written = (build_memory(model) for _ in range(2))
    folder = tmp_path / "still.memory"
    shutil.copytree(still.path, folder)
    memories = [
        with_gates(model, Memory.open(folder), tiny_tokenizer, ["hybrid"]),
        with_gates(model, written, tiny_tokenizer, ["hybrid"]),
    ]
    rng = random.Random(0)
    bodies: list[dict[str, Any]] = []
    for n in range(16):
        method = METHODS[n % len(METHODS)]
        body = {
            "model": f"tiny@{method}",
            "prompt": [0, *(rng.randrange(60, 120) for _ in range(rng.randrange(1, 60)))],
            "max_tokens": rng.randrange(8, 40),
            "temperature": 0,
            "logprobs": 2,
            "stream": True,
        }
        if method != "base":
            name = "test" if method == "suffix" else "still"
            body["nearest"] = {"memories": [{"name": name}], "sources": n % 3 == 0}
        bodies.append(body)

    async def run(url: str) -> list[str]:
        # Each request has a connection of its own: the server closes idle ones after five seconds,
        # which on a busy machine may cross with the next request on them.
        limits = httpx.Limits(
            max_connections=CLIENTS + LEAVING + WRITERS, max_keepalive_connections=0
        )
        async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:
            alone = [await streamed(client, body) for body in bodies]
            problems: list[str] = []

            async def one(number: int) -> None:
                for turn in range(ANSWERS):
                    which = (7 * number + turn) % len(bodies)
                    problem = differs(alone[which], await streamed(client, bodies[which]))
                    if problem is not None:
                        problems.append(f"{bodies[which]['model']}: {problem}")

            async def leave(number: int) -> None:
                for turn in itertools.count(number):
                    body = bodies[turn % len(bodies)]
                    async with client.stream("POST", "/v1/completions", json=body) as response:
                        async for _ in response.aiter_lines():
                            if turn % 5 == 0:
                                break

            async def write(number: int) -> None:
                headers = {"Authorization": f"Bearer {WRITE_KEY}"}
                for turn in itertools.count():
                    document = {"id": f"new-{number}-{turn}", "text": "~" * 5}
                    url, body = "/v1/nearest/documents/test", {"documents": [document]}
                    answer = await client.post(url, json=body, headers=headers)
                    assert answer.status_code == 200, answer.text

            others = [asyncio.create_task(leave(n)) for n in range(LEAVING)]
            others += [asyncio.create_task(write(n)) for n in range(WRITERS)]
            await asyncio.gather(*(one(number) for number in range(CLIENTS)))
            for task in others:
                assert not task.done(), task.exception()
                task.cancel()
            return problems

    with serving(model, tiny_tokenizer, memories, write_key=WRITE_KEY) as running:
        assert asyncio.run(run(running.url)) == []
        while running.service.engine.busy:  # those that left have freed their places
            asyncio.run(asyncio.sleep(0.05))
