"""Sweeps: rows are those of `evaluate`, the model reads once, each query is searched once."""

import csv
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from transformers import PreTrainedModel

from conftest import call_fails, gates_trained_at_once, make_tokenizer, random_documents, snapshot
from nearest import Document, Memory, evaluate, read_text, sweep, tune
from nearest.errors import FolderError, NearestError, SettingError
from nearest.models import scoring
from nearest.models.method_run import MethodRun
from nearest.pages import sweep as report
from nearest.pages.published import PUBLISHED, published_named
from nearest.pages.sweep_page import render
from nearest.retrieval.search_cache import SearchCache
from nearest.verbs import sweep as sweep_module
from nearest.verbs.sweep import RANDOM_SKIP, Point, Sweep
from test_cli import EVAL_KEYS, invoke, json_lines, write_jsonl
from test_demo import Page, assert_self_contained

TOKENIZER = make_tokenizer()
CORPUS = random_documents()


def excerpts(count: int, size: int, seed: int) -> list[Document]:
    """Documents put together from two pieces of the corpus: pointers lead on inside each."""
    rng = np.random.default_rng(seed)
    texts = [document.text for document in CORPUS]
    starts = rng.integers(0, 20, (count, 2))
    picked = rng.integers(0, len(texts), (count, 2))
    return [
        Document(f"t{i}", "".join(texts[n][a : a + size] for n, a in zip(*pair, strict=True)))
        for i, pair in enumerate(zip(picked, starts, strict=True))
    ]


TEXT = excerpts(5, 20, seed=9)
METHODS = ["knn", "retomaton", "suffix", "hybrid"]
MIN_KNNS = [3, 1, float("inf"), 1]  # in no order, and one twice
SKIPS = [0.0, 0.4, 1.0]


@pytest.fixture(scope="module")
def memory(tiny_model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    """Tuned for every method of METHODS, such that all searches are of one kind."""
    path = build_memory(tiny_model, CORPUS).path
    held_out = excerpts(8, 20, seed=1)
    for method in METHODS:
        options = {} if method == "suffix" else {"k": 16}
        opened = Memory.open(path)
        with gates_trained_at_once():
            tune(tiny_model, opened, held_out, method=method, tokenizer=TOKENIZER, **options)
    return Memory.open(path)


@pytest.fixture(scope="module")
def swept(tiny_model: PreTrainedModel, memory: Memory) -> Sweep:
    return sweep(tiny_model, memory, TEXT, min_knns=MIN_KNNS, skip=SKIPS, tokenizer=TOKENIZER)


def named(swept: Sweep) -> dict[tuple[str, str | None, float | None], Point]:
    return {(p.result.method, p.setting, p.value): p for p in swept.points}


# --- the rows -------------------------------------------------------------------------------------


def test_rows_are_every_setting_in_order(swept: Sweep) -> None:
    assert list(named(swept)) == [
        ("base", None, None),
        ("knn", None, None),
        ("knn", RANDOM_SKIP, 0.4),
        ("knn", RANDOM_SKIP, 1.0),
        ("retomaton", "min_knns", 1),
        ("retomaton", "min_knns", 3),
        ("retomaton", "min_knns", float("inf")),
        ("suffix", None, None),
        ("hybrid", "skip", 0.0),
        ("hybrid", "skip", 0.4),
        ("hybrid", "skip", 1.0),
    ]


@pytest.mark.slow
def test_rows_equal_evaluate(swept: Sweep, tiny_model: PreTrainedModel, memory: Memory) -> None:
    foss = []
    for (method, setting, value), point in named(swept).items():
        if setting == RANDOM_SKIP:
            continue
        given = {} if setting is None else {setting: value}
        base, alone = (
            evaluate(tiny_model, memory, TEXT, name, tokenizer=TOKENIZER, **options)
            for name, options in (("base", {}), (method, given))
        )
        result = point.result
        np.testing.assert_allclose(result.document_nll, alone.document_nll, rtol=1e-5)
        assert result.foss == alone.foss
        for name in ("nll", "nll_low", "nll_high", "ppl", "word_ppl", "bpb"):
            assert getattr(result, name) == pytest.approx(getattr(alone, name), rel=1e-5)
        for name in ("tokens", "lam", "temperature", "k"):
            assert getattr(result, name) == getattr(alone, name)
        if method != "base":
            assert result.delta_nll == pytest.approx(alone.nll - base.nll, abs=1e-5)
            assert result.delta_low <= result.delta_nll <= result.delta_high
            assert result.added_ms > 0
            foss.append(result.foss)
    assert len(set(foss)) > 4  # the settings do vary what is searched


def test_rows_with_passages_equal_evaluate(
    tiny_model: PreTrainedModel, memory: Memory, tmp_path: Path
) -> None:
    """Read once more by the model, and only then; time is counted from the plain reading."""
    names = ["knn", "in-context", "in-context+knn"]
    options = {"passage_tokens": 12, "passage_stride": 8, "query_tokens": 10}
    swept = sweep(tiny_model, memory, TEXT, names, skip=[0], tokenizer=TOKENIZER, **options)
    alone = [
        evaluate(tiny_model, memory, TEXT, name, tokenizer=TOKENIZER, **given)
        for name, given in [("base", {}), ("knn", {}), *((name, options) for name in names[1:])]
    ]
    points = [point.result for point in swept.points]
    assert [result.method for result in points] == ["base", *names]
    for result, expected in zip(points, alone, strict=True):
        np.testing.assert_allclose(result.document_nll, expected.document_nll, rtol=1e-5)
        assert result.foss == expected.foss
    base, _, passages, both = points
    assert passages.nll != base.nll
    reading = passages.added_ms * passages.tokens
    assert both.added_ms * both.tokens > reading  # the same reading, and what is looked up
    assert swept.untuned == ["in-context+knn"]
    report.write_report(tmp_path / "out", swept, memory)
    table = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert [row["method"] for row in csv.DictReader(table)] == ["base", *names]


def test_random_skipping_mixes_knn_and_base(swept: Sweep) -> None:
    """In closed form: a share of the predictions is the base model's, the rest kNN-LM's."""
    rows = named(swept)
    base, knn = rows["base", None, None].result, rows["knn", None, None].result
    for share in (0.4, 1.0):
        result = rows["knn", RANDOM_SKIP, share].result
        expected = (1 - share) * knn.document_nll + share * base.document_nll
        np.testing.assert_allclose(result.document_nll, expected)
        assert result.foss == share
        assert result.added_ms == pytest.approx((1 - share) * knn.added_ms)


@pytest.mark.slow
def test_time_is_the_own_and_that_of_the_searches_asked_for(
    tiny_model: PreTrainedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that only searching moves, a row's time is its searches times the mean."""
    now = [0.0]
    search = Memory.search

    def slow(self: Memory, queries: np.ndarray, *args: Any) -> Any:
        now[0] += 2.0 * len(queries)
        return search(self, queries, *args)

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(Memory, "search", slow)
    for module in (MethodRun.__module__, SearchCache.__module__):
        monkeypatch.setattr(f"{module}.time", clock)
    read = read_text(tiny_model, memory, TEXT, tokenizer=TOKENIZER)
    for point in sweep(tiny_model, memory, read, min_knns=MIN_KNNS, skip=SKIPS).points[1:]:
        result = point.result
        assert result.added_ms == pytest.approx(2000 * (1 - result.foss))
        assert result.tok_s * result.seconds == pytest.approx(result.tokens)


# --- one pass, one search -------------------------------------------------------------------------


def test_the_model_reads_once_and_each_query_is_searched_once(
    tiny_model: PreTrainedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: Counter[bytes] = Counter()
    search = Memory.search

    def counting(self: Memory, queries: np.ndarray, *args: Any) -> Any:
        searched.update(row.tobytes() for row in queries)
        return search(self, queries, *args)

    passes: Counter[str] = Counter()
    handle = tiny_model.register_forward_hook(lambda *_: passes.update(["forward"]))
    monkeypatch.setattr(Memory, "search", counting)
    try:
        evaluate(
            tiny_model, memory, TEXT, "base", tokenizer=TOKENIZER
        )  # also fingerprints the model
        passes.clear()
        evaluate(tiny_model, memory, TEXT, "base", tokenizer=TOKENIZER)
        once = passes.total()
        sweep(tiny_model, memory, TEXT, tokenizer=TOKENIZER, min_knns=MIN_KNNS, skip=SKIPS)
        assert passes.total() == 2 * once
    finally:
        handle.remove()
    assert set(searched.values()) == {1}
    keys = np.concatenate(
        [b.queries.keys for b in read_text(tiny_model, memory, TEXT, tokenizer=TOKENIZER).read]
    )
    assert set(searched) == {row.tobytes() for row in keys}


def test_what_is_remembered_at_a_time_changes_nothing(
    tiny_model: PreTrainedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    forget = SearchCache.forget

    def watched(self: SearchCache) -> None:
        most.append(sum(len(answers.by_query) for answers in self._answers.values()))
        forget(self)

    def swept() -> Sweep:
        methods = ["knn", "retomaton"]
        return sweep(tiny_model, memory, TEXT, methods, tokenizer=TOKENIZER, min_knns=[1], skip=[0])

    whole = swept()
    monkeypatch.setattr(SearchCache, "forget", watched)
    monkeypatch.setattr(sweep_module, "_REMEMBERED", 16)  # less than a document
    for one, other in zip(whole.points, swept().points, strict=True):
        np.testing.assert_allclose(one.result.document_nll, other.result.document_nll, rtol=1e-5)
        assert one.result.foss == other.result.foss
    assert max(most) == 16


def test_the_cache_answers_as_the_memory(memory: Memory, rng: np.random.Generator) -> None:
    queries = rng.normal(size=(9, memory.keys_record.dim)).astype(np.float32)
    cache = SearchCache(memory)
    for rows, k, distances, candidates in (
        ([0, 1, 1, 2], 5, "keys", 0),
        ([2, 3, 0], 3, "keys", 5),  # of one kind with the first
        ([4, 0], 3, "index", 5),
        (list(range(9)), 20, "keys", 0),
    ):
        asked = queries[rows]
        expected = memory.search(asked, k, distances, candidates)
        found = cache(asked, k, distances, candidates)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-6)
    assert {kind: answers.searched for kind, answers in cache._answers.items()} == {
        ("keys", 5): 4,
        ("index", 3): 2,
        ("keys", 20): 9,
    }
    assert cache.seconds_a_search(3, "keys", 5) == cache.seconds_a_search(5, "keys", 0) > 0
    assert cache.seconds_a_search(7, "keys", 0) == 0
    cache.restart_clock()
    assert cache.seconds_a_search(5, "keys", 0) == 0


# --- which methods and values ---------------------------------------------------------------------


def test_methods_not_named_are_those_that_were_tuned(
    swept: Sweep, tiny_model: PreTrainedModel, tiny_memory: Memory
) -> None:
    assert swept.untuned == []
    plain = sweep(tiny_model, tiny_memory, TEXT[:2], tokenizer=TOKENIZER, min_knns=[1], skip=[0])
    assert [p.result.method for p in plain.points] == ["base", "knn", "retomaton", "suffix"]
    assert plain.untuned == ["knn", "retomaton", "suffix"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["knn", "nonsense"]}, "'nonsense' is unknown"),
        ({"methods": ["base"]}, "at least one method"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["knn", "knn"]}, "only once"),
        ({"methods": ["knn+mixture"]}, "has no gate for knn.mixture: train it"),
        ({"methods": ["knn"], "min_knns": [1]}, "min_knns is given, but knn do"),
        ({"methods": ["retomaton"], "skip": [0.5]}, "skip is given, but"),
        ({"methods": ["retomaton"], "min_knns": []}, "no value of min_knns"),
        ({"methods": ["retomaton"], "min_knns": [-1]}, "min_knns must be at least 0"),
        ({"methods": ["retomaton"], "min_knns": [math.nan]}, "min_knns must be at least 0"),
        ({"methods": ["knn"], "skip": [1.5]}, r"skip must lie inside \[0, 1\]"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_reads(
    tiny_model: PreTrainedModel,
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    call_fails(monkeypatch, scoring.Scorer, "prepare", 1, AssertionError("read"))
    with pytest.raises(SettingError, match=message):
        sweep(tiny_model, memory, TEXT, **options)


def test_without_keys_there_is_suffix_matching_alone(
    tiny_model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    bare = build_memory(tiny_model, keys="none")
    points = sweep(tiny_model, bare, TEXT[:2], tokenizer=TOKENIZER).points
    assert [point.result.method for point in points] == ["base", "suffix"]
    for method in ("knn", "retomaton"):
        with pytest.raises(SettingError, match="has no keys"):
            sweep(tiny_model, bare, TEXT[:2], [method], tokenizer=TOKENIZER)


# --- the report -----------------------------------------------------------------------------------


def test_csv_parses_back(swept: Sweep) -> None:
    rows = list(csv.DictReader(report.as_csv(swept.points).splitlines()))
    assert list(rows[0]) == ["method", "setting", "value", *EVAL_KEYS[1:]]
    for row, point in zip(rows, swept.points, strict=True):
        for name, value in point.to_dict().items():
            assert row[name] == ("" if value is None else str(value))
        assert row["value"] == "" or float(row["value"]) == point.value
        assert float(row["ppl"]) == pytest.approx(point.result.ppl)


@pytest.mark.parametrize("published", [[], ["law-mt"], ["wikitext-103", "law-mt", "law-mt"]])
def test_report_is_self_contained(
    swept: Sweep, memory: Memory, tmp_path: Path, published: list[str]
) -> None:
    beside = published_named(published)
    report.check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    report.write_report(tmp_path / "a" / "b", swept, memory, beside)
    assert set(snapshot(tmp_path / "a" / "b")) == {"sweep.csv", "sweep.png", "sweep.html"}
    html = (tmp_path / "a" / "b" / "sweep.html").read_text("utf-8")
    assert_self_contained(html.replace("http://www.w3.org/", ""))  # names in SVG, nothing to fetch
    assert html.count("<svg ") == 2 + bool(beside)
    assert str(memory.path.parent) not in html
    text = " ".join(Page(html).text.split())
    assert f"{swept.points[0].result.ppl:.1f} → " in text
    for one in PUBLISHED.values():
        assert (f"RetoMaton, {one.corpus} (published)" in text) == (one in beside)
    png = imread(tmp_path / "a" / "b" / "sweep.png")
    height, width, _ = png.shape
    assert width > (3 if beside else 2) * height * 0.9
    assert 0.5 < png.mean() < 0.999  # drawn on light ground


def test_page_says_every_setting_and_how_time_is_counted(swept: Sweep, memory: Memory) -> None:
    text = " ".join(Page(render(swept, memory)).text.split())
    for point in swept.points:
        assert f"{point.result.ppl:.2f}" in text
    for phrase in (
        "min_knns ∞",
        "40 % at random",
        "the memory has none",
        "plus the number of searches that it asks for times the mean time of one in this sweep",
    ):
        assert phrase in text
    assert "Not tuned" not in text
    best = dataclasses.replace(swept.points[1].result, nll=0.0, ppl=1.0)
    with_search = [swept.points[0], Point(None, None, best), *swept.points[2:]]
    said = Page(render(dataclasses.replace(swept, points=with_search), memory)).text
    assert "the lowest is 1.0, by knn at FoSS 0.00" in said
    assert "Without any search it is" in said
    untuned = Sweep(swept.points, swept.search_ms, ["knn"])
    assert "with default settings: knn." in Page(render(untuned, memory)).text


def test_published_curves_that_are_not_known() -> None:
    with pytest.raises(SettingError, match="'enwik8': choose among wikitext-103, law-mt"):
        published_named(["enwik8"])


@pytest.mark.slow
def test_an_earlier_report_is_replaced_and_nothing_else_touched(
    swept: Sweep, memory: Memory, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    report.write_report(out, swept, memory)
    (out / "sweep.png.partial").write_bytes(b"killed")
    report.check_folder(out)
    report.write_report(out, swept, memory)
    assert set(snapshot(out)) == {"sweep.csv", "sweep.png", "sweep.html"}

    for name, content in (("notes.txt", "mine"), ("sweep.csv", "mine,too\n1,2\n")):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text(content)
        with pytest.raises(FolderError, match=f"holds {name}, which is not of an earlier sweep"):
            report.check_folder(other)
        assert snapshot(other) == {name: content.encode()}

    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for inside in ("file", "file/below", "link"):
        with pytest.raises(FolderError, match="is not a folder"):
            report.check_folder(tmp_path / inside)


def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may all
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(FolderError, match=f"{tmp_path} cannot be written to"):
            report.check_folder(out)


def test_a_failing_disk_leaves_the_earlier_report(
    swept: Sweep, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write_report(tmp_path, swept, memory)
    before = snapshot(tmp_path)
    full = OSError(28, os.strerror(28))
    call_fails(monkeypatch, os, "fsync", 1, full)
    with pytest.raises(FolderError, match="the disk is full"):
        report.write_report(tmp_path, swept, memory)
    assert snapshot(tmp_path) == before


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearest.errors.find_spec", lambda name: None)
    with pytest.raises(NearestError, match=r"matplotlib .* pip install '\.\[plots\]'"):
        report.check_folder(tmp_path)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, memory: Memory, model_folder: str
) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sweep")
    text = write_jsonl(folder / "text.jsonl", TEXT)
    return SimpleNamespace(text=text, run=[memory.path, "--model", model_folder, "--text", text])


@pytest.mark.slow
def test_the_command_prints_what_it_writes(world: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ["--methods", "retomaton, suffix", "--min-knns", "2,inf", "--published", "law-mt"]
    records = json_lines("sweep", *world.run, "--out", out, *options)
    assert [(r["method"], r["setting"], r["value"]) for r in records] == [
        ("base", None, None),
        ("retomaton", "min_knns", 2.0),
        ("retomaton", "min_knns", "inf"),
        ("suffix", None, None),
    ]
    assert list(records[0]) == ["method", "setting", "value", *EVAL_KEYS[1:]]
    written = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [json.loads(row["ppl"]) for row in written] == [record["ppl"] for record in records]
    assert "(published)" in (out / "sweep.html").read_text()
    shown = invoke("sweep", *world.run, "--out", out, *options)
    assert shown.code == 0
    assert str(out / "sweep.html") in shown.err.replace("\n", "")
    for record in records:
        assert f"{record['ppl']:.2f}" in shown.out
    assert "min_knns inf" in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "nonsense"], "method 'nonsense' is unknown"),
        (["--methods", "knn+mixture"], "has no gate for knn+mixture: train it with `nearest tune"),
        (["--min-knns", "1,many"], "--min-knns '1,many' is no list of numbers"),
        (["--published", "enwik8"], "no published figures are called 'enwik8'"),
    ],
)
def test_the_command_explains(
    world: SimpleNamespace, tmp_path: Path, options: list[str], message: str
) -> None:
    result = invoke("sweep", *world.run, "--out", tmp_path / "report", *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "report").exists()


def test_the_command_explains_folders_and_texts(world: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = invoke("sweep", *world.run, "--out", tmp_path)
    assert refused.code == 2
    assert "holds notes.txt, which is not of an earlier sweep" in " ".join(refused.err.split())
    missing = invoke("sweep", *world.run[:-1], tmp_path / "none.jsonl", "--out", tmp_path / "new")
    assert missing.code == 2
    assert "none.jsonl" in missing.err.replace("\n", "")
    assert not (tmp_path / "new").exists()
