"""Builds that were killed, and go on: byte for byte what an undisturbed build gives."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import random_documents, snapshot
from faults import disk
from folders import kill_writers, place_of
from nearest import Document, Memory
from nearest.corpus import tokens
from nearest.encode import encoder
from nearest.encode.layers import find_key_layer
from nearest.errors import CorpusError, FolderError
from nearest.store import journal as unfinished
from nearest.store import new_segment
from nearest.store.new_files import NewFiles
from nearest.store.verify import verify

DOCUMENTS = random_documents()
OPTIONS: dict[str, Any] = {"index": "IVF4,SQ8", "batch_size": 1, "keys": "int8"}
SEGMENT = 350  # tokens: three segments
Model = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def model(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Model:
    return tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def journalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is noted, and segments are small."""
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    monkeypatch.setattr(new_segment, "SEGMENT_TOKENS", SEGMENT)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass."""
    made: list[int] = []
    encode = encoder.encode_keys

    def counted(*args: Any) -> Any:
        made.append(1)
        return encode(*args)

    monkeypatch.setattr(encoder, "encode_keys", counted)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Model) -> tuple[Path, list[str]]:
    """A memory built at once, and the operations on the disk that it took."""
    path = tmp_path_factory.mktemp("whole") / "m"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(unfinished, "_SECONDS", 0)
        patched.setattr(new_segment, "SEGMENT_TOKENS", SEGMENT)
        with disk() as counted:
            Memory.build(*model, DOCUMENTS, path, **OPTIONS)
    return path, counted.operations


@pytest.fixture(scope="module")
def per_segment(whole: tuple[Path, list[str]], model: Model) -> list[int]:
    """Forward passes that each segment takes."""
    memory = Memory.open(whole[0])
    keys = memory.keys_record
    layer = find_key_layer(model[0], keys.layer)
    reader = encoder.Encoder.of(model[0], layer, keys.window, keys.stride, 1)
    texts = [[s.tokens_of(n) for n in s.numbers.tolist()] for s in memory.segments]
    return [sum(1 for _ in reader.batches(documents)) for documents in texts]


def test_a_corpus_of_several_segments(
    whole: tuple[Path, list[str]], model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = Memory.open(whole[0])
    assert len(memory.segments) == 3
    assert all(segment.record.tokens >= SEGMENT for segment in memory.segments[:-1])
    found = [memory.document(n) for n in range(memory.documents)]
    assert [(d.id, d.text) for d in found] == [(d.id, d.text) for d in DOCUMENTS]
    assert verify(whole[0]) == []
    monkeypatch.setattr(new_segment, "SEGMENT_TOKENS", 1 << 24)
    one = Memory.build(*model, DOCUMENTS, tmp_path / "one", **OPTIONS)
    assert len(one.segments) == 1
    every = np.concatenate([segment.tokens for segment in memory.segments])
    np.testing.assert_array_equal(every, one.segments[0].tokens)
    rows = [s.keys.rows(np.arange(s.record.tokens)) for s in memory.segments]
    expected = one.segments[0].keys.rows(np.arange(len(every)))
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=0.05)


@pytest.mark.slow
def test_killed_builds_go_on(
    whole: tuple[Path, list[str]],
    model: Model,
    per_segment: list[int],
    passes: list[int],
    tmp_path: Path,
) -> None:
    """What is redone are the forward passes that the journal does not tell of, and no other."""
    operations = whole[1]
    moments = []
    for name in ("pwrite", "fsync", "replace"):
        count = operations.count(name)
        assert count > 20
        moments += [("build", name, n) for n in range(2, count, count // 2)]
    changes = {"build": lambda path: Memory.build(*model, DOCUMENTS, path, **OPTIONS)}
    kill_writers(changes, tmp_path, moments)
    expected, went_on = snapshot(whole[0]), 0
    for moment in moments:
        path = place_of(tmp_path, moment)
        saved = 0
        if (path / "build.json").exists():
            for number, count in enumerate(per_segment, 1):
                noted = path.glob(f"build/{number:06d}.keys.files.*/batches.json")
                done = (path / f"build/{number:06d}.keys.done.json").exists()
                saved += count if done else sum(int(file.read_bytes()) for file in noted)
            went_on += saved > 0
        passes.clear()
        if not (path / "manifest.json").exists():
            Memory.build(*model, DOCUMENTS, path, **OPTIONS)
            assert len(passes) == sum(per_segment) - saved, (moment, saved)
        else:
            (path / "build.json").unlink(missing_ok=True)
            shutil.rmtree(path / "build", ignore_errors=True)
        assert snapshot(path) == expected, moment
    assert went_on > 1


def interrupted(path: Path, model: Model, stage: str = "keys", at: int = 2, **options: Any) -> None:
    """Begin a build that is interrupted when it has got so far for the at-th time."""
    seen = []

    def interrupt(current: str, _done: int, _total: int | None) -> None:
        seen.extend([1] if current.startswith(stage) else [])
        if len(seen) > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Memory.build(*model, DOCUMENTS, path, progress=interrupt, **{**OPTIONS, **options})


@pytest.mark.parametrize(("stage", "at"), [("suffix", 0), ("keys", 4), ("index", 1), ("tokens", 9)])
def test_an_interrupted_build_goes_on(
    stage: str, at: int, whole: tuple[Path, list[str]], model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    interrupted(path, model, stage, at)
    assert (path / "build.json").exists()
    Memory.build(*model, iter(DOCUMENTS), path, **OPTIONS)
    assert snapshot(path) == snapshot(whole[0])


def test_a_long_task_is_noted_before_the_next_begins(
    whole: tuple[Path, list[str]],
    model: Model,
    passes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder as a kill leaves it while the index is trained: all keys are there, and known.

    Its claims are those of a process that has ended, as if there were none.
    """
    monkeypatch.setattr(unfinished, "_SECONDS", float("inf"))
    monkeypatch.setattr(unfinished, "_LONG", 0)
    killed = tmp_path / "killed"

    def copied(stage: str, _done: int, _total: int | None) -> None:
        if stage.startswith("index") and not killed.exists():
            ended = shutil.ignore_patterns("*.claim")
            shutil.copytree(tmp_path / "m", killed, ignore=ended)

    Memory.build(*model, DOCUMENTS, tmp_path / "m", progress=copied, **OPTIONS)
    passes.clear()
    Memory.build(*model, DOCUMENTS, killed, **OPTIONS)
    assert passes == []
    assert snapshot(killed) == snapshot(whole[0])


@pytest.mark.parametrize("moved", [1, 2])
def test_keys_whose_files_were_being_moved_are_made_anew(
    moved: int,
    whole: tuple[Path, list[str]],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ended after so many of the two files of keys, and before it was noted that they are done."""
    settle, path = NewFiles.settle, tmp_path / "m"

    def interrupt(files: NewFiles, names: Iterable[str]) -> None:
        some = sorted(names)
        settle(files, some[:moved])
        if "keys.npy" in some:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(NewFiles, "settle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Memory.build(*model, DOCUMENTS, path, **OPTIONS)
    assert (path / "segments/000001/keys.npy").exists()
    Memory.build(*model, DOCUMENTS, path, **OPTIONS)
    assert snapshot(path) == snapshot(whole[0])


def _changed(number: int) -> list[Document]:
    return [
        Document(d.id, d.text + "!" * (n == number), d.metadata) for n, d in enumerate(DOCUMENTS)
    ]


OTHERS: dict[str, tuple[dict[str, Any], Callable[[], list[Document]], str]] = {
    "keys": ({"keys": "fp16"}, lambda: DOCUMENTS, "it was begun with keys .*int8.* and not .*fp16"),
    "batch": ({"batch_size": 2}, lambda: DOCUMENTS, "begun with batch_size 1, and not 2"),
    "recall": ({"recall": 0.5}, lambda: DOCUMENTS, "begun with recall 0.95, and not 0.5"),
    "a text": ({}, lambda: _changed(0), "begun with another corpus"),
    "fewer": ({}, lambda: DOCUMENTS[:1], "begun with another corpus"),
    "an id": ({}, lambda: [Document("x", DOCUMENTS[0].text), *DOCUMENTS[1:]], "another corpus"),
    "metadata": (
        {}, lambda: [replace(DOCUMENTS[0], metadata={"a": 1}), *DOCUMENTS[1:]], "another corpus"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_another_build_does_not_go_on(
    case: str, model: Model, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "m"
    interrupted(path, model, "keys", 4)
    before = snapshot(path)
    options, documents, message = OTHERS[case]
    with pytest.raises(FolderError, match=message) as caught:
        Memory.build(*model, documents(), path, **{**OPTIONS, **options})
    assert "or delete the folder to start anew" in str(caught.value)
    assert snapshot(path) == before
    Memory.build(*model, DOCUMENTS, path, **OPTIONS)
    assert snapshot(path) == snapshot(whole[0])


def test_the_same_model_goes_on_from_another_place(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "m", model, "keys", 4)
    monkeypatch.setattr(model[0].config, "_name_or_path", "a folder that has been moved")
    memory = Memory.build(*model, DOCUMENTS, tmp_path / "m", **OPTIONS)
    assert memory.documents == len(DOCUMENTS)


def test_a_corpus_that_ends_elsewhere_is_another(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m"
    interrupted(path, model, "tokens", 5)  # in the second segment
    (begun,) = json.loads((path / "build.json").read_bytes())["corpora"]
    with pytest.raises(FolderError, match="another corpus"):
        Memory.build(*model, DOCUMENTS[: begun["documents"]], path, **OPTIONS)
    shutil.rmtree(path)

    interrupted(path, model, "keys", 4)
    with pytest.raises(FolderError, match="another corpus"):
        Memory.build(*model, [*DOCUMENTS, Document("new", "more")], path, **OPTIONS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "build.json").write_bytes(b"{"),
        lambda path: (path / "build.json").write_bytes(b"\xff"),
        lambda path: (path / "segments/000001/tokens.npy").unlink(),
        lambda path: (path / "segments/000001/suffix.npy").write_bytes(b"short"),
        lambda path: (path / "build/000001.suffix.done.json").write_bytes(b"{"),
        lambda path: next(path.glob("build/000001.keys.files.*/keys.npy")).write_bytes(b"short"),
    ],
)
def test_a_damaged_leftover_is_named(
    damage: Callable[[Path], Any], model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    interrupted(path, model, "keys", 4)
    damage(path)
    with pytest.raises(FolderError, match=r"build\.json|000001"):
        Memory.build(*model, DOCUMENTS, path, **OPTIONS)
    shutil.rmtree(path)
    Memory.build(*model, DOCUMENTS, path, **OPTIONS)


def test_a_corpus_that_is_mended_goes_on(
    whole: tuple[Path, list[str]],
    model: Model,
    per_segment: list[int],
    passes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 1)
    path = tmp_path / "m"

    def broken() -> Iterator[Document]:
        yield from DOCUMENTS[:8]
        raise CorpusError("a.jsonl:9 is not JSON")

    with pytest.raises(CorpusError, match="not JSON"):
        Memory.build(*model, broken(), path, **OPTIONS)
    assert not passes  # all of the corpus is read before the first
    Memory.build(*model, DOCUMENTS, path, **OPTIONS)
    assert snapshot(path) == snapshot(whole[0])
    assert len(passes) == sum(per_segment)


def test_what_a_build_left_beside_its_memory_is_rubbish(model: Model, tmp_path: Path) -> None:
    memory = Memory.build(*model, DOCUMENTS[:2], tmp_path / "m", **{**OPTIONS, "index": "exact"})
    before = snapshot(memory.path)
    for name in ("build.json", "build.json.partial"):
        (memory.path / name).write_bytes(b"{")
    with pytest.raises(CorpusError):
        memory.remove(["no such"])
    assert snapshot(memory.path) == before
