# ruff: noqa: F811 - fixtures of another file
"""Workers that embed chunks and find their neighbours: the bytes of one process."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nearest.errors import FolderError
from nearest.retro.data import database as database_module
from nearest.retro.data import stages, workers
from nearest.retro.data.database import ChunkDatabase, Part
from nearest.retro.data.embedders import embedder_named
from retro_data import database, documents, embedder, words
from segments import threads  # noqa: F401 - a fixture
from test_cli_retro import bert, prepared, run  # noqa: F401 - fixtures

MADE = ("neighbours/ids.npy", "neighbours/distances.npy", "neighbours/table.json")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BLOCK", 5)
    monkeypatch.setattr(stages, "BLOCK", 5)


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads here, and transformers loads one model at a time."""
    lock = threading.Lock()

    def load(*words: Any, **options: Any) -> Any:
        with lock:
            return embedder_named(*words, **options)

    monkeypatch.setattr(workers, "embedder_named", load)


def vectors(folder: Path) -> bytes:
    (path,) = folder.glob("segments/*/*vectors.npy")
    return path.read_bytes()


@pytest.mark.usefixtures("threads")
def test_stages_by_workers(prepared: Path, bert: str, tmp_path: Path) -> None:
    db, source = tmp_path / "db", prepared.parent / "train.jsonl"
    whole = tmp_path / "whole"
    options = ("--embedder", f"bert:{bert}")
    run("chunks", source, "--out", db, "--tokenizer", bert, "--chunk-size", 8)
    cut = ("--out", whole, "--tokenizer", bert, "--chunk-size", 8)
    run("prepare", source, *cut, *options, "--workers", 2)  # all stages at once
    (told,) = run("embed", db, *options, "--part", "2/2", "--workers", 1, "--json")
    assert not told["embedded"]
    (told,) = run("embed", db, *options, "--part", "1/2", "--workers", 3, "--json")
    assert told["embedded"]
    run("index", db)
    (told,) = run("neighbours", db, "--part", "1/2", "--workers", 2, "--json")
    assert not told["complete"]
    (told,) = run("neighbours", db, "--part", "2/2", "--workers", 2, "--json")
    assert told["complete"]
    for found in (db, whole):
        assert vectors(found) == vectors(prepared)
        for name in MADE:
            assert (found / name).read_bytes() == (prepared / name).read_bytes()
        assert not (found / "chunks.blocks").exists()
        assert not (found / "neighbours/blocks").exists()


@pytest.mark.usefixtures("threads")
def test_what_a_worker_says_is_told(
    prepared: Path, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is done stays: the stage goes on without workers."""
    db, source = tmp_path / "db", prepared.parent / "train.jsonl"
    run("chunks", source, "--out", db, "--tokenizer", bert, "--chunk-size", 8)

    def full(*_: Any) -> None:
        raise FolderError("no room on that node")

    with monkeypatch.context() as patched:
        patched.setattr(workers, "tokenizer_of", full)
        run("embed", db, "--embedder", f"bert:{bert}", "--workers", 2, code=2)
    run("embed", db, "--embedder", f"bert:{bert}")
    assert vectors(db) == vectors(prepared)


def test_parts_that_end_together_are_joined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one sees the last block while this one joins them: it waits, and ends well."""
    others: list[Future[Any]] = []
    path, pool = tmp_path / "d", ThreadPoolExecutor(1)

    def meanwhile(module: Any, name: str, other: Callable[[], Any]) -> None:
        read = getattr(module, name)

        def reading(*arguments: Any) -> Any:
            if not others:
                others.append(pool.submit(other))
                time.sleep(0.2)  # in which it would join them, too
            return read(*arguments)

        monkeypatch.setattr(module, name, reading)

    def embed(number: int) -> bool:
        return ChunkDatabase.open(path).embed(embedder(), words, part=Part(number, 2))

    def table(number: int) -> Any:
        return stages.make_table(path, None, tmp_path / "t", part=Part(number, 2))

    database(path, documents(20, longest=20), indexed=False)
    assert not embed(2)
    meanwhile(database_module, "joined_arrays", lambda: embed(2))
    assert embed(1)
    assert others.pop().result()
    ChunkDatabase.open(path).build_index()
    assert not (path / "chunks.blocks").exists()

    assert table(2) is None
    meanwhile(stages, "read_array", lambda: table(2))
    made = table(1)
    assert (others.pop().result().ids == made.ids).all()
    assert not (tmp_path / "t/blocks").exists()
