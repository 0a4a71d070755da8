"""The command's output where it can be written only in part, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from conftest import make_tokenizer
from nearest import Memory


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory, tiny_model: PreTrainedModel) -> Path:
    path = tmp_path_factory.mktemp("output") / "m"
    Memory.build(tiny_model, make_tokenizer(), ["a text"], path, keys="none")
    return path


def info(memory: Path, **options: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "nearest.cli", "info", str(memory)],
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_lacks_characters_gets_escapes(memory: Path, encoding: str) -> None:
    done = info(memory, env=os.environ | {"PYTHONIOENCODING": encoding}, stdout=subprocess.PIPE)
    assert (done.returncode, b"documents" in done.stdout) == (0, True), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_message(memory: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = info(memory, stdout=full)
    assert done.returncode == 2
    assert b"standard output cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(memory: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = info(memory, stdout=writing)
    finally:
        os.close(writing)
    assert done.stderr == b""
