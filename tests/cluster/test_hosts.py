# ruff: noqa: F811 - fixtures of another file
"""Several hosts, whose links go down and up again: builds and searches."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents, snapshot
from folders import Build
from hosts import Host, hosts, needs_hosts, running, within  # noqa: F401 - a fixture
from nearest import Memory, evaluate
from nearest.errors import RemoteError
from nearest.remote.servers import Patience

pytestmark = [pytest.mark.long, needs_hosts]
KEY = "a-key-of-tests"
PORT = 8000
HASTY = Patience(connect=1.0, answer=2.0, tries=2, pause=0.01, failures=2, rest=0.05)


def test_parts_of_hosts_that_lose_each_other(
    model_folder: str, hosts: list[Host], tmp_path: Path
) -> None:
    """A part asks nothing of another: the same bytes, whatever becomes of the network."""
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"id": d.id, "text": d.text}) for d in make_documents(60, 200)]
    corpus.write_text("\n".join(rows))
    call = [sys.executable, "-m", "nearest", "build", model_folder, str(corpus), "--json"]
    call += ["--index", "IVF4,SQ8", "--segment-tokens", "3000", "--batch-size", "1", "--no-tune"]
    parts = [tmp_path / "1", tmp_path / "2"]
    with running(
        *(
            host.command(*call, "--out", part, "--part", f"{n}/2")
            for n, (host, part) in enumerate(zip(hosts, parts, strict=True), 1)
        )
    ) as started:
        within(120, lambda: list(parts[1].glob("build/*.claim")))
        hosts[1].link("down")
        time.sleep(1)
        hosts[1].link("up")
        assert [process.wait() for process in started] == [0, 0]
    ends = [[*call, "--out", str(tmp_path / "whole")]]
    ends += [[*call[:3], "join", *map(str, parts), "--out", str(tmp_path / "m"), "--json"]]
    with running(*ends) as started:
        assert [process.wait() for process in started] == [0, 0]
    assert snapshot(tmp_path / "m") == snapshot(tmp_path / "whole")


@pytest.fixture(scope="module")
def memory(
    build_memory: Build, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Memory:
    texts = make_documents(12, 40)
    return build_memory(tiny_model, texts[:6]).add(tiny_model, tiny_tokenizer, texts[6:])


@contextmanager
def served(memory: Memory, hosts: list[Host]) -> Iterator[dict[str, Any]]:
    """What `Memory.open` takes for the shards that the hosts serve, once they do."""
    serve = [sys.executable, "-m", "nearest", "serve", memory.path, "--api-key", KEY]
    with running(
        *(
            host.command(*serve, "--host", host.address, "--shard", f"{n}/{len(hosts)}")
            for n, host in enumerate(hosts, 1)
        )
    ):
        urls = [f"http://{host.address}:{PORT}" for host in hosts]
        given = {"shards": urls, "api_key": KEY, "patience": HASTY}
        Memory.open("test", **given, wait=180.0)
        yield given


def test_a_search_over_hosts_that_are_cut_off(
    memory: Memory,
    hosts: list[Host],
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Right answers, or the error that names the shard; and right ones again, by itself."""
    queries = np.concatenate([segment.keys.rows(segment.searched) for segment in memory.segments])
    expected = memory.search(queries, 5)
    texts = make_documents(3, 30, seed=5)
    methods = ["retomaton", "suffix"]
    own = evaluate(tiny_model, memory, texts, methods, tokenizer=tiny_tokenizer)
    with served(memory, hosts) as given:
        opened = Memory.open("test", **given, wait=0.5)
        right: list[float] = []
        wrong: list[str] = []
        ended = threading.Event()

        def search() -> None:
            while not ended.is_set():
                try:
                    found = opened.search(queries, 5)
                except RemoteError as error:
                    wrong.append(str(error))
                else:
                    np.testing.assert_array_equal(found.ids, expected.ids)
                    np.testing.assert_array_equal(found.distances, expected.distances)
                    right.append(time.monotonic())

        searching = threading.Thread(target=search)
        searching.start()
        within(60, lambda: right)
        hosts[1].link("down")
        within(60, lambda: wrong)
        cut = time.monotonic()
        hosts[1].link("up")
        within(60, lambda: right[-1] > cut)
        ended.set()
        searching.join()
        assert all(f"shard 2/2 ({given['shards'][1]}) does not answer" in told for told in wrong)

        patient = Memory.open("test", **given, wait=120.0)
        hosts[0].link("down")
        back = threading.Timer(4, hosts[0].link, ["up"])
        back.start()
        over = evaluate(tiny_model, patient, texts, methods, tokenizer=tiny_tokenizer)
        back.join()
        assert [one.nll for one in over] == pytest.approx([one.nll for one in own], rel=1e-9)
