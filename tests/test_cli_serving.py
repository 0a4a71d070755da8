"""`nearest serve` as a command of its own process: it starts, answers, and ends in order."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from conftest import make_documents
from nearest import Memory
from nearest.cli.app import app
from nearest.encode.loading import load_model_and_tokenizer
from nearest.retro import retrofit
from nearest.retro.data.stages import chunk_memory
from nearest.serve.run import log_to
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
def started(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The command, once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "nearest", "serve", *map(str, arguments), "--port", str(port)]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("NEAREST_")}
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
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


HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed")
def test_the_dockerfile_has_no_fault() -> None:
    subprocess.run([HADOLINT, "examples/serve/Dockerfile"], check=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "without an API key"),
        (["--api-key", "short"], "shorter than 8"),
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


def test_retro_needs_a_memory_with_chunks(
    model_folder: str, fitted: Path, tmp_path: Path
) -> None:  # fmt: skip
    model, tokenizer = load_model_and_tokenizer(model_folder)
    plain = Memory.build(model, tokenizer, make_documents(3, 30), tmp_path / "plain.memory")
    arguments = ["serve", str(plain.path), "--retro", str(fitted)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "none of the memories has chunks" in " ".join(result.output.split())
