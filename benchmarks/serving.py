"""Load a server that runs: first-token latency, throughput alone and together, and correctness.

    nearest serve law.memory &
    python benchmarks/serving.py --url http://127.0.0.1:8000 --clients 64 --seconds 300

Each client streams greedy completions of prompts cut from the memory's own documents, one after
another. Every answer is compared with the one that the same prompt got alone: tokens must be equal
wherever the alone choice led by more than 1e-4, log-probabilities within 1e-4. Prints one JSON
object; exits with 1 if an answer was lost, mixed up or wrong. Sends to the loopback only.
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import Any
from urllib.parse import urlparse

import httpx


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """One answer: its tokens, their log-probabilities and leads, and when they came."""
    began, times = time.perf_counter(), []
    tokens: list[str] = []
    log_probs: list[float] = []
    leads: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            told = json.loads(line[6:])
            if "error" in told:
                raise RuntimeError(told["error"]["message"])
            times.append(time.perf_counter() - began)
            part = told["choices"][0]["logprobs"]
            tokens += part["tokens"]
            log_probs += part["token_logprobs"]
            for top in part["top_logprobs"]:
                best = sorted(top.values(), reverse=True)
                leads.append(best[0] - best[1] if len(best) > 1 else float("inf"))
    return {"tokens": tokens, "log_probs": log_probs, "leads": leads, "times": times}


def differs(alone: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What is wrong with an answer, None where nothing is."""
    if len(alone["tokens"]) != len(other["tokens"]):
        return "tokens are lost"
    for n, (one, two) in enumerate(zip(alone["tokens"], other["tokens"], strict=True)):
        if one != two:
            return None if alone["leads"][n] <= 1e-4 else f"token {n} is {two!r}, not {one!r}"
        if abs(alone["log_probs"][n] - other["log_probs"][n]) > 1e-4:
            return f"the log-probability of token {n} differs"
    return None


async def prompts_of(client: httpx.AsyncClient, count: int) -> list[str]:
    """Beginnings of sentences from the memory's documents."""
    memory = (await client.get("/v1/nearest")).json()["memories"][0]["name"]
    listed = (await client.get(f"/v1/nearest/documents/{memory}")).json()["documents"]
    prompts = []
    for number in range(count):
        wanted = {"id": listed[number % len(listed)]["id"]}
        text = (await client.get(f"/v1/nearest/documents/{memory}", params=wanted)).json()["text"]
        start = (number * 997) % max(1, len(text) - 400)
        prompts.append(text[start : start + 100 + 37 * (number % 8)])
    return prompts


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one record."""
    limits = httpx.Limits(max_connections=options.clients + 4)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as client:
        model = options.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        prompts = await prompts_of(client, options.prompts)
        common = {"model": model, "temperature": 0, "logprobs": 2, "stream": True}
        bodies = [{**common, "prompt": p, "max_tokens": options.tokens} for p in prompts]
        await streamed(client, bodies[0])
        began = time.perf_counter()
        alone = [await streamed(client, body) for body in bodies]
        alone_seconds = time.perf_counter() - began
        wrong: list[str] = []
        done: list[dict[str, Any]] = []
        began = time.perf_counter()

        async def client_of(number: int) -> None:
            for turn in range(10**9):
                if time.perf_counter() - began > options.seconds:
                    return
                which = (number * 31 + turn) % len(bodies)
                try:
                    answer = await streamed(client, bodies[which])
                except (httpx.HTTPError, RuntimeError) as error:
                    wrong.append(repr(error))
                    continue
                done.append(answer)
                if (problem := differs(alone[which], answer)) is not None:
                    wrong.append(f"prompt {which}: {problem}")

        await asyncio.gather(*(client_of(number) for number in range(options.clients)))
        seconds = time.perf_counter() - began
    alone_rate = sum(len(a["tokens"]) for a in alone) / alone_seconds
    together = sum(len(a["tokens"]) for a in done) / seconds
    return {
        "model": model,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "answers": len(done),
        "wrong": wrong[:10],
        "errors": len(wrong),
        "first_token_ms_alone": round(1000 * statistics.median(a["times"][0] for a in alone), 1),
        "first_token_ms": round(1000 * statistics.median(a["times"][0] for a in done), 1),
        "tok_s_alone": round(alone_rate, 1),
        "tok_s": round(together, 1),
        "speedup": round(together / alone_rate, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="such as NAME@knn; the server's first when not given")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    if urlparse(options.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("only a server on this machine is loaded: give a loopback address")
    record = asyncio.run(load(options))
    print(json.dumps(record))
    raise SystemExit(record["errors"] > 0)


if __name__ == "__main__":
    main()
