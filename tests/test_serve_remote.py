"""A memory, and RETRO's neighbours, over HTTP: the same answers, and servers that go and come."""

import http.server
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from nearest import Memory, RemoteMemory, RemoteNeighbours, attach, evaluate
from nearest.build.cluster import KMeans, cluster_memory
from nearest.errors import FolderError, RemoteError, SettingError
from nearest.remote import calls
from nearest.remote.servers import Patience, Servers
from nearest.remote.wire import npy
from nearest.retro.data.live import MemoryNeighbours
from nearest.store.snapshot import Snapshot
from retro_data import M, database, documents, embedder, words
from serving import Running, free_port, roomy_model, serving, with_gates

HASTY = Patience(connect=1.0, answer=20.0, tries=4, pause=0.01, failures=2, rest=0.2)
GATED = ("hybrid", "knn+adaptret")
METHODS = ("knn", "retomaton", "suffix", *GATED)
DOCUMENTS = make_documents(12, 30)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return roomy_model()


@pytest.fixture(scope="module")
def memory(
    model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Memory:
    built = build_memory(model, DOCUMENTS)
    cluster_memory(built.path, KMeans(20))
    return with_gates(model, Memory.open(built.path), tiny_tokenizer, GATED)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> MemoryNeighbours:
    folder = tmp_path_factory.mktemp("chunks") / "chunks"
    return MemoryNeighbours(database(folder, documents(20)), embedder(), words)


@pytest.fixture(scope="module")
def server(
    model: PreTrainedModel,
    memory: Memory,
    chunks: MemoryNeighbours,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Running]:
    with serving(model, tiny_tokenizer, [memory], chunks=chunks) as running:
        yield running


@pytest.fixture(scope="module")
def remote(server: Running) -> RemoteMemory:
    return RemoteMemory(server.url, patience=HASTY)


def test_every_look_up_is_the_memorys(memory: Memory, remote: RemoteMemory) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(7, 32)).astype(np.float32)
    ids = rng.integers(-1, memory.positions, size=(7, 5))
    text = [*memory.document_tokens(2), *memory.document_tokens(5)]
    context = np.array([*text, 0, *rng.integers(60, 120, size=9000), *text])
    ends = np.array([3, 5, 7, 100, 8000, 9100, 20])
    assert memory.longest_matches(context, ends, 1).lengths[:3].min() > 2
    assert (remote.entries, remote.documents) == (memory.entries, memory.documents)
    assert remote.manifest == memory.manifest
    for distances in ("keys", "index"):
        for ordered in (True, False):
            found = remote.search(queries, 9, distances, ordered=ordered)
            expected = memory.search(queries, 9, distances, ordered=ordered)
            np.testing.assert_array_equal(np.sort(found.ids), np.sort(expected.ids))
            np.testing.assert_array_equal(np.sort(found.distances), np.sort(expected.distances))
            np.testing.assert_array_equal(remote.values(found.ids), memory.values(found.ids))
    for name, arguments in {
        "key_distances": (queries, ids),
        "index_distances": (queries, ids),
        "values": (ids,),
        "successors": (ids,),
        "log_weights": (ids,),
        "longest_matches": (context, ends, 6),
        "match_lengths": (ids, context, ends),
        "ngrams": (context, ends, 3),
        "spans_stand": (context, ends[1:], 4),
        "places": (np.abs(ids[0]),),
        "equal_documents": ([memory.document_tokens(3), context],),
        "first_entries": ([memory.document_tokens(3), context],),
        "document_tokens": (5,),
    }.items():
        told, right = getattr(remote, name)(*arguments), getattr(memory, name)(*arguments)
        both = zip(told, right, strict=True) if isinstance(right, tuple) else [(told, right)]
        for one, other in both:
            np.testing.assert_array_equal(one, other, err_msg=name)
            assert one.dtype == other.dtype, name
    assert remote.document(4).text == memory.document(4).text
    assert remote.document(4).metadata == memory.document(4).metadata
    assert remote.number_of("doc-7") == 7
    assert remote.number_of("none") is None


@pytest.mark.slow
def test_a_whole_text_is_scored_as_with_the_folder(
    model: PreTrainedModel,
    memory: Memory,
    remote: RemoteMemory,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = make_documents(3, 20, seed=5)
    own = evaluate(model, memory, texts, METHODS, tokenizer=tiny_tokenizer)
    over = evaluate(model, remote, texts, METHODS, tokenizer=tiny_tokenizer)
    for one, other in zip(own, over, strict=True):
        assert other.nll == pytest.approx(one.nll, abs=1e-6)
        assert other.foss == one.foss


@pytest.mark.parametrize("method", METHODS)
def test_it_is_attached_as_the_folder_is(
    model: PreTrainedModel,
    memory: Memory,
    remote: RemoteMemory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    method: str,
) -> None:
    ids = torch.tensor([[0, *tiny_tokenizer("the court shall")["input_ids"]]])
    told = []
    for one in (memory, remote):
        with attach(model, one, method) as session:
            out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
            told.append((out.tolist(), session.sources(0)))
    assert told[0] == told[1]


def test_what_needs_the_folder_is_refused(remote: RemoteMemory) -> None:
    for call in (remote.compact, remote.info, lambda: remote.keys, lambda: remote.segments):
        with pytest.raises(SettingError, match="looked up over HTTP"):
            call()


def test_wrong_questions_are_refused(server: Running, remote: RemoteMemory) -> None:
    with pytest.raises(FolderError, match="no memory 'other'"):
        RemoteMemory(server.url, "other", patience=HASTY)
    with pytest.raises(SettingError, match="ids must lie in"):
        remote.successors(np.array([10**9]))
    with pytest.raises(SettingError, match="32"):
        remote.search(np.zeros((1, 3), np.float32), 2)
    for call, body in [
        ("search", b""),
        ("search", b"x"),
        ("values", npy(np.zeros(3))),
        ("no", b""),
    ]:
        answer = server.client.post(f"/search/memory/{call}", content=body)
        assert answer.status_code in (400, 404), answer.text


@pytest.mark.parametrize(("call", "rows"), [("ngrams", 10_000), ("ngram_samples", 100)])
def test_a_small_question_with_a_large_answer_is_refused(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, call: str, rows: int
) -> None:
    given = {"context": np.array([0, 70]), "ends": np.ones(rows, np.int64)}
    monkeypatch.delattr(Snapshot, call)  # so that it is never called
    with pytest.raises(SettingError, match="too much at once"):
        calls.answered(memory, call, given, calls.Options(1, length=512))


@contextmanager
def two_servers(
    model: PreTrainedModel, memory: Memory, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], list[ExitStack], Callable[[int], None]]]:
    """Ports, what ends each server, and what starts it (again)."""
    ports, running = [free_port(), free_port()], [ExitStack(), ExitStack()]

    def start(number: int) -> None:
        running[number].enter_context(
            serving(model, tokenizer, [Memory.open(memory.path)], ports[number])
        )

    with ExitStack() as all_of_them:
        for number, stack in enumerate(running):
            all_of_them.callback(stack.close)
            start(number)
        yield ports, running, start


@pytest.mark.slow
def test_servers_that_go_and_come(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """One goes: the other answers. Both go: it is said, soon. They come: it goes on by itself."""
    queries = np.ones((2, 32), np.float32)
    expected = memory.search(queries, 4).ids
    with two_servers(model, memory, tiny_tokenizer) as (ports, running, start):
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        remote = RemoteMemory(urls, patience=HASTY)
        # A server of answers, whose memory is at the others.
        with serving(model, tiny_tokenizer, [remote]) as front:
            asked = {"max_tokens": 4, "model": "tiny@knn", "nearest": {}}
            said = front.complete("the court", **asked)["choices"][0]
            running[0].close()
            for _ in range(5):
                np.testing.assert_array_equal(remote.search(queries, 4).ids, expected)
            assert front.complete("the court", **asked)["choices"][0] == said
            running[1].close()
            began = time.monotonic()
            with pytest.raises(RemoteError, match="no server answers"):
                remote.search(queries, 4)
            refused = front.post("/v1/completions", {"prompt": "the court", **asked})
            assert refused.status_code == 503
            assert "no server answers" in refused.json()["error"]["message"]
            assert time.monotonic() - began < 10
            start(0)
            deadline = time.monotonic() + 30
            while True:
                try:
                    found = remote.search(queries, 4)
                    break
                except RemoteError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            np.testing.assert_array_equal(found.ids, expected)
            assert front.complete("the court", **asked)["choices"][0] == said


def test_answers_of_two_versions_are_not_mixed(
    model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    memory = build_memory(model, DOCUMENTS)
    with serving(model, tiny_tokenizer, [memory]) as running:
        remote = RemoteMemory(running.url, patience=HASTY)
        assert remote.refresh() is remote
        memory.remove(["doc-3"])
        with pytest.raises(FolderError, match="has changed"):
            remote.search(np.ones((1, 32), np.float32), 2)
        fresh = remote.refresh()
        assert fresh.documents == 11
        assert len(fresh.search(np.ones((1, 32), np.float32), 2).ids) == 1


class _Flaky(http.server.BaseHTTPRequestHandler):
    """Answers as its server's script says; None closes the connection without a word."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked += 1
        status = server.script.pop(0) if server.script else 200
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("Retry-After", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def flaky(*script: int | None) -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Flaky) as server:
        stub: Any = server
        stub.script, stub.asked = list(script), 0
        stub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield stub
        server.shutdown()


@pytest.mark.slow
def test_a_request_is_sent_again_and_a_failing_server_rests() -> None:
    patience = Patience(tries=3, pause=0.001, failures=3, rest=0.1)
    with flaky(503, None, 200) as one:
        assert Servers(one.url, patience=patience, rng=random.Random(0)).get("/", {}).is_success
        assert one.asked == 3
    with flaky(429, 200) as busy:
        assert Servers(busy.url, patience=patience).get("/", {}).is_success
        assert busy.asked == 2
    with flaky(*[500] * 4) as dead:
        servers = Servers(dead.url, patience=patience, rng=random.Random(0))
        for _ in range(5):
            with pytest.raises(RemoteError):
                servers.get("/", {})
        assert dead.asked == 3  # the breaker is open: it is not asked any more
        time.sleep(0.2)
        with pytest.raises(RemoteError):
            servers.get("/", {})
        assert dead.asked == 4  # one trial
        time.sleep(0.4)
        assert servers.get("/", {}).is_success  # and it is back
    with flaky(400) as strict, flaky() as other, pytest.raises(SettingError):
        Servers([strict.url, other.url], patience=patience).get("/", {})


def test_a_server_that_says_nothing_is_left() -> None:
    with flaky() as well, http.server.HTTPServer(("127.0.0.1", 0), _Flaky) as silent:
        # It accepts connections, and nobody serves them.
        patience = Patience(answer=0.2, tries=2, pause=0)
        urls = [f"http://127.0.0.1:{silent.server_port}", well.url]
        assert Servers(urls, patience=patience).get("/", {}).is_success


def test_neighbours_are_those_of_the_database(server: Running, chunks: MemoryNeighbours) -> None:
    asked = torch.tensor([[3, 4, 5, 6], [7, 8, -1, -1], [9, 9, 9, 9]])
    over = RemoteNeighbours(server.url, patience=HASTY)
    np.testing.assert_array_equal(over(asked), chunks(asked))
    assert over.sources == chunks.sources
    more = RemoteNeighbours(server.url, neighbours=3, continuation=2)(asked)
    assert more.shape == (3, 3, M * 3)
    with pytest.raises(SettingError, match=f"chunks of {M}"):
        over(torch.zeros(1, M + 1, dtype=torch.int64))


def test_chunks_by_vectors_and_as_json(server: Running, chunks: MemoryNeighbours) -> None:
    import base64
    import io

    tokens = np.array([[3, 4, 5, 6], [7, 8, 9, 1]])
    vectors = embedder()([words(row.tolist()) for row in tokens])
    told = []
    for queries in (tokens, vectors.astype(np.float32)):
        body = {"queries": base64.b64encode(npy(queries)).decode(), "k": 2}
        answer = server.post("/search/chunks", body).json()
        assert answer["version"] == chunks.digest
        told.append(
            [
                np.load(io.BytesIO(base64.b64decode(answer[name])))
                for name in ("ids", "distances", "tokens")
            ]
        )
    for one, other in zip(*told, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    wrong = base64.b64encode(npy(np.zeros((1, 3), np.complex64))).decode()
    assert server.post("/search/chunks", {"queries": wrong}).status_code == 400


def test_the_command_line_takes_an_address(server: Running, tmp_path: Path) -> None:
    from nearest.cli.app import open_memory

    opened = open_memory(Path(server.url) / "test")
    assert isinstance(opened, RemoteMemory)
    assert opened.documents == 12
