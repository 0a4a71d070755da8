# ruff: noqa: F811 - fixtures of another file
"""Joining parts and memories where something is in the way: kills, caches, doubles, damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents, snapshot
from folders import Build
from nearest import Document, Memory
from nearest.build import join as joining
from nearest.build.build import BuildOptions
from nearest.build.join import join
from nearest.errors import CorpusError, FolderError
from nearest.store import journal as unfinished
from nearest.store.verify import verify
from segments import DOCUMENTS, OPTIONS, Model, model, parts_of, whole  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, model: Model) -> list[Path]:
    return parts_of(tmp_path_factory.mktemp("parts"), model, 2)


class Killed(BaseException):
    """As if the process had ended."""


def ends_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next join end before it takes so many files."""
    take, left = joining._take_file, iter(range(count))

    def mortal(*args: Any) -> None:
        if next(left, None) is None:
            raise Killed
        take(*args)

    monkeypatch.setattr(joining, "_take_file", mortal)


# --- parts ----------------------------------------------------------------------------------------


def test_a_join_that_was_killed_is_gone_on_with(
    parts: list[Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, the second time among files that were there already."""
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    out = tmp_path / "m"

    def no_index(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(joining, "finish", no_index)
        with pytest.raises(Killed):
            join(parts, out, BuildOptions())
    assert (out / "build.json").exists()
    for count in (1, 4, 9):
        with monkeypatch.context() as patched:
            ends_at(count, patched)
            with pytest.raises(Killed):
                join(parts, out, BuildOptions())
    for file in sorted(out.glob("segments/*/keys.npy"))[:1]:
        file.unlink()  # ended between taking one away and linking it anew
    assert not (out / "manifest.json").exists()
    join(parts, out, BuildOptions())
    assert snapshot(out) == snapshot(whole)


def test_an_unfinished_build_is_not_written_over(
    parts: list[Path], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stage: str, done: int, _: int | None) -> None:
        if stage == "keys" and done > 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    out, other = tmp_path / "m", make_documents(12, 30)
    with pytest.raises(KeyboardInterrupt):
        Memory.build(*model, other, out, progress=interrupt, **OPTIONS)
    before = snapshot(out)
    with pytest.raises(FolderError, match="holds an unfinished build of something else"):
        join(parts, out, BuildOptions())
    assert snapshot(out) == before
    Memory.build(*model, other, out, tune=False, **OPTIONS)
    assert Memory.open(out).documents == len(other)


def test_a_part_without_its_segment(parts: list[Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(parts[1], tmp_path / "bad"))
    stage = json.loads((bad / "build.json").read_bytes())
    stage["corpora"][1]["record"] = None
    (bad / "build.json").write_text(json.dumps(stage))
    with pytest.raises(FolderError, match="does not have segment 000002, which is its own"):
        join([parts[0], bad], tmp_path / "m", BuildOptions())
    assert not (tmp_path / "m").exists()


# --- memories -------------------------------------------------------------------------------------


@pytest.fixture
def two(build_memory: Build, tiny_model: PreTrainedModel) -> list[Path]:
    halves = [DOCUMENTS[:5], DOCUMENTS[5:]]
    return [build_memory(tiny_model, half, index="IVF4,SQ8").path for half in halves]


def test_a_joined_memory_lives_on_its_own(
    two: list[Path],
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Files are shared with the memories that it was made of, and each may change."""
    join(two, tmp_path / "m", BuildOptions())
    memory, before = Memory.open(tmp_path / "m"), snapshot(tmp_path / "m")
    queries = np.concatenate([s.keys.rows(s.searched) for s in memory.segments])
    expected = memory.search(queries, 5)
    first = Memory.open(two[0]).remove([DOCUMENTS[0].id]).compact()
    shutil.rmtree(two[1])
    assert snapshot(tmp_path / "m") == before
    assert verify(tmp_path / "m") == []
    np.testing.assert_array_equal(Memory.open(tmp_path / "m").search(queries, 5).ids, expected.ids)
    grown = memory.add(tiny_model, tiny_tokenizer, [Document("new", "a new text of the court")])
    grown.remove([DOCUMENTS[1].id]).compact()
    assert verify(tmp_path / "m") == []
    assert verify(first.path) == []
    assert Memory.open(first.path).documents == 4


def test_memories_of_the_hubs_cache(two: list[Path], tmp_path: Path) -> None:
    """Its client keeps files under their hashes, and a snapshot of links to them."""
    repository = tmp_path / "models--a--b"
    cached = repository / "snapshots" / "1"
    (repository / "blobs").mkdir(parents=True)
    for n, file in enumerate(sorted(p for p in two[0].rglob("*") if p.is_file())):
        blob = Path(shutil.copy(file, repository / "blobs" / str(n)))
        link = cached / file.relative_to(two[0])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert Memory.open(cached).documents == 5
    join([cached, two[1]], tmp_path / "m", BuildOptions())
    assert not any(file.is_symlink() for file in (tmp_path / "m").rglob("*"))
    assert verify(tmp_path / "m") == []


def test_documents_that_are_there_twice(
    two: list[Path], build_memory: Build, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match="is in two of these memories"):
        join([two[0], two[1], two[0]], tmp_path / "m", BuildOptions())
    third = build_memory(tiny_model, [DOCUMENTS[2], Document("own", "own text")], index="IVF4,SQ8")
    with pytest.raises(CorpusError, match=f"document '{DOCUMENTS[2].id}' is in two"):
        join([*two, third.path], tmp_path / "m", BuildOptions())
    assert not (tmp_path / "m").exists()
    third.remove([DOCUMENTS[2].id])
    join([*two, third.path], tmp_path / "m", BuildOptions())
    memory = Memory.open(tmp_path / "m")
    assert memory.documents == len(DOCUMENTS) + 1
    assert memory.document(memory.documents - 1).id == "own"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "message"), [(cut, "bytes, the manifest says"), (Path.unlink, "missing")]
)
def test_damaged_memories(
    harm: Callable[[Path], None], message: str, two: list[Path], tmp_path: Path
) -> None:
    harm(next(two[1].glob("segments/*/documents*")))
    with pytest.raises(FolderError, match=message):
        join(two, tmp_path / "m", BuildOptions())
    assert not (tmp_path / "m").exists()


def test_where_nothing_can_be_written(two: list[Path], parts: list[Path], tmp_path: Path) -> None:
    for out in (two[0], parts[0]):
        before = snapshot(out)
        for paths in (two, parts):
            with pytest.raises(FolderError, match=r"already a memory|of something else"):
                join(paths, out, BuildOptions())
        assert snapshot(out) == before
    with pytest.raises(FolderError, match="is no part of a build, and"):
        join([parts[0], two[0]], tmp_path / "m", BuildOptions())
    with pytest.raises(FolderError, match="does not exist"):
        join([tmp_path / "nothing"], tmp_path / "m", BuildOptions())


def test_a_memory_whose_journal_was_left_is_no_part(
    parts: list[Path], model: Model, tmp_path: Path
) -> None:
    """As a build leaves it that is killed between its publishing and the end."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, some in zip(paths, (DOCUMENTS[:3], DOCUMENTS[3:6]), strict=True):
        Memory.build(*model, some, path, tune=False, index="exact", batch_size=1)
    shutil.copy(parts[0] / "build.json", paths[0])
    join(paths, tmp_path / "m", BuildOptions())
    assert Memory.open(tmp_path / "m").documents == 6
