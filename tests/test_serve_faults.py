"""What goes wrong within a server: who asked is told so, and nobody else suffers."""

import asyncio
import base64
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from nearest import Memory, RemoteMemory
from nearest.errors import RemoteError, SettingError
from nearest.remote.servers import Patience
from nearest.remote.wire import npy
from nearest.retrieval import passages
from nearest.retrieval.passages import Passages
from nearest.retro.data.live import MemoryNeighbours
from nearest.serve import engine as engine_module
from nearest.serve import sampling
from nearest.serve.drafts import Drafts
from nearest.serve.engine import Engine, Limits
from nearest.serve.guards import SlowClients
from nearest.serve.passes import PlainBatch
from nearest.serve.provenance import Provenance
from nearest.serve.run import check_exposure
from retro_data import database, documents, embedder, words
from serving import CHAT_TEMPLATE, Running, roomy_model, serving

HASTY = Patience(connect=0.5, answer=2.0, tries=1, failures=1000)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return roomy_model()


@pytest.fixture(scope="module")
def memory(build_memory: Callable[..., Memory], model: PreTrainedModel) -> Memory:
    return build_memory(model, make_documents(12, 30))


@pytest.fixture(scope="module")
def server(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Running]:
    with serving(model, tiny_tokenizer, [memory], chat_template=CHAT_TEMPLATE) as running:
        yield running


def test_a_memory_whose_server_is_gone_gives_503_on_every_route(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    queries = npy(np.ones((1, 32), np.float32))
    with serving(model, tiny_tokenizer, [Memory.open(memory.path)]) as back:
        remote = RemoteMemory(back.url, patience=HASTY)
        with serving(model, tiny_tokenizer, [remote]) as front:
            refused = front.client.post("/query", content=queries)
            assert refused.status_code == 400
            assert "held by another server" in refused.json()["error"]["message"]
            back.server.should_exit = True
            while back.server.started and back.service.engine.alive:
                time.sleep(0.01)
            told = [
                front.post("/search/text", {"text": "the court"}),
                front.client.post("/search/tokens/npy", content=queries),
                front.client.get("/v1/nearest/documents/test"),
                front.client.get("/v1/nearest/documents/test", params={"id": "doc-1"}),
                front.client.get("/search/memory/document", params={"number": 1}),
            ]
            for answer in told:
                assert answer.status_code == 503, answer.text
                assert "no server answers" in answer.json()["error"]["message"]


@pytest.mark.parametrize("error", [RemoteError("it is gone"), SettingError("it makes no sense")])
def test_sources_that_cannot_be_told_are_an_error_of_the_request(
    server: Running, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    status = 503 if isinstance(error, RemoteError) else 400

    def failing(_: Provenance, __: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(Provenance, "token", failing)
    body = {"model": "tiny", "prompt": "the court", "max_tokens": 40, "temperature": 0}
    answer = server.post("/v1/completions", {**body, "nearest": {}})
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, str(error))
    answer = server.post("/v1/completions", {**body, "nearest": {}, "stream": True})
    assert answer.status_code == status  # nothing was sent before
    message = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 40}
    chat = server.post("/v1/chat/completions", {**message, "stream": True})
    lines = [line for line in chat.text.splitlines() if line]
    assert json.loads(lines[-2][6:])["error"]["message"] == str(error)
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30, 1e-4])
def test_the_coldest_temperatures_choose_the_likeliest(temperature: float, top_p: float) -> None:
    log_probs = torch.tensor([2.0, 5.0, 1.0, float("-inf"), 4.9]).log_softmax(-1)
    assert sampling.choose(log_probs, temperature, top_p, np.random.default_rng(0)) == 1


@pytest.mark.parametrize("at", ["find", "saw"])
def test_drafts_that_fail_do_not_end_the_server(
    at: str,
    model: PreTrainedModel,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("of drafts")

    asked = {"model": "tiny", "prompt": "the court", "max_tokens": 4, "temperature": 0}
    with serving(model, tiny_tokenizer, [memory], draft=True) as running:
        with monkeypatch.context() as patch:
            patch.setattr(Drafts, at, broken)
            failed = running.post("/v1/completions", asked)
            assert failed.status_code == 500
        assert running.complete("the court", max_tokens=4)["choices"][0]["text"]


@pytest.mark.parametrize("at", ["choose", "add"])
def test_a_row_that_fails_is_given_up_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """With the others of its method, in one step: they get what they would get alone."""
    alone = server.complete("the court", max_tokens=200, seed=1)["choices"][0]["text"]
    begun = threading.Event()

    def failing(real: Callable[..., Any], temperature: Callable[..., float]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if temperature(*given) == 2 and begun.is_set():
                raise IndexError("of this row alone")
            return real(*given)

        return call

    if at == "choose":
        fails = failing(sampling.choose, lambda _, temperature, *__: temperature)
        monkeypatch.setattr(sampling, "choose", fails)
    else:
        fails = failing(engine_module.Row.add, lambda row, _: row.work.wanted.temperature)
        monkeypatch.setattr(engine_module.Row, "add", fails)
    with ThreadPoolExecutor(2) as clients:
        other = clients.submit(server.complete, "the court", max_tokens=200, seed=1)
        _until(lambda: server.service.engine._rows > 0 or other.done())
        body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "temperature": 2, "n": 4}
        with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as one:
            lines = one.iter_lines()
            next(lines)
            begun.set()
            rest = [line for line in lines if line]
        assert "the server failed" in json.loads(rest[-2][6:])["error"]["message"]
        assert other.result()["choices"][0]["text"] == alone
    assert server.post("/v1/completions", body).status_code == 500


def test_a_prompt_that_cannot_begin_is_given_up_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_prompt(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "Prompt", no_prompt)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        assert server.post("/v1/completions", body).status_code == 500
    with monkeypatch.context() as patch:
        patch.setattr(engine_module._Running, "keep", no_prompt)
        assert server.post("/v1/completions", {**body, "max_tokens": 9}).status_code == 500
    server.complete("x", max_tokens=3)


def test_rows_whose_states_may_be_torn_are_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one that joins them finds no room, and some layers are moved already."""

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    body = {"model": "tiny", "prompt": "the court", "temperature": 0}
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as clients:
        patch.setattr(PlainBatch, "join", no_room)
        long = {**body, "max_tokens": 480, "n": 8}
        running = clients.submit(server.post, "/v1/completions", long)
        _until(lambda: server.service.engine._rows > 0)
        assert server.post("/v1/completions", {**body, "max_tokens": 2}).status_code == 500
        assert running.result().status_code == 500
    server.complete("the court", max_tokens=2)


@pytest.mark.parametrize("lost", [False, True])
def test_an_engine_that_ends_ends_the_server(
    model: PreTrainedModel,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    lost: bool,
) -> None:
    """By a fault of its own, or of a device that fails at every later call, too."""

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with serving(model, tiny_tokenizer, [memory]) as running:
        if lost:
            monkeypatch.setattr(engine_module, "_check", broken)
        monkeypatch.setattr(*(PlainBatch, "read") if lost else (Engine, "_drop_ended"), broken)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        assert running.post("/v1/completions", body).status_code == (500 if lost else 503)
        deadline = time.monotonic() + 20
        while not running.server.failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert running.server.failed  # the command says so by its status


def test_searches_hold_up_nobody(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that is slow to open its newest version is no reason to answer nobody else."""
    entered, go_on = threading.Event(), threading.Event()
    real = type(server.service.library).chosen

    def slow(self: Any, name: str | None) -> Any:
        entered.set()
        assert go_on.wait(20)
        return real(self, name)

    monkeypatch.setattr(type(server.service.library), "chosen", slow)
    with ThreadPoolExecutor(1) as clients:
        search = clients.submit(server.post, "/search/text", {"text": "the court"})
        assert entered.wait(20)
        try:
            assert server.client.get("/health", timeout=5).text == "ok"
        finally:
            go_on.set()
        assert search.result().status_code == 200


def test_documents_that_are_being_cut_hold_up_nobody_else(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(*given: Any) -> Passages:
        entered.set()
        assert go_on.wait(60)
        return Passages(*given)

    monkeypatch.setattr(passages, "Passages", slow)
    body = {"model": "tiny@in-context", "prompt": "the court", "max_tokens": 1}
    of_size = {"settings": {"passage_tokens": 24}, "sources": False}
    with ThreadPoolExecutor(45) as clients:  # more than there are threads
        asked = [
            clients.submit(server.post, "/v1/completions", {**body, "nearest": of_size})
            for _ in range(45)
        ]
        try:
            assert entered.wait(60)
            _until(lambda: all(one.running() for one in asked))
            assert server.post("/tokenize", {"prompt": "x"}, timeout=20).status_code == 200
            other = {**body, "model": "tiny@base"}
            assert server.post("/v1/completions", other, timeout=20).status_code == 200
        finally:
            go_on.set()
        assert {one.result().status_code for one in asked} == {200}


def test_a_memory_whose_folder_is_away_hurts_no_other(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    away = shutil.copytree(memory.path, tmp_path / "away.memory")
    with serving(model, tiny_tokenizer, [Memory.open(away), memory]) as running:
        away.rename(tmp_path / "elsewhere")
        gone = running.client.get("/v1/nearest/documents/away")
        assert (gone.status_code, gone.headers["Retry-After"]) == (503, "1")
        assert "away.memory cannot be read" in gone.json()["error"]["message"]
        assert running.client.get("/v1/nearest/documents/test").status_code == 200
        metrics = running.client.get("/metrics")
        assert metrics.status_code == 200
        assert 'memory="test"' in metrics.text


def test_only_of_a_client_that_stops_reading_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def on_disk(*_: Any) -> None:
        raise TimeoutError("of a disk in the network")

    async def answering(_: Any, __: Any, send: Any) -> None:
        await send({})

    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    scope, seconds = {"type": "http"}, 0.01
    for application, said in ((on_disk, False), (answering, True)):
        with pytest.raises(TimeoutError):
            asyncio.run(SlowClients(application, seconds)(scope, on_disk, never))
        assert ("stopped reading" in caplog.text) == said


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_queue_that_is_full_says_try_again_and_one_too_short_does_not(
    model: PreTrainedModel,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = {"model": "tiny", "max_tokens": 1}
    with serving(model, tiny_tokenizer, [memory], limits=Limits(running=1, waiting=2)) as running:
        never = running.post("/v1/completions", {**body, "prompt": ["a", "b", "c"]})
        assert never.status_code == 400
        assert never.json()["error"]["param"] == "prompt"
        running.complete(["a", "b"], max_tokens=2)
        engine, go_on = running.service.engine, threading.Event()
        real = engine._advance

        def held(rows: Any) -> None:
            assert go_on.wait(60)
            real(rows)

        monkeypatch.setattr(engine, "_advance", held)
        long = {**body, "prompt": "x", "max_tokens": 30}
        with ThreadPoolExecutor(3) as clients:
            asked = [clients.submit(running.post, "/v1/completions", long)]
            try:
                _until(lambda: engine._rows > 0)
                short = {**body, "prompt": "a"}
                asked += [clients.submit(running.post, "/v1/completions", short) for _ in "ab"]
                _until(lambda: len(engine._waiting) == 2)
                full = running.post("/v1/completions", {**body, "prompt": "a"})
                assert running.client.get("/ready").status_code == 503
            finally:
                go_on.set()
            assert [one.result().status_code for one in asked] == [200] * 3
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["Retry-After"]) >= 1
        assert running.post("/v1/completions", {**body, "prompt": "a"}).status_code == 200


def test_chunks_of_documents_that_were_removed_are_not_handed_out(
    model: PreTrainedModel,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("chunks") / "chunks.memory"
    chunks = MemoryNeighbours(database(folder, documents(6)), embedder(), words)
    asked = np.array([[3, 4, 5, 6]])
    body = {"queries": base64.b64encode(npy(asked)).decode(), "k": 64}
    with serving(model, tiny_tokenizer, [memory], chunks=chunks) as running:
        before = running.post("/search/chunks", body).json()
        assert "doc-2" in before["documents"][0]
        writer = Memory.open(folder)
        writer.remove(["doc-2"])
        after = running.post("/search/chunks", body).json()
        assert after["version"] != before["version"]
        assert "doc-2" not in after["documents"][0]
        expected = MemoryNeighbours(Memory.open(folder), embedder(), words)
        found = expected.look_up(asked, None, 64)
        told = np.load(io.BytesIO(base64.b64decode(after["tokens"])))
        np.testing.assert_array_equal(told, found.tokens)
        assert running.post("/search/chunks", body).json()["version"] == expected.digest


def test_a_body_that_comes_too_slowly_is_refused(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with serving(model, tiny_tokenizer, [memory], slow_client=0.3) as running:
        port = int(running.url.rsplit(":", 1)[1])
        head = f"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
            slow.sendall(head.encode() + b"{")
            told = b""
            while part := slow.recv(4096):  # until the server closes the connection
                told += part
        assert told.startswith(b"HTTP/1.1 408 ")
        assert b"did not come within 0.3 s" in told
        # What takes long once its body is there is not meant.
        running.complete("x", max_tokens=400)


def test_one_key_for_reading_and_writing_is_refused() -> None:
    with pytest.raises(SettingError, match="the write key is the API key"):
        check_exposure("127.0.0.1", "the-same-key", "the-same-key")
