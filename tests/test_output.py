"""The command's output where it can be written only in part, or not at all."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from conftest import make_tokenizer
from nearest import Memory
from nearest.cli.app import out, register


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
    assert (done.returncode, done.stderr) == (0, b"")


def ran(function: Callable[[], None]) -> Result:
    group = typer.Typer()
    register("command", function, group)
    return CliRunner().invoke(group)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_errors_of_other_files_are_not_said_of_the_output(number: int) -> None:
    """Nor do they end a command as if it had done what it was to do."""

    def fails() -> None:
        raise OSError(number, os.strerror(number))

    done = ran(fails)
    assert done.exit_code != 0
    assert "standard output" not in done.stderr


@pytest.mark.parametrize("echo", [typer.echo, out.print])
@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.EIO, 2)])
def test_errors_of_the_output_are_told_from_others(
    number: int, code: int, echo: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> int:
        raise OSError(number, os.strerror(number))

    def says() -> None:
        monkeypatch.setattr(sys.stdout._stream, "write", fails)  # type: ignore[union-attr]
        echo("something")

    done = ran(says)
    assert done.exit_code == code
    assert ("standard output cannot be written" in done.stderr) == (code == 2)
