"""Whatever a client sends gets an answer that is no fault of the server's."""

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from transformers import PreTrainedTokenizerFast

from conftest import make_documents
from nearest import Memory
from nearest.retro.data.live import MemoryNeighbours
from retro_data import database, documents, embedder, words
from serving import CHAT_TEMPLATE, Running, roomy_model, serving

WRITE_KEY = "a-key-to-write"
# Of each operation, as far as there are different ones; 5,000 in all: NEAREST_FUZZ_CASES=500
CASES = int(os.environ.get("NEAREST_FUZZ_CASES", "25"))


@pytest.fixture(scope="module")
def server(
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    model = roomy_model()
    memory = build_memory(model, make_documents(12, 30))
    folder = tmp_path_factory.mktemp("chunks") / "chunks"
    with serving(
        model,
        tiny_tokenizer,
        [memory],
        chat_template=CHAT_TEMPLATE,
        timeout=20,
        write_key=WRITE_KEY,
        chunks=MemoryNeighbours(database(folder, documents(20)), embedder(), words),
    ) as running:
        yield running


@pytest.mark.slow
def test_generated_requests_get_no_server_error(
    server: Running, record_property: Callable[[str, Any], None]
) -> None:
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    schema.config.update(base_url=server.url)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 21
    seen: Counter[int] = Counter()

    def tried(operation: Any) -> None:
        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(headers={"Authorization": f"Bearer {WRITE_KEY}"})
            seen[response.status_code] += 1
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        check()

    for operation in operations:
        tried(operation)
    record_property("answers", dict(seen))
    sys.stderr.write(f"{seen.total()} cases: {dict(seen)}\n")
    assert seen[200] > len(operations)
    assert seen[400] > len(operations)
    assert server.service.engine.alive


BROKEN = [
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    b"\x16\x03\x01\x02\x00\x01",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
]


@pytest.mark.slow
@pytest.mark.parametrize("sent", BROKEN)
def test_broken_connections_harm_nobody(server: Running, sent: bytes) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        connection.settimeout(2)
        try:
            answer = connection.recv(100)
        except (TimeoutError, ConnectionError):
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")
    server.complete("x", max_tokens=1)


@pytest.mark.slow
def test_a_client_that_stops_reading_is_disconnected(
    build_memory: Callable[..., Memory], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = roomy_model()
    memory = build_memory(model, make_documents(4, 10))
    with serving(model, tiny_tokenizer, [memory], slow_client=1.0) as running:
        port = int(running.url.rsplit(":", 1)[1])
        body = (
            b'{"model": "tiny", "prompt": "x", "n": 32, "max_tokens": 400, "stream": true,'
            b' "nearest": {"alternatives": 20}, "temperature": 2}'
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", port))
            slow.sendall(head.encode() + body)
            deadline = time.monotonic() + 60
            running.complete("x", max_tokens=3)  # nobody else waits for it
            while running.service.engine.busy:
                assert time.monotonic() < deadline, "the work goes on for a client that left"
                time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much is used")
def test_memory_stays_flat_under_abuse(server: Running) -> None:
    """Huge prompts, bodies cut short, wrong types: a leak would grow with every four rounds."""
    port = int(server.url.rsplit(":", 1)[1])
    huge = json.dumps({"model": "tiny", "prompt": "x" * 1_000_000}).encode()
    many = json.dumps({"model": "tiny", "prompt": [[1] * 500] * 12, "max_tokens": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7000000\r\n\r\n"
    kind = {"Content-Type": "application/json"}

    def round_of_abuse() -> None:
        for body in (huge, many, b"[" * 1_000_000, b'{"model": {"a": [1, {}]}}'):
            answer = server.client.post("/v1/completions", content=body, headers=kind)
            assert answer.status_code in (200, 400, 429), answer.text
            assert answer.status_code == 200 or answer.json()["error"]["message"]
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as cut:
                cut.sendall(head + b"{" * 100_000)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    # What an allocator keeps comes at once and never again, at a round that luck decides.
    grown = []
    while not grown or grown[-1] >= 4 << 20:
        assert len(grown) < 8, f"bytes more after each four rounds: {grown}"
        before = resident()
        for _ in range(4):
            round_of_abuse()
        server.complete("x", max_tokens=1)
        grown.append(resident() - before)
