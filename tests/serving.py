"""A server in a thread of the test's own process, on a free port of the loopback."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from conftest import BYTES_AND_SPECIALS, gates_trained_at_once, make_documents
from nearest import Memory, tune
from nearest.serve.app import ServeOptions, make_service
from nearest.serve.run import Server

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def roomy_model(positions: int = 512) -> PreTrainedModel:
    """A random model with room for a conversation."""
    config = GPT2Config(
        vocab_size=BYTES_AND_SPECIALS,
        bos_token_id=0,
        eos_token_id=1,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=positions,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            weight.data.mul_(4)
    return model


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def with_gates(
    model: PreTrainedModel, memory: Memory, tokenizer: Any, methods: Sequence[str]
) -> Memory:
    """The memory with briefly trained gates of some methods."""
    tuning = make_documents(5, 20, seed=9)
    with gates_trained_at_once():
        for method in methods:
            tune(model, memory, tuning, method=method, tokenizer=tokenizer)
    return Memory.open(memory.path)


class Running:
    """A server that runs, and a client of it."""

    def __init__(self, server: Server, service: Any, port: int, key: str | None) -> None:
        self.server = server
        self.service = service
        self.url = f"http://127.0.0.1:{port}"
        headers = {b"Authorization": b"Bearer " + key.encode()} if key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=240)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        body = {"model": self.service.model_name, "prompt": prompt, "temperature": 0, **fields}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def serving(
    model: Any, tokenizer: Any, memories: list[Any], port: int | None = None, **options: Any
) -> Iterator[Running]:
    """Serve, until the context ends."""
    chosen = ServeOptions(**{"model_name": "tiny", "grace": 1.0, **options})
    service = make_service(model, tokenizer, memories, chosen)
    port = port or free_port()
    server = Server(service, chosen, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 180
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in time"
        time.sleep(0.01)
    running = Running(server, service, port, chosen.api_key)
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
