# ruff: noqa: F811 - fixtures of another file
"""Builds whose workers a Ray cluster runs, and shards that it holds, whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import random_documents, snapshot
from hosts import Host, hosts, needs_hosts, within  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is missing: the extra [ray]"),
]
COMMAND = (sys.executable, "-m", "nearest", "build")
OPTIONS = ("--index", "IVF4,SQ8", "--batch-size", "1", "--segment-tokens", "600", "--no-tune")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        json.dumps({"id": f"{n}-{one.id}", "text": one.text})
        for n in range(40)
        for one in random_documents()
    ]
    path.write_text("\n".join(rows))
    return path


def begun(*words: str | Path) -> "subprocess.Popen[bytes]":
    """A build with one thread a process; Ray's files go where their names stay short."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": "/tmp"}
    environment["RAY_worker_niceness"] = "0"  # as patient as other tests, and no more
    return subprocess.Popen(
        [*COMMAND, *map(str, words), *OPTIONS],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(build: "subprocess.Popen[bytes]") -> bytes:
    """What it printed."""
    told, said = build.communicate(timeout=600)
    assert build.returncode == 0, said.decode()
    return told


def worker(out: Path, build: "subprocess.Popen[bytes]") -> int:
    """The process of a worker that has claimed something."""
    until = time.monotonic() + 300
    while time.monotonic() < until and build.poll() is None:
        for claim in out.glob("build/*.keys.claim"):
            try:
                return int(claim.read_text().split("-")[-2])
            except (OSError, IndexError):  # given up, or not written yet
                continue
        time.sleep(0.01)
    raise AssertionError(f"no worker has claimed anything; the build ended: {build.poll()}")


@pytest.fixture(scope="module")
def whole(model_folder: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("whole") / "m"
    ended(begun(model_folder, corpus, "--out", path))
    return path


def test_the_same_bytes_and_after_a_worker_is_killed(
    model_folder: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    build = begun(model_folder, corpus, "--out", path, "--ray", "local", "--workers", "2")
    os.kill(worker(path, build), signal.SIGKILL)
    ended(build)
    assert snapshot(path) == snapshot(whole)


def test_a_build_goes_on_when_its_driver_was_killed(
    model_folder: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    build = begun(model_folder, corpus, "--out", path, "--ray", "local")
    worker(path, build)
    build.kill()
    build.communicate()
    assert not (path / "manifest.json").exists()
    ended(begun(model_folder, corpus, "--out", path, "--ray", "local", "--workers", "1"))
    assert snapshot(path) == snapshot(whole)


SHARDED = """
import sys
import numpy as np
from nearest import Document, Memory, evaluate
from nearest.encode.loading import load_model_and_tokenizer

path, folder = sys.argv[1:]
memory = Memory.open(path)
sharded = Memory.open(path, shards="ray://local", actors=2, wait=120)
queries = memory.keys.rows(memory.keyed_entries()[::97])

def as_one() -> None:
    found, expected = sharded.search(queries, 9), memory.search(queries, 9)
    assert (np.diff(expected.distances, axis=1) == 0).any()
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(sharded.values(found.ids), memory.values(expected.ids))

as_one()
model, tokenizer = load_model_and_tokenizer(folder)
texts = [Document("new", memory.document(0).text[:40])]
(own,), (over,) = (
    evaluate(model, one, texts, ["knn"], tokenizer=tokenizer) for one in (memory, sharded)
)
assert abs(over.nll - own.nll) <= 1e-9 * own.nll
import ray  # late: nearest says how

for shard in sharded._shards.held:  # which start anew
    ray.kill(shard.memory._servers._client._transport._actor, no_restart=False)
as_one()
print("as one")
"""


def test_actors_hold_what_one_process_holds(model_folder: str, whole: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": "/tmp"}
    environment["RAY_worker_niceness"] = "0"
    command = [sys.executable, "-c", SHARDED, str(whole), model_folder]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "as one\n"


def test_what_cannot_be_is_said(model_folder: str, corpus: Path, tmp_path: Path) -> None:
    build = begun(model_folder, corpus, "--out", tmp_path / "m", "--ray", "127.0.0.1:9")
    _, said = build.communicate(timeout=300)
    assert build.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:9'" in " ".join(said.decode().split())
    assert not (tmp_path / "m" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "m", ignore_errors=True)


@contextmanager
def cluster(hosts: list[Host], folder: Path) -> Iterator[str]:
    """A Ray cluster of hosts with a CPU each; its head, which has none, is this machine."""
    home = hosts[0].address.rpartition(".")[0] + ".1"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    ray += ["--object-store-memory=80000000", "--disable-usage-stats"]
    head = ["--head", "--num-cpus=0", f"--node-ip-address={home}", "--port=6379"]
    head += ["--include-dashboard=false", f"--temp-dir={folder}"]
    address = f"{home}:6379"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    soon = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 1000}
    environment |= {f"RAY_health_check_{name}": str(value) for name, value in soon.items()}
    calls = [[*ray, *head]]
    for host in hosts:
        own = [f"--address={address}", "--num-cpus=1", f"--node-ip-address={host.address}"]
        calls.append(host.command(*ray, *own))
    started: list[subprocess.Popen[str]] = []

    def begins(call: list[str]) -> bool:
        """Whether a node starts: where the machine is busy, Ray gives up after fifteen seconds."""
        started.append(subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True))
        return any("Ray runtime started" in line for line in started[-1].stdout or ())

    try:
        for call in calls:
            assert any(begins(call) for _ in range(3)), call
        yield address
    finally:
        for process in started:
            process.kill()
            process.communicate()
        for file in Path("/proc").glob("[0-9]*/cmdline"):  # what they have left
            try:
                if str(folder) in file.read_text():
                    os.kill(int(file.parent.name), signal.SIGKILL)
            except OSError:
                continue


@needs_hosts
def test_a_cluster_that_loses_a_host(
    model_folder: str,
    corpus: Path,
    whole: Path,
    hosts: list[Host],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its worker lives on and writes, cut off from the others, and another does its work."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    path = tmp_path / "m"
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder,
        cluster(hosts, Path(folder)) as address,
    ):
        build = begun(model_folder, corpus, "--out", path, "--ray", address, "--json")
        within(300, lambda: len(list(path.glob("build/*.keys.claim"))) == 2)
        hosts[1].link("down")
        said = ended(build)
    assert json.loads(said)["documents"] == 400  # and nothing that Ray has to say
    assert snapshot(path) == snapshot(whole)
