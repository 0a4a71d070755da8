"""`nearest serve` as a command of its own process: it starts, answers, and ends in order."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from conftest import make_documents
from nearest import Memory
from nearest.cli import serving as cli_serving
from nearest.cli.app import app
from nearest.encode.loading import load_model_and_tokenizer
from nearest.retro import retrofit
from nearest.retro.data.stages import chunk_memory
from nearest.serve.run import Server, log_to
from retro_models import stir
from serving import free_port


@pytest.fixture(scope="module")
def memory(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    model, tokenizer = load_model_and_tokenizer(model_folder)
    path = tmp_path_factory.mktemp("serving") / "law.memory"
    return Memory.build(model, tokenizer, make_documents(12, 30), path)


@pytest.fixture(scope="module")
def fitted(model_folder: str, memory: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RETROfit of the model; the memory's documents are cut for it."""
    chunk_memory(memory, 8)
    model, _ = load_model_and_tokenizer(model_folder)
    made = retrofit(model, [0, 1], chunk_size=8)
    stir(made.adapter)
    folder = tmp_path_factory.mktemp("fitted")
    made.save_pretrained(folder)
    return folder


@contextmanager
def started(
    *arguments: str | Path, port: int | None = None, told: int = subprocess.PIPE
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The command, once it is ready."""
    port = port or free_port()
    command = [sys.executable, "-m", "nearest", "serve", *map(str, arguments), "--port", str(port)]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("NEAREST_")}
    with (
        subprocess.Popen(command, stdout=told, stderr=told, text=True, env=environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            while True:
                assert process.poll() is None, process.stderr and process.stderr.read()
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield process, client
        finally:
            process.kill()


@pytest.mark.slow
def test_it_ends_what_is_under_way_and_logs_no_text(memory: Memory) -> None:
    options = ("--served-name", "tiny", "--method", "suffix", "--knn-temperature", "7")
    with started(memory.path, *options) as (process, client):
        assert client.get("/v1/nearest").json()["settings"]["suffix"]["temperature"] == 7
        body = {"model": "tiny", "prompt": "the secret word", "max_tokens": 20, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, told = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM  # by the signal, when all had ended
    assert "serving tiny on http://127.0.0.1:" in told
    logged = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    (request,) = [one for one in logged if one.get("route") == "/v1/completions"]
    assert (request["event"], request["method"], request["status"]) == ("request", "POST", 200)
    assert "secret" not in told


def ended(client: httpx.Client, method: str) -> str:
    """How a streamed answer ended: whole, with an error that says why, refused, or cut."""
    body = {"model": f"tiny@{method}", "prompt": "the court", "max_tokens": 20, "temperature": 0}
    try:
        with client.stream(
            "POST", "/v1/completions", json={**body, "stream": True, "nearest": {}}
        ) as response:
            if response.status_code == 503:
                assert "no server answers" in json.loads(response.read())["error"]["message"]
                return "refused"
            assert response.status_code == 200
            lines = [line for line in response.iter_lines() if line]
    except httpx.TransportError:
        return "cut"
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    if "error" in last:
        assert "no server answers" in last["error"]["message"]
        return "said"
    return "whole"


@contextmanager
def asking(client: httpx.Client) -> Iterator[list[str]]:
    """How answers end that three clients ask for, one after another, meanwhile."""
    endings: list[str] = []
    done = threading.Event()

    def ask(method: str) -> None:
        while not done.is_set():
            endings.append(ended(client, method))
            if endings[-1] != "whole":  # those who are starting need the processor
                time.sleep(0.5)

    with ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(ask, method) for method in ("knn", "suffix", "retomaton")]
        try:
            yield endings
        finally:
            done.set()
        for one in asked:
            one.result()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
def test_servers_that_are_killed_with_streams_under_way(memory: Memory, model_folder: str) -> None:
    """Of two that look up, then both, then the one that answers; and each comes back."""
    ports = [free_port(), free_port(), free_port()]
    backs = f"http://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/law"
    quiet = subprocess.DEVNULL
    front = ("--model", model_folder, "--served-name", "tiny")
    with ExitStack() as running:
        first, second = (
            running.enter_context(started(memory.path, port=port, told=quiet))[0]
            for port in ports[:2]
        )
        answering, client = running.enter_context(started(backs, *front, port=ports[2], told=quiet))
        assert ended(client, "knn") == "whole"
        with asking(client) as endings:
            wait_for(lambda: len(endings) > 5)
            first.kill()
            count = len(endings)
            wait_for(lambda: len(endings) > count + 10)
            assert set(endings) == {"whole"}  # the other one answers
            second.kill()
            wait_for(lambda: endings[-1] == "refused")
            assert client.get("/health").text == "ok"
            again = running.enter_context(started(memory.path, port=ports[1], told=quiet))[0]
            count = len(endings)
            wait_for(lambda: "whole" in endings[count:])  # by itself
            wait_for(lambda: endings[-3:] == ["whole"] * 3)
        assert again.poll() is None
        assert set(endings) <= {"whole", "said", "refused"}
        with asking(client) as endings:
            wait_for(lambda: len(endings) > 5)
            answering.kill()
            wait_for(lambda: endings[-1] == "cut")  # and nothing that seems whole
            running.enter_context(started(backs, *front, port=ports[2], told=quiet))
            count = len(endings)
            wait_for(lambda: "whole" in endings[count:])
        assert set(endings) == {"whole", "cut"}


def test_a_server_that_failed_says_so_by_its_status(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that systemd's Restart=on-failure starts it again."""
    for name in ("nearest", "uvicorn"):
        for what in ("handlers", "propagate", "level"):  # to be put back
            monkeypatch.setattr(
                logging.getLogger(name), what, getattr(logging.getLogger(name), what)
            )
    monkeypatch.setattr(Server, "run", lambda _: None)
    with warnings.catch_warnings():
        assert CliRunner().invoke(app, ["serve", str(memory.path)]).exit_code == 1


@pytest.mark.slow
def test_a_retrofit_is_served_with_neighbours_by_words(memory: Memory, fitted: Path) -> None:
    with started(memory.path, "--retro", fitted, "--retro-method", "bm25") as (_, client):
        about = client.get("/v1/nearest").json()
        assert about["method"] == "retro"
        body = {
            "model": about["model"],
            "prompt": "the court shall the law of the court",
            "max_tokens": 12,
            "nearest": {},
        }
        answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["nearest"]["reads"][0]["passages"]


def test_a_warning_is_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nearest", "uvicorn"):
        for what in ("handlers", "propagate", "level"):  # to be put back
            monkeypatch.setattr(
                logging.getLogger(name), what, getattr(logging.getLogger(name), what)
            )
    stream = io.StringIO()
    with warnings.catch_warnings():  # which puts back what log_to replaces
        warnings.simplefilter("always")
        log_to(stream)
        for _ in range(2):
            warnings.warn("tune it again", stacklevel=1)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [("warning", "tune it again")]


KEYS = ("--write-key", "the-same-key", "--api-key", "the-same-key")
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed")
def test_the_dockerfile_has_no_fault() -> None:
    subprocess.run([HADOLINT, "examples/serve/Dockerfile"], check=True)


ANALYSE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYSE is None, reason="systemd is not installed")
def test_the_unit_has_no_fault(tmp_path: Path) -> None:
    text = Path("examples/serve/nearest.service").read_text("utf-8")
    (command,) = (line for line in text.splitlines() if line.startswith("ExecStart="))
    unit = tmp_path / "nearest.service"
    unit.write_text(text.replace("/opt/nearest/bin/nearest", sys.executable), "utf-8")
    told = subprocess.run(
        [str(ANALYSE), "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (told.returncode, told.stderr) == (0, "")
    options = {word for word in command.split() if word.startswith("--")}
    known = {name for one in get_command(app).commands["serve"].params for name in one.opts}  # type: ignore[attr-defined]
    assert options <= known


def test_the_images_context_holds_what_is_copied() -> None:
    """And nothing else: no memory, model or key that lies in the folder."""
    copied = [
        name
        for line in Path("examples/serve/Dockerfile").read_text("utf-8").splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    ]
    lines = Path(".dockerignore").read_text("utf-8").splitlines()
    assert "*" in lines
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "without an API key"),
        (["--api-key", "short"], "shorter than 8"),
        (["--writable", *KEYS], "the write key is the API key"),
        (["--writable"], "both --writable and a key of their own"),
        (["--retro", "nowhere", "--retro-method", "bm25"], "holds no RETRO model"),
        (["--method", "magic"], "cannot be served with these memories: choose among base, knn"),
        (["--method", "knn", "--lam", "3"], "lam must lie inside"),
        (["--chat-template", "nowhere"], "cannot be read"),
    ],
)
def test_what_cannot_be_served(
    memory: Memory, fitted: Path, options: list[str], reason: str
) -> None:
    result: Any = CliRunner().invoke(app, ["serve", str(memory.path), *options])
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())


def test_memories_of_one_name_are_refused_before_a_model_is_loaded(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cli_serving, "model_of")
    other = shutil.copytree(memory.path, tmp_path / "law.memory")
    result = CliRunner().invoke(app, ["serve", str(memory.path), str(other)])
    assert result.exit_code == 2
    assert "two of the memories have the same name" in " ".join(result.output.split())


def test_retro_needs_a_memory_with_chunks(
    model_folder: str, fitted: Path, tmp_path: Path
) -> None:  # fmt: skip
    model, tokenizer = load_model_and_tokenizer(model_folder)
    plain = Memory.build(model, tokenizer, make_documents(3, 30), tmp_path / "plain.memory")
    arguments = ["serve", str(plain.path), "--retro", str(fitted)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "none of the memories has chunks" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "option",
    [["--writable", "--write-key", "k" * 9], ["--method", "knn"], ["--retro", "m"],
     ["--lam", "0.3"], ["--chunks", "c"], ["--served-name", "n"], ["--chat-template", "f"],
     ["--model", "m"]],
)  # fmt: skip
def test_what_a_shard_cannot_do_is_refused(option: list[str]) -> None:
    """A server that was to be writable is not begun as one that is not."""
    result = CliRunner().invoke(app, ["serve", "m", "--shard", "1/2", *option])
    assert result.exit_code == 2
    for named in ("--shard", option[0]):
        assert named in result.stderr
