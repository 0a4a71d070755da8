r"""Load a server that runs: first-token latency, throughput alone and together, and correctness.

    nearest serve law.memory --writable --write-key a-key-to-write &
    python benchmarks/serving.py --clients 64 --seconds 300 --memory law.memory
    python benchmarks/serving.py --clients 64 --seconds 300 --leaving 10 --writers 2 \
        --write-key a-key-to-write

Each client streams greedy completions of prompts cut from the memory's own documents, one after
another. Every answer is compared with the one that the same prompt got alone: tokens must be equal
wherever the alone choice led by more than 1e-4, log-probabilities within 1e-4. Prints one JSON
object; exits with 1 if an answer was lost, mixed up or wrong. Sends to the loopback only.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any
from urllib.parse import urlparse

import httpx
import torch

from nearest import Memory, attach, read_documents
from nearest.encode.loading import load_model_and_tokenizer


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
            gap = other["log_probs"][n] - alone["log_probs"][n]
            return f"the log-probability of token {n} differs by {gap:g}"
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


def beginnings(path: str, count: int) -> list[str]:
    """Beginnings of a corpus's documents, as long as those of `prompts_of`."""
    texts = (document.text for document in read_documents([path]) if len(document.text) > 400)
    return [text[: 100 + 37 * (n % 8)] for n, text in enumerate(islice(texts, count))]


def generated(
    memory: Memory, loaded: Any, method: str, prompts: list[str], tokens: int
) -> list[float]:
    """Milliseconds a token that `generate` takes with the memory attached, of each prompt."""
    model, tokenizer = loaded
    torch.set_num_threads(1)
    taken = []
    with nullcontext() if method == "base" else attach(model, memory, method):
        for prompt in [prompts[0], *prompts]:
            start = memory.manifest.model.start_token
            ids = torch.tensor([[start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            began = time.perf_counter()
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=start)
            taken.append(1000 * (time.perf_counter() - began) / (out.shape[1] - ids.shape[1]))
    return taken[1:]


def each_token(answer: dict[str, Any]) -> float:
    """Milliseconds between the tokens of a streamed answer."""
    times = answer["times"]
    return 1000 * (times[-1] - times[0]) / max(1, len(answer["tokens"]) - 1)


async def leaving(client: httpx.AsyncClient, body: dict[str, Any], until: float) -> int:
    """Ask again and again, and go away in the middle of each answer."""
    rng, count = random.Random(body["prompt"]), 0
    while time.perf_counter() < until:
        wanted, seen = rng.randrange(1, 12), 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                if (seen := seen + 1) > wanted:
                    break
        count += 1
    return count


async def writing(client: httpx.AsyncClient, number: int, key: str, until: float) -> int:
    """Add a document and take it back, again and again; its text is like none in a memory."""
    memory = (await client.get("/v1/nearest")).json()["memories"][0]["name"]
    url, headers, count = f"/v1/nearest/documents/{memory}", {"Authorization": f"Bearer {key}"}, 0
    while time.perf_counter() < until:
        name = f"load-{number}-{count}"
        body = {"documents": [{"id": name, "text": "\u2603\u2603\u2603 \u2603"}]}
        (await client.post(url, json=body, headers=headers)).raise_for_status()
        gone = await client.delete(url, params={"id": name}, headers=headers)
        gone.raise_for_status()
        count += 2
    return count


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one record."""
    if options.memory:  # first: what is wrong with it is told before the load
        memory = Memory.open(options.memory)
        loaded = load_model_and_tokenizer(memory.manifest.model.name)
    limits = httpx.Limits(max_connections=options.clients + options.leaving + 8)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as client:
        model = options.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        base = model.partition("@")[0] + "@base"
        if options.texts:
            prompts = beginnings(options.texts, options.prompts)
        else:
            prompts = await prompts_of(client, options.prompts)
        common = {
            "temperature": options.temperature,
            "logprobs": 2,
            "stream": True,
            "max_tokens": options.tokens,
        }
        bodies = [{**common, "model": model, "prompt": p} for p in prompts]
        await streamed(client, bodies[0])
        alone, by_base = [], []
        alone_seconds = 0.0
        for body in bodies:
            began = time.perf_counter()
            alone.append(await streamed(client, body))
            alone_seconds += time.perf_counter() - began
            by_base.append(await streamed(client, {**body, "model": base}))
        wrong: list[str] = []
        done: list[dict[str, Any]] = []
        began = time.perf_counter()
        until = began + options.seconds

        async def client_of(number: int) -> None:
            for turn in range(10**9):
                if time.perf_counter() > until:
                    return
                which = (number * 31 + turn) % len(bodies)
                try:
                    answer = await streamed(client, bodies[which])
                except (httpx.HTTPError, RuntimeError) as error:
                    wrong.append(repr(error))
                    continue
                done.append(answer)
                if options.temperature:  # then each answer is another
                    continue
                if (problem := differs(alone[which], answer)) is not None:
                    wrong.append(f"prompt {which}: {problem}")

        others = [leaving(client, bodies[n % len(bodies)], until) for n in range(options.leaving)]
        others += [writing(client, n, options.write_key, until) for n in range(options.writers)]
        clients = [client_of(number) for number in range(options.clients)]
        *_, counts = await asyncio.gather(*clients, asyncio.gather(*others))
        seconds = time.perf_counter() - began
    alone_rate = sum(len(a["tokens"]) for a in alone) / alone_seconds
    together = sum(len(a["tokens"]) for a in done) / seconds
    record = {
        "model": model,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "answers": len(done),
        "left_in_the_middle": sum(counts[: options.leaving]),
        "writes": sum(counts[options.leaving :]),
        "wrong": wrong[:10],
        "errors": len(wrong),
        "first_token_ms_base_alone": round(median_first(by_base), 1),
        "first_token_ms_alone": round(median_first(alone), 1),
        "first_token_ms": round(median_first(done), 1),
        "ms_a_token_alone": round(statistics.median(map(each_token, alone)), 2),
        "tok_s_alone": round(alone_rate, 1),
        "tok_s": round(together, 1),
        "speedup": round(together / alone_rate, 2),
    }
    if options.memory:
        method = model.partition("@")[2] or "knn"
        taken = generated(memory, loaded, method, prompts, options.tokens)
        record["ms_a_token_generate"] = round(statistics.median(taken), 2)
    return record


def median_first(answers: list[dict[str, Any]]) -> float:
    """Median milliseconds to the first token."""
    return statistics.median(1000 * answer["times"][0] for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="such as NAME@knn; the server's first when not given")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--texts", help="a corpus that prompts begin, not the memory's documents")
    parser.add_argument("--temperature", type=float, default=0, help="above 0 nothing is compared")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--leaving", type=int, default=0, help="clients that leave in the middle")
    parser.add_argument(
        "--writers", type=int, default=0, help="of documents, of a --writable server"
    )
    parser.add_argument("--write-key", default="")
    parser.add_argument("--memory", help="its folder: times `generate` too, with one thread")
    options = parser.parse_args()
    if urlparse(options.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        parser.error("only a server on this machine is loaded: give a loopback address")
    record = asyncio.run(load(options))
    print(json.dumps(record))
    raise SystemExit(record["errors"] > 0)


if __name__ == "__main__":
    main()
