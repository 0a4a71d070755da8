"""A memory whose segments four servers hold: what one process finds, and servers that are lost."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from folders import Build
from nearest import Document, Memory, attach, evaluate
from nearest.build.cluster import KMeans, cluster_memory
from nearest.cli.app import open_beside, open_memory
from nearest.errors import FolderError, RemoteError, SettingError
from nearest.remote import servers, shards
from nearest.remote.servers import Patience
from nearest.remote.sharded import ShardedMemory
from nearest.serve.app import ServeOptions
from nearest.serve.run import shard_server
from nearest.serve.shelf import Shelf
from nearest.store.opening import open_snapshot
from nearest.store.shard import Shard
from serving import free_port, roomy_model, with_gates

SHARDS = 4
HASTY = Patience(connect=10.0, answer=300.0, tries=2, pause=0.01, failures=2, rest=0.05)
METHODS = ("knn", "retomaton", "suffix", "hybrid")
TEXTS = make_documents(12, 40)


@contextmanager
def shard_serving(folder: Path, shard: Shard, port: int | None = None) -> Iterator[str]:
    """One shard's server, until the context ends."""
    port = port or free_port()
    shelf = Shelf([Memory(open_snapshot(folder, None, shard))])
    server: uvicorn.Server = shard_server(shelf, ServeOptions(grace=0.1), "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return roomy_model()


@pytest.fixture(scope="module", params=["exact", "IVF4,SQ8", "IVF4,PQ8x4fs"])
def memory(
    model: PreTrainedModel,
    build_memory: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    request: pytest.FixtureRequest,
) -> Memory:
    """Six segments; texts stand in several of them, so that keys are equal, and some are gone."""
    index: str = request.param
    memory = build_memory(model, TEXTS[:4], index=index, recall=1.0)
    for n, some in enumerate((TEXTS[4:7], TEXTS[:3], TEXTS[7:], TEXTS[2:6], TEXTS[:1])):
        again = [Document(f"{n}-{one.id}", one.text) for one in some]
        memory = memory.add(model, tiny_tokenizer, again)
    memory = memory.remove(["doc-1", "3-doc-4"])
    if index == "exact":
        cluster_memory(memory.path, KMeans(20))
        memory = with_gates(model, Memory.open(memory.path), tiny_tokenizer, ["hybrid"])
    return Memory.open(memory.path)


@pytest.fixture(scope="module")
def sharded(memory: Memory) -> Iterator[ShardedMemory]:
    with ExitStack() as stack:
        urls = [
            stack.enter_context(shard_serving(memory.path, Shard(n + 1, SHARDS)))
            for n in range(SHARDS)
        ]
        opened = Memory.open(memory.path, shards=urls[::-1], patience=HASTY, wait=10)
        assert isinstance(opened, ShardedMemory)
        yield opened


@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.integers(1, 6))
def test_shards_hold_every_segment_once_in_order(tokens: list[int], of: int) -> None:
    every = [n for number in range(1, of + 1) for n in Shard(number, of).segments(tokens)]
    assert every == list(range(len(tokens)))


def test_what_is_no_shard_is_refused() -> None:
    assert Shard.parse("2/4") == Shard(2, 4)
    for text in ("0/4", "5/4", "1", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(SettingError, match="is none"):
            Shard.parse(text)


def test_a_thousand_queries_find_what_one_process_finds(
    memory: Memory, sharded: ShardedMemory
) -> None:
    rng = np.random.default_rng(0)
    entries = rng.choice(memory.keyed_entries(), 500)
    near = memory.keys.rows(entries)
    far = rng.normal(scale=2, size=(500, near.shape[1])).astype(np.float32)
    queries = np.concatenate([near, far])
    ties = 0
    for k, distances, rerank in [
        (1, "keys", 0),
        (20, "keys", 0),
        (7, "keys", 200),
        (9, "index", 0),
    ]:
        expected = memory.search(queries, k, distances, rerank)
        found = sharded.search(queries, k, distances, rerank)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.distances, expected.distances)
        ties += int((np.diff(expected.distances, axis=1) == 0).sum())
        np.testing.assert_array_equal(sharded.values(found.ids), memory.values(found.ids))
    assert ties > 1000
    every = sharded.search(queries[:2], memory.entries + 3)
    np.testing.assert_array_equal(every.ids, memory.search(queries[:2], memory.entries + 3).ids)
    one = sharded.search(queries[:1], 20, ordered=False)
    np.testing.assert_array_equal(np.sort(one.ids), np.sort(memory.search(queries[:1], 20).ids))


def test_every_look_up_is_the_memorys(memory: Memory, sharded: ShardedMemory) -> None:
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(7, 32)).astype(np.float32)
    ids = rng.integers(-1, memory.positions, size=(7, 50))
    text = [*memory.document_tokens(2), *memory.document_tokens(5)]
    context = np.array([*text, 0, *rng.integers(60, 120, size=900), *text])
    ends = np.array([3, 5, 7, 100, 800, len(context) - 1, 20])
    assert (sharded.entries, sharded.documents) == (memory.entries, memory.documents)
    assert sharded.manifest == memory.manifest
    calls: list[tuple[str, Any]] = [
        ("key_distances", (queries, ids)),
        ("values", (ids,)),
        ("successors", (ids,)),
        ("log_weights", (ids,)),
        *(("longest_matches", (context, ends, most)) for most in (1, 3, 17, 10_000)),
        ("match_lengths", (ids, context, ends)),
        ("ngrams", (context, ends, 3)),
        ("spans_stand", (context, ends[1:], 4)),
        ("places", (memory.valued_entries()[::3],)),
        ("equal_documents", ([memory.document_tokens(n) for n in (0, 3, 9)] + [context],)),
        ("document_tokens", (5,)),
    ]
    if memory.manifest.keys is not None and "fs" not in memory.manifest.keys.index:
        entries = rng.choice(memory.keyed_entries(), ids.shape)
        calls.append(("index_distances", (queries, entries)))
    for name, arguments in calls:
        told, right = getattr(sharded, name)(*arguments), getattr(memory, name)(*arguments)
        both = zip(told, right, strict=True) if isinstance(right, tuple) else [(told, right)]
        for one, other in both:
            np.testing.assert_array_equal(one, other, err_msg=name)
            assert one.dtype == other.dtype, name
    for number in range(memory.documents):
        assert sharded.document(number).text == memory.document(number).text
        assert sharded.number_of(memory.document(number).id) == number
    assert sharded.number_of("doc-1") is None
    if memory.clusters is not None:
        for field, array in vars(memory.clusters).items():
            np.testing.assert_array_equal(getattr(sharded.clusters, field), array)
    with pytest.raises(SettingError, match="looked up over HTTP"):
        sharded.compact()
    with pytest.raises(SettingError, match=r"is in 4 shards: use the memory's methods"):
        sharded.ask("search", {"queries": queries}, {})


@pytest.mark.slow
def test_texts_are_scored_and_written_as_with_one(
    model: PreTrainedModel,
    memory: Memory,
    sharded: ShardedMemory,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    methods = METHODS if memory.gate("hybrid") else METHODS[:3]
    texts = make_documents(3, 20, seed=5)
    own, over = (
        evaluate(model, one, texts, methods, tokenizer=tiny_tokenizer) for one in (memory, sharded)
    )
    for one, other in zip(own, over, strict=True):
        # Sums of weights may be rounded otherwise where entries of one code come in another order.
        assert other.nll == pytest.approx(one.nll, rel=1e-9)
        assert other.foss == one.foss
    ids = torch.tensor([[0, *tiny_tokenizer("the court shall")["input_ids"]]])
    for method in methods:
        told = []
        for memories in (memory, sharded):
            with attach(model, memories, method) as session:
                out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
                told.append((out.tolist(), session.sources(0)))
        assert told[0] == told[1], method


@pytest.fixture(scope="module")
def two(build_memory: Build, model: PreTrainedModel, tiny_tokenizer: Any) -> Memory:
    memory = build_memory(model, TEXTS[:6])
    return memory.add(model, tiny_tokenizer, TEXTS[6:])


@pytest.mark.slow
def test_a_lost_shard_is_named_and_comes_back(two: Memory) -> None:
    queries = two.keys.rows(np.arange(9))
    expected = two.search(queries, 5)
    port = free_port()
    with shard_serving(two.path, Shard(1, 2)) as first, ExitStack() as stack:
        second = stack.enter_context(shard_serving(two.path, Shard(2, 2), port))
        opened = Memory.open(two.path, shards=[first, second], patience=HASTY, wait=0.3)
        partly = Memory.open(two.path, shards=[first, second], patience=HASTY, partial=True)
        assert isinstance(partly, ShardedMemory)
        stack.close()
        with pytest.raises(RemoteError, match=rf"shard 2/2 \({second}\) does not answer"):
            opened.search(queries, 5)
        with pytest.warns(UserWarning, match="answers are partial.*shard 2/2"):
            found = partly.search(queries, 5)
        half = Memory(open_snapshot(two.path, None, Shard(1, 2)))
        np.testing.assert_array_equal(found.ids, half.search(queries, 5).ids)
        assert len(partly.lost) == 1
        partly.places(found.ids[found.ids >= 0])  # which the other shard alone is asked for
        assert len(partly.lost) == 1
        lost = two.bounds[1] + np.arange(9)
        assert (partly.values(lost) == -1).all()
        partly.key_distances(queries[:1], lost[None])
        starting = threading.Timer(
            0.5, lambda: stack.enter_context(shard_serving(two.path, Shard(2, 2), port))
        )
        waiting = opened
        waiting._shards._wait = 60.0
        starting.start()
        np.testing.assert_array_equal(waiting.search(queries, 5).ids, expected.ids)
        starting.join()
        deadline = time.monotonic() + 30
        while partly.search(queries, 5).ids.tolist() != expected.ids.tolist():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert partly.lost == ()
        np.testing.assert_array_equal(partly.values(lost), two.values(lost))


class _Clock:
    """A clock that sleeping moves, and nothing else."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("back", [10.0, 20.0, 29.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_shard_that_is_waited_for_is_asked_soon_after_it_is_back(
    back: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its server would rest after so many failures."""
    clock = _Clock()
    for module in (servers, shards):
        monkeypatch.setattr(module, "time", clock)
    one = servers.Servers("http://there:1", rng=random.Random(seed))
    up = clock.now + back

    def request(*_: Any, **__: Any) -> httpx.Response:
        if clock.now < up:
            raise httpx.ConnectError("[Errno 111] Connection refused")
        return httpx.Response(200)

    monkeypatch.setattr(one._client, "request", request)
    shards._waited("shard 1/1", lambda: one.get("/", {}), one.wake, clock.now + 30)
    assert up <= clock.now < up + 1.5
    up = clock.now + 10_000
    for _ in range(30):  # an outage after which its server would rest for a minute
        with pytest.raises(RemoteError, match=r"does not answer.*Connection refused"):
            shards._waited("shard 1/1", lambda: one.get("/", {}), one.wake, clock.now + 30)
    up = clock.now + 5
    shards._waited("shard 1/1", lambda: one.get("/", {}), one.wake, clock.now + 30)
    assert clock.now < up + 1.5


def test_servers_that_make_no_whole_are_refused(two: Memory) -> None:
    with (
        shard_serving(two.path, Shard(1, 2)) as first,
        shard_serving(two.path, Shard(1, 3)) as other,
        shard_serving(two.path, Shard(2, 2)) as second,
    ):
        for urls in ([first], [first, first], [first, other], [first, second, other]):
            with pytest.raises(SettingError, match="not all shards"):
                Memory.open(two.path, shards=urls, patience=HASTY)
        with pytest.raises(SettingError, match="shard 1/2 of test alone"):
            open_memory(Path(first) / "test")
        address = f"{first},{second.removeprefix('http://')}/test"
        assert isinstance(open_memory(Path(address)), ShardedMemory)
        for path, shards in ((two.path, [first, second]), (Path(address), None)):
            with pytest.raises(SettingError, match=r"on 'gpu'.*start them with `nearest serve"):
                Memory.open(path, "gpu", shards=shards) if shards else open_memory(path, "gpu")
        assert isinstance(open_beside(Path(address), "gpu"), ShardedMemory)
        with pytest.raises(FolderError, match="no memory 'other'"):
            Memory.open("other", shards=[first, second], patience=HASTY)
    with pytest.raises(TypeError, match="of shards or addresses"):
        Memory.open(two.path, wait=3)
    with pytest.raises(SettingError, match="list of addresses"):
        Memory.open(two.path, shards=[])
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RemoteError, match="does not answer"):
            Memory.open(two.path, shards=[url], patience=HASTY, wait=0.2)


def test_snapshots_are_not_mixed(
    build_memory: Build, model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    memory = build_memory(model, TEXTS[:6]).add(model, tiny_tokenizer, TEXTS[6:9])
    with (
        shard_serving(memory.path, Shard(1, 2)) as first,
        shard_serving(memory.path, Shard(2, 2)) as second,
    ):
        opened = Memory.open(memory.path, shards=[first, second], patience=HASTY)
        assert opened.refresh() is opened
        after = memory.add(model, tiny_tokenizer, TEXTS[9:]).remove(["doc-0"])
        with pytest.raises(FolderError, match="has changed"):
            opened.search(np.ones((1, 32), np.float32), 2)
        fresh = opened.refresh()
        queries = after.keys.rows(after.keyed_entries()[::7])
        for one, other in zip(fresh.search(queries, 6), after.search(queries, 6), strict=True):
            np.testing.assert_array_equal(one, other)
        compacted = after.compact()
        fresh = fresh.refresh()  # of one segment one shard has all
        np.testing.assert_array_equal(
            fresh.search(queries, 6).ids, compacted.search(queries, 6).ids
        )


def test_a_shard_needs_its_own_files_alone(two: Memory, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "half.memory"
    shutil.copytree(two.path, folder)
    shutil.rmtree(folder / "segments" / two.manifest.segments[0].name)
    half = Memory(open_snapshot(folder, None, Shard(2, 2)))
    assert half.search(np.ones((1, 32), np.float32), 3).ids.min() >= two.bounds[1]
    with pytest.raises(FolderError, match="missing"):
        Memory.open(folder)
