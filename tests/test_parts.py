# ruff: noqa: F811 - fixtures of another file
"""A build by several workers and by parts: byte for byte what one process gives."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import edit_manifest, snapshot
from nearest import Document, Memory
from nearest.build import tasks, worker
from nearest.build.build import BuildOptions, build_memory, worker_spec
from nearest.build.corpus_segments import in_segments
from nearest.build.join import join
from nearest.build.workers import told
from nearest.cli import app
from nearest.corpus.tokens import TokenisedDocument
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import CorpusError, FolderError, ModelError, NearestError, SettingError
from nearest.store.claims import Watch
from nearest.store.journal import Journal
from nearest.store.shard import share_named
from nearest.store.verify import verify
from segments import (
    DOCUMENTS,
    OPTIONS,
    Model,
    model,  # noqa: F401 - a fixture
    parts_of,
    threads,  # noqa: F401 - a fixture
    whole,  # noqa: F401 - a fixture
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, model: Model) -> list[Path]:
    return parts_of(tmp_path_factory.mktemp("parts"), model, 3)


# --- equal bytes ----------------------------------------------------------------------------------


def test_segments_are_runs_of_whole_documents() -> None:
    lengths = np.random.default_rng(0).integers(1, 12, size=60).tolist()
    documents = [TokenisedDocument(Document(str(n), ""), np.arange(n)) for n in lengths]
    for limit in (1, 7, 20, 1000):
        runs = [[len(d.tokens) for d in run] for run in in_segments(iter(documents), limit)]
        assert list(itertools.chain(*runs)) == lengths
        assert all(sum(run) >= limit for run in runs[:-1])
        assert all(sum(run[:-1]) < limit or run[-1] == 1 for run in runs)
        assert all(run[0] > 1 for run in runs[1:])
    assert list(in_segments(iter(()), 5)) == []


@pytest.mark.slow  # to start processes takes seconds
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_processes_make_the_same_bytes(
    workers: int, whole: Path, model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    Memory.build(*model, DOCUMENTS, path, workers=workers, tune=False, **OPTIONS)
    assert snapshot(path) == snapshot(whole)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_make_the_same_bytes(
    workers: int, whole: Path, model: Model, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int | None]] = []
    memory = Memory.build(
        *model,
        DOCUMENTS,
        tmp_path / "m",
        workers=workers,
        tune=False,
        progress=lambda *said: seen.append(said),
        **OPTIONS,
    )
    assert snapshot(memory.path) == snapshot(whole)
    assert verify(memory.path) == []
    assert all(total is None or done <= total for _, done, total in seen)


def test_parts_make_the_same_bytes(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    before = [snapshot(path) for path in parts]
    join(parts[::-1], tmp_path / "m", BuildOptions())
    assert snapshot(tmp_path / "m") == snapshot(whole)
    assert [snapshot(path) for path in parts] == before
    file = "segments/000002/keys.npy"
    assert (tmp_path / "m" / file).samefile(parts[1] / file)


def test_copies_are_the_same_bytes(
    whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    join(parts, tmp_path / "m", BuildOptions())
    assert snapshot(tmp_path / "m") == snapshot(whole)
    file = parts[2] / "segments/000003/suffix.npy"
    copy = shutil.copytree(parts[2], tmp_path / "damaged") / file.relative_to(parts[2])
    copy.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(FolderError, match=r"suffix.npy is damaged"):
        join([*parts[:2], tmp_path / "damaged"], tmp_path / "other", BuildOptions())


def test_a_part_without_a_segment(model: Model, tmp_path: Path) -> None:
    options = {**OPTIONS, "segment_tokens": None, "index": "exact"}
    one = Memory.build(*model, DOCUMENTS, tmp_path / "one", tune=False, **options)
    paths = [tmp_path / "1", tmp_path / "2"]
    for number, path in enumerate(paths, 1):
        build_memory(path, DOCUMENTS, *model, BuildOptions(**options), (number, 2))
    join(paths, tmp_path / "m", BuildOptions())
    assert snapshot(tmp_path / "m") == snapshot(one.path)


@pytest.mark.usefixtures("threads")
def test_without_keys(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options: dict[str, Any] = {"segment_tokens": 150, "keys": "none"}
    one = Memory.build(None, tiny_tokenizer, DOCUMENTS, tmp_path / "one", **options)
    two = Memory.build(None, tiny_tokenizer, DOCUMENTS, tmp_path / "two", workers=2, **options)
    assert snapshot(two.path) == snapshot(one.path)
    paths = [tmp_path / "1", tmp_path / "2"]
    for number, path in enumerate(paths, 1):
        build_memory(path, DOCUMENTS, None, tiny_tokenizer, BuildOptions(**options), (number, 2))
    join(paths, tmp_path / "m", BuildOptions())
    assert snapshot(tmp_path / "m") == snapshot(one.path)


def test_the_commands(model_folder: str, whole: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "\n".join(json.dumps({"id": d.id, "text": d.text, **d.metadata}) for d in DOCUMENTS)
    )
    call = ["build", model_folder, str(corpus), "--index", "IVF4,SQ8", "--batch-size", "1"]
    call += ["--segment-tokens", "150", "--json"]
    paths = [str(tmp_path / f"p{number}") for number in (1, 2)]
    for number, path in enumerate(paths, 1):
        result = CliRunner().invoke(app, [*call, "--out", path, "--part", f"{number}/2"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["part"] == number
    result = CliRunner().invoke(app, ["join", *paths, "--out", str(tmp_path / "m"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["documents"] == len(DOCUMENTS)
    assert snapshot(tmp_path / "m") == snapshot(whole)
    result = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "x"), "--part", "3/2"])
    assert result.exit_code == 2
    assert "write i/n with i from 1 to n" in result.output


# --- what goes on ---------------------------------------------------------------------------------


def test_what_was_recorded(whole: Path) -> None:
    memory = Memory.open(whole)
    assert memory.manifest.segment_tokens == 150
    assert all(s.record.tokens >= 150 for s in memory.segments[:-1])
    assert {s.record.made_on.batch_size for s in memory.segments if s.record.made_on} == {1}
    trained = {s.record.index.filled_from for s in memory.segments if s.record.index} - {None}
    assert len(trained) == 1  # that of the largest segment


@pytest.mark.usefixtures("threads")
def test_another_number_of_workers_goes_on(
    whole: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    _begun(path, model, monkeypatch, workers=2)
    Memory.build(*model, DOCUMENTS, path, tune=False, **OPTIONS)
    assert snapshot(path) == snapshot(whole)


def _begun(path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A build that ends after five tasks."""
    do, left = tasks._do, iter(range(5))

    def mortal(*args: Any) -> None:
        if next(left, None) is None:
            raise NearestError("no more")
        do(*args)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "_do", mortal)
        with pytest.raises(NearestError, match="no more"):
            Memory.build(*model, DOCUMENTS, path, **{**OPTIONS, **options})
    assert (path / "build.json").exists()
    assert not (path / "manifest.json").exists()


@pytest.mark.parametrize("workers", [2, None])
@pytest.mark.usefixtures("threads")
def test_a_build_goes_on_with_the_threads_that_it_was_begun_with(
    workers: int | None, whole: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, path = torch.get_num_threads(), tmp_path / "m"
    try:
        torch.set_num_threads(4)
        _begun(path, model, monkeypatch, workers=4)  # a thread for each
        torch.set_num_threads(4)
        with pytest.warns(UserWarning, match=r"goes on with 1 thread a process"):
            Memory.build(*model, DOCUMENTS, path, workers=workers, tune=False, **OPTIONS)
        if workers is None:
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert snapshot(path) == snapshot(whole)


@pytest.mark.parametrize("then", ["published", "begun anew"])
@pytest.mark.usefixtures("threads")
def test_a_worker_that_comes_late_leaves_the_folder_alone(
    then: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it loads the model, others finish the build, or delete it and begin another one."""
    path, loaded = tmp_path / "m", worker._encoder
    _begun(path, model, monkeypatch, workers=2)
    spec = worker_spec(model[0], BuildOptions(workers=1, **OPTIONS))

    def late(*args: Any) -> Any:
        encoder = loaded(*args)
        monkeypatch.setattr(worker, "_encoder", loaded)
        if then == "published":
            Memory.build(*model, DOCUMENTS, path, tune=False, **OPTIONS)
        else:
            shutil.rmtree(path)
            _begun(path, model, monkeypatch, workers=2, keys="fp16")
        return encoder

    monkeypatch.setattr(worker, "_encoder", late)
    files = []

    def look(build: Any, watch: Any) -> None:
        files.append(_times(path))
        work(build, watch)

    work = worker.work
    monkeypatch.setattr(worker, "work", look)
    spec.work(path, "w9")
    assert _times(path) == files[-1]
    assert (path / "manifest.json").exists() == (then == "published")


def _times(path: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in path.rglob("*")}


@pytest.mark.parametrize("left", ["nothing", "a log"])
def test_a_claim_that_is_lost_is_no_error(
    left: str, whole: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes it over, and what was written, before that is opened; then it does the work."""
    written, other = tasks._written, Watch("another-host-1-w0", stale=0)
    overtaken: list[Path] = []

    def overtaking(build: Any, task: Any, claim: Any, made_on: Any) -> Any:
        if task.path == "keys" and not overtaken:
            overtaken.append(claim.path)
            other.take(claim.path)  # sees how old the claim is
            assert other.take(claim.path) is not None
            if left == "a log":  # of keys that are elsewhere now
                claim.scratch.mkdir()
                (claim.scratch / "batches.json").write_bytes(b"1")
            try:
                return written(build, task, claim, made_on)
            finally:
                shutil.rmtree(claim.scratch, ignore_errors=True)
                other.give_up()
        return written(build, task, claim, made_on)

    monkeypatch.setattr(tasks, "_written", overtaking)
    memory = Memory.build(*model, DOCUMENTS, tmp_path / "m", workers=None, tune=False, **OPTIONS)
    assert overtaken
    assert snapshot(memory.path) == snapshot(whole)


@pytest.mark.usefixtures("threads")
def test_the_model_of_a_worker_must_be_the_same(model: Model, tmp_path: Path) -> None:
    changed = load_model_and_tokenizer(model[0].config._name_or_path)[0]
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.5)  # in RAM alone
    with pytest.raises(NearestError, match="is not the model that this build was begun with"):
        Memory.build(changed, model[1], DOCUMENTS, tmp_path / "m", workers=1, **OPTIONS)


@pytest.mark.parametrize("options", [{"workers": 2}, {"ray": "auto"}])
def test_a_model_without_a_name_is_refused_before_anything_is_read(
    options: dict[str, Any], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread() -> Any:
        raise AssertionError("nothing is read")
        yield

    monkeypatch.setattr(model[0].config, "_name_or_path", "")
    with pytest.raises(ModelError, match="this one is in RAM alone: save it"):
        Memory.build(*model, unread(), tmp_path / "m", **OPTIONS, **options)
    assert not (tmp_path / "m").exists()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("left", [b"", b"{"])
def test_what_says_the_first_machine_is_written_anew_where_it_is_damaged(
    left: bytes, whole: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    _begun(path, model, monkeypatch, workers=1)
    (path / "build/machine.json").write_bytes(left)
    Memory.build(*model, DOCUMENTS, path, tune=False, **OPTIONS)
    assert snapshot(path) == snapshot(whole)


def test_nothing_is_published_where_a_file_is_gone(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, durable = tmp_path / "m", Journal.make_durable

    def losing(journal: Journal, segments: Any) -> None:
        durable(journal, segments)
        (path / "segments/000002/suffix.npy").unlink(missing_ok=True)

    monkeypatch.setattr(Journal, "make_durable", losing)
    with pytest.raises(FolderError, match=r"000002/suffix.npy is missing"):
        Memory.build(*model, DOCUMENTS, path, tune=False, **OPTIONS)
    assert not (path / "manifest.json").exists()


def test_what_is_added_says_on_what_it_was_made(whole: Path, model: Model, tmp_path: Path) -> None:
    memory = Memory.open(shutil.copytree(whole, tmp_path / "m"))
    grown = memory.add(*model, [Document("new", "one more text, and a little longer")])
    made_on = grown.segments[-1].record.made_on
    assert made_on is not None
    assert made_on.threads == torch.get_num_threads()


# --- what is refused ------------------------------------------------------------------------------


def _edited(path: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(path, to)
    stage = json.loads((to / "build.json").read_bytes())
    change(stage)
    (to / "build.json").write_text(json.dumps(stage))
    return to


def _unlike(path: Path) -> None:
    for file in path.glob("build/*.keys.done.json"):
        record = json.loads(file.read_bytes())
        record["made_on"]["torch"] = "0.1"
        file.write_text(json.dumps(record))


def test_parts_that_do_not_belong_together(parts: list[Path], tmp_path: Path) -> None:
    def refused(paths: list[Path], message: str) -> None:
        with pytest.raises(FolderError, match=message):
            join(paths, tmp_path / "m", BuildOptions())
        assert not (tmp_path / "m").exists()

    refused(parts[:2], "part 3/3 is not named")
    again = Path(shutil.copytree(parts[0], tmp_path / "0"))
    refused([*parts, again], "part 1/3 is named twice")
    other = _edited(parts[2], tmp_path / "1", lambda s: s["arguments"].update(batch_size=7))
    refused([*parts[:2], other], "was built with batch_size 7, and .* with 1")
    other = _edited(parts[2], tmp_path / "2", lambda s: s["corpora"][0].update(digest="0" * 64))
    refused([*parts[:2], other], "another corpus")
    other = _edited(parts[2], tmp_path / "3", lambda s: s.update(part=[3, 4]))
    refused([*parts[:2], other], "one of 4 parts")
    other = Path(shutil.copytree(parts[2], tmp_path / "4"))
    (other / "build/000003.keys.done.json").unlink()
    refused([*parts[:2], other], r"not finished; 000003.keys is missing")
    other = Path(shutil.copytree(parts[2], tmp_path / "5"))
    (other / "segments/000003/keys.npy").write_bytes(b"cut")
    refused([*parts[:2], other], r"5/segments/000003/keys.npy has 3 bytes")
    other = Path(shutil.copytree(parts[2], tmp_path / "6"))
    (other / "segments/000003/tokens.npy").unlink()
    refused([*parts[:2], other], r"000003/tokens.npy is missing")
    other = Path(shutil.copytree(parts[2], tmp_path / "7"))
    _unlike(other)
    refused([*parts[:2], other], r"7 were made with torch 0.1, .*--allow-mixed")
    join([*parts[:2], other], tmp_path / "m", BuildOptions(allow_mixed=True))
    assert verify(tmp_path / "m") == []


def test_a_part_is_no_memory(parts: list[Path], model: Model, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="not a memory"):
        Memory.open(parts[0])
    with pytest.raises(FolderError, match="begun with part 1/3, and not 1/1"):
        Memory.build(*model, DOCUMENTS, parts[0], **OPTIONS)
    with pytest.raises(SettingError, match="nothing is named"):
        join([], tmp_path / "m", BuildOptions())
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(SettingError, match="write i/n"):
            share_named(text)
    for name in ("workers", "segment_tokens"):
        with pytest.raises(SettingError, match=f"{name} must be at least 1, got 0"):
            BuildOptions(**{name: 0})


def test_what_a_worker_says() -> None:
    assert told(b"") is None
    assert told(b"Segmentation fault") is None
    assert isinstance(told(b'loading\n["CorpusError", "no"]'), CorpusError)


# --- memories that were built alike ---------------------------------------------------------------


def test_memories_are_joined(model: Model, whole: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "segment_tokens": None}
    halves = [DOCUMENTS[:5], DOCUMENTS[5:]]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, half in zip(paths, halves, strict=True):
        Memory.build(*model, half, path, tune=False, **options)
    memory = Memory.open(paths[0]).remove([DOCUMENTS[1].id])
    assert memory.manifest.version == 2
    join(paths, tmp_path / "m", BuildOptions())
    memory = Memory.open(tmp_path / "m")
    assert verify(memory.path) == []
    left = [d for d in DOCUMENTS if d.id != DOCUMENTS[1].id]
    found = [memory.document(n) for n in range(memory.documents)]
    assert [(d.id, d.text) for d in found] == [(d.id, d.text) for d in left]
    queries = np.concatenate([s.keys.rows(s.searched) for s in memory.segments])
    found_ids = memory.search(queries, 4).ids
    assert memory.key_distances(queries, found_ids)[:, 0].max() < 1e-3

    with pytest.raises(CorpusError, match=r"doc-\d' is in two of these"):
        join([paths[0], whole], tmp_path / "n", BuildOptions())
    other = Memory.build(*model, halves[1], tmp_path / "c", tune=False, **options, keys="fp16")
    with pytest.raises(FolderError, match=r"another keys \(format\) than .* \(fp16 and int8\)"):
        join([paths[0], other.path], tmp_path / "n", BuildOptions())
    edit_manifest(paths[1], lambda m: m["segments"][0]["made_on"].update(threads=64))
    with pytest.raises(FolderError, match="threads 64"):
        join(paths, tmp_path / "n", BuildOptions())
    assert not (tmp_path / "n").exists()
