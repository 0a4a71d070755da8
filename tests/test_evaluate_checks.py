"""What `evaluate` says beside its figures: leaks, harm, neighbours that know nothing, records."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import PreTrainedModel

from conftest import (
    FULL,
    gates_trained_at_once,
    in_two_segments,
    make_documents,
    make_tokenizer,
    snapshot,
)
from nearest import Document, Memory, NearestError, evaluate, read_text, tune
from nearest import errors as errors_module
from nearest.encode import encoder
from nearest.errors import FolderError, SettingError
from nearest.models.method_run import heaviest_entries
from nearest.verbs.checks import harm_of
from nearest.verbs.leak import SPAN, Leak
from oracle import keys_and_logits, stored_pairs
from test_bad_input import invoke, works

TOKENIZER = make_tokenizer()
CORPUS = make_documents(12, 40)
TEXT = make_documents(5, 40, seed=1)
GIVEN = {"lam": 0.4, "temperature": 30.0, "k": 9}


@pytest.fixture(scope="module")
def memory(tiny_model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    """With a gate for `hybrid`."""
    built = build_memory(tiny_model, CORPUS)
    text = make_documents(6, 14, seed=4)
    with gates_trained_at_once():
        tune(tiny_model, built, text, method="hybrid", k=9, tokenizer=TOKENIZER)
    return Memory.open(built.path)


def scored(model: PreTrainedModel, memory: Memory | None, text: Any = TEXT, **options: Any) -> Any:
    return evaluate(model, memory, text, **{"tokenizer": TOKENIZER, **options})


# --- what of the text stands in the memory --------------------------------------------------------


def brute_force(corpus: list[Document], text: list[Document]) -> Leak:
    """By the sets of all documents and of all spans; a token of these texts is a byte."""
    texts = {document.text for document in corpus}
    spans = {t[i : i + SPAN] for t in texts for i in range(len(t) - SPAN + 1)}
    whole, partly, tokens = [], [], 0
    for document in text:
        ends = [
            end
            for end in range(SPAN, len(document.text) + 1)
            if document.text[end - SPAN : end] in spans
        ]
        covered = {position for end in ends for position in range(end - SPAN, end)}
        tokens += len(covered)
        if document.text in texts:
            whole.append(document.id)
        elif covered:
            partly.append(document.id)
    return Leak(tuple(whole), tuple(partly), tokens)


def mixed_text() -> list[Document]:
    """Whole documents, spans of just enough and of one too few tokens, ends and beginnings."""
    long = next(d.text for d in CORPUS if len(d.text) > 2 * SPAN)
    short = next(d.text for d in CORPUS if len(d.text) < SPAN)
    made = [
        *(long, short, long + "!", "!" + long, long[:SPAN], "!" + long[5 : 5 + SPAN] + "!"),
        *(long[-SPAN:], "!" + long[-SPAN:] + "!", long[: SPAN - 1] + "!", "!" + long[-SPAN + 1 :]),
        *("!" + long[3 : SPAN + 20] + "!" + long[20 : SPAN + 30], "nothing of it stands there"),
    ]
    return [Document(f"t{i}", text) for i, text in enumerate(made)]


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"score_eos": True}], ids=str)
def test_what_stands_in_the_memory_is_found(
    tiny_model: PreTrainedModel, memory: Memory, options: dict[str, bool]
) -> None:
    text = [*mixed_text(), *TEXT]
    expected = brute_force(CORPUS, text)
    assert expected.whole == ("t0", "t1")
    assert expected.partly[:6] == ("t2", "t3", "t4", "t5", "t6", "t7")
    for result in scored(tiny_model, memory, text, method=["base", "suffix"], **options):
        assert result.checks.leak == expected
    leak = result.to_dict()["leak"]
    ids = [*expected.whole, *expected.partly]
    assert leak == {
        "documents": 2,
        "documents_partly": len(ids) - 2,
        "tokens": expected.tokens,
        "span": 50,
        "ids": ids,
    }


def test_what_is_left_out_is_no_leak(tiny_model: PreTrainedModel, memory: Memory) -> None:
    text = mixed_text()
    expected = brute_force(CORPUS, text[2:])
    given = {"method": "base", "leave_one_out": True}
    assert scored(tiny_model, memory, text, **given).checks.leak == expected
    assert scored(tiny_model, memory, text[:2], **given).checks.leak == Leak((), (), 0)
    read = read_text(tiny_model, memory, text, tokenizer=TOKENIZER, leave_one_out=True)
    assert scored(tiny_model, memory, read, method="base").checks.leak == expected


def test_a_text_that_was_read_leaves_out_what_it_was_read_for(
    tiny_model: PreTrainedModel, memory: Memory, build_memory: Callable[..., Memory]
) -> None:
    text, own = mixed_text(), {"tokenizer": TOKENIZER, "leave_one_out": True}
    with pytest.raises(SettingError, match="give leave_one_out to read_text"):
        evaluate(
            tiny_model, memory, read_text(tiny_model, memory, text, tokenizer=TOKENIZER), **own
        )
    read = read_text(tiny_model, memory, text, **own)
    assert evaluate(tiny_model, memory, read, **own).nll > 0
    other = build_memory(tiny_model, make_documents(4, 9))
    for memories in (other, [memory, other]):
        with pytest.raises(SettingError, match="without its own entries"):
            evaluate(tiny_model, memories, read)


def test_leaks_of_several_segments_and_not_of_removed_documents(
    tiny_model: PreTrainedModel, build_memory: Callable[..., Memory], tmp_path: Path
) -> None:
    parts = [build_memory(tiny_model, CORPUS[:6]), build_memory(tiny_model, CORPUS[6:])]
    memory = in_two_segments(parts, tmp_path / "two.memory")
    text = [replace(d, id=f"again {d.id}") for d in CORPUS]
    found = scored(tiny_model, memory, text, method="base").checks.leak
    assert found == brute_force(CORPUS, text)
    fewer = memory.remove([CORPUS[1].id, CORPUS[9].id])
    left = [d for n, d in enumerate(CORPUS) if n not in (1, 9)]
    assert scored(tiny_model, fewer, text, method="base").checks.leak == brute_force(left, text)


def test_token_arrays_are_named_by_number(tiny_model: PreTrainedModel, memory: Memory) -> None:
    arrays = [np.array([0, 7, 8]), memory.document_tokens(3).astype(int)]
    assert scored(tiny_model, memory, arrays, method="base").checks.leak.whole == ("1",)


def test_without_a_memory_nothing_is_checked(tiny_model: PreTrainedModel) -> None:
    result = scored(tiny_model, None, method="base", window=64, stride=32)
    checks = result.checks
    assert (checks.leak, checks.harm, checks.neighbours) == (None, None, None)


# --- where it harms -------------------------------------------------------------------------------


def test_harm_by_hand() -> None:
    losses = np.array([0.5, -1.0, 0.0005, 0.1, math.inf, math.nan])
    harm = harm_of(losses[:4], np.array([0, 0, 1, 2]), ["a", "b", "c"])
    assert (harm.fraction, harm.p99) == (0.5, 0.5)
    assert harm.mean == pytest.approx(0.3)
    assert harm.documents == (("c", pytest.approx(0.1)),)
    endless = harm_of(losses[4:], np.array([0, 1]), ["a", "b"]).to_dict()
    assert endless == {
        "fraction": 0.5, "mean": None, "p99": None, "documents": [{"id": "a", "nll": None}],
    }  # fmt: skip
    none = harm_of(np.array([-1.0]), np.array([0]), ["a"])
    assert (none.fraction, none.mean, none.p99, none.documents) == (0.0, 0.0, -1.0, ())


def test_harm_is_of_the_records(tiny_model: PreTrainedModel, memory: Memory) -> None:
    seen: list[Mapping[str, np.ndarray]] = []
    result = scored(tiny_model, memory, method="knn", records=seen.append, **GIVEN)
    losses = np.concatenate([part["nll"] - part["base_nll"] for part in seen])
    names = np.concatenate([part["document"] for part in seen])
    harm = result.checks.harm
    assert harm.fraction == (losses > 1e-3).mean()
    assert harm.mean == pytest.approx(losses[losses > 1e-3].mean(), rel=1e-5)
    assert harm.p99 == np.sort(losses)[math.ceil(0.99 * (len(losses) - 1))]
    means = {str(name): float(losses[names == name].mean()) for name in set(names)}
    worst = sorted((loss, name) for name, loss in means.items() if loss > 1e-3)[::-1][:3]
    assert [name for name, _ in harm.documents] == [name for _, name in worst]


# --- neighbours that know nothing -----------------------------------------------------------------


def test_neighbours_are_judged_by_what_they_give(
    tiny_model: PreTrainedModel, memory: Memory
) -> None:
    """Of λ, what falls on the token that came, from the mixture's own definition."""
    seen: list[Mapping[str, np.ndarray]] = []
    result = scored(tiny_model, memory, method="knn", records=seen.append, **GIVEN)
    nll, base = (np.concatenate([part[name] for part in seen]) for name in ("nll", "base_nll"))
    right = (np.exp(-nll) - 0.6 * np.exp(-base)) / 0.4
    neighbours = result.checks.neighbours
    assert neighbours.right == pytest.approx(right.mean(), rel=1e-4)
    assert 0 < neighbours.chance < neighbours.right / 2
    assert not neighbours.useless


def test_a_memory_with_shuffled_keys_is_said_to_be_useless(
    tiny_model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    original = encoder.encode_keys

    def shuffled(*arguments: Any) -> torch.Tensor:
        keys = original(*arguments)
        return keys[torch.from_numpy(rng.permutation(len(keys)))]

    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode_keys", shuffled)
        memory = build_memory(tiny_model, CORPUS)
    base, knn, suffix = scored(tiny_model, memory, method=["base", "knn", "suffix"], **GIVEN)
    assert base.checks.neighbours is None
    assert knn.checks.neighbours.useless
    assert knn.to_dict()["useless_neighbours"]
    assert not suffix.checks.neighbours.useless  # they match text, whatever the keys are
    nothing = scored(tiny_model, memory, method="knn", lam=0.0)
    assert nothing.checks.neighbours is None
    few = [Document("few", "the law of the court")]
    assert not scored(tiny_model, memory, few, method="knn", **GIVEN).checks.neighbours.useless
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0].text * 3)
    for more in ([], ["--json"]):
        shown = invoke("eval", memory.path, "--text", text, "--model", model_folder, *more)
        assert shown.code == 0
        assert shown.err.count("note: the neighbours of knn are useless: of their weight") == 1
        assert "Usual causes" in shown.err
        assert "useless" not in shown.out or more


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_records_sum_up_to_what_is_reported(
    tiny_model: PreTrainedModel,
    memory: Memory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    """In every method, and in files of several blocks; each token once, in its order."""
    monkeypatch.setattr(encoder, "_GROUP_BYTES", 1)
    methods = ["base", "knn", "retomaton", "suffix", "hybrid"]
    path = tmp_path / "out.parquet"
    text = make_documents(3, 14, seed=1)
    given = {"text": text, "temperature": 30.0, "k": 9, "batch_size": 1, "stream": stream}
    plain = scored(tiny_model, memory, method=["base", "knn"], **given)
    results = scored(tiny_model, memory, method=methods, records=path, **given)
    assert [one.nll for one in plain] == [one.nll for one in results[:2]]
    table = parquet.read_table(path)
    assert parquet.ParquetFile(path).num_row_groups > len(methods)
    names = np.array(table["method"].to_pylist())
    columns = {name: table[name].to_numpy() for name in table.column_names}
    documents = np.repeat([d.id for d in text], [len(d.text) for d in text])
    positions = np.concatenate([np.arange(1, len(d.text) + 1) for d in text])
    tokens = np.concatenate([TOKENIZER(d.text)["input_ids"] for d in text])
    for result in results:
        own = {name: values[names == result.method] for name, values in columns.items()}
        assert own["document"].tolist() == documents.tolist()
        assert own["position"].tolist() == positions.tolist()
        assert own["token"].tolist() == tokens.tolist()
        assert own["nll"].sum(dtype=float) / result.tokens == pytest.approx(result.nll, rel=1e-12)
        base = own["base_nll"].sum(dtype=float) / result.tokens
        assert base == pytest.approx(results[0].nll, rel=1e-12)
        assert ((own["lam"] >= 0) & (own["lam"] <= 1)).all()
        left = own["base_nll"] - np.log1p(-own["lam"].astype(float))
        assert (own["nll"] <= left + 1e-4).all()  # the memory's own share can only add
        sourced = own["source"] != None  # noqa: E711  by element
        assert (np.isnan(own["source_position"]) == ~sourced).all()
        assert sourced.any() == (result.method != "base")
        assert (sourced <= (own["lam"] > 0)).all()
    base = {name: values[names == "base"] for name, values in columns.items()}
    assert not base["lam"].any()
    assert np.isnan(base["distance"]).all()
    assert base["nll"].tolist() == base["base_nll"].tolist()


def test_records_equal_brute_force(tiny_model: PreTrainedModel, memory: Memory) -> None:
    """Distance and heaviest entry by comparing with every key; entropy from the logits."""
    document = TEXT[2]
    seen: list[Mapping[str, np.ndarray]] = []
    scored(tiny_model, memory, [document], method="knn", records=seen.append, **GIVEN)
    (found,) = seen
    tokens = torch.tensor([0, *TOKENIZER(document.text)["input_ids"]])[:64]  # the first window
    keys, logits = keys_and_logits(tiny_model, tokens[:-1])
    ids, stored, _ = stored_pairs(memory)
    for row, query in enumerate(keys.double().numpy()):
        distances = ((stored - query) ** 2).sum(1)
        assert found["distance"][row] == pytest.approx(distances.min(), rel=1e-3, abs=1e-3)
        nearest = memory.place(int(ids[distances.argmin()]))
        if np.sort(distances)[1] > distances.min() + 0.1:  # else either may be taken
            assert found["source"][row] == memory.document(nearest.document).id
            assert found["source_position"][row] == nearest.position
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    np.testing.assert_allclose(found["entropy"][: len(entropy)], entropy, rtol=1e-4)
    assert (found["lam"] == np.float32(0.4)).all()


def test_the_guards_weight_is_in_lam(tiny_model: PreTrainedModel, memory: Memory) -> None:
    """Its log-odds are what the memory gained on the document's tokens before."""
    runs: dict[bool, dict[str, np.ndarray]] = {}
    for guard in (False, True):
        seen: list[Mapping[str, np.ndarray]] = []
        options = {"records": seen.append, "guard": guard, **GIVEN}
        scored(tiny_model, memory, TEXT[1:2], method="knn", **options)
        runs[guard] = dict(seen[0])
    gains = (runs[False]["base_nll"] - runs[False]["nll"]).astype(float)
    before = np.cumsum(gains) - gains
    np.testing.assert_allclose(runs[True]["lam"], 0.4 / (1 + np.exp(-before)), rtol=1e-4)


weighed_entries = st.tuples(st.integers(-1, 3), st.integers(0, 3))


@given(
    st.integers(0, 6).flatmap(
        lambda n: st.lists(st.lists(weighed_entries, min_size=n, max_size=n), min_size=1)
    )
)
def test_heaviest_entries_by_hand(rows: list[list[tuple[int, int]]]) -> None:
    rows = [[(entry, 0 if entry < 0 else weight) for entry, weight in row] for row in rows]
    expected = []
    for row in rows:
        totals: dict[int, int] = {}
        for entry, weight in row:
            totals[entry] = totals.get(entry, 0) + weight
        best = max(totals.values(), default=0)
        heaviest = min((e for e, t in totals.items() if t == best), default=-1) if best else -1
        expected.append((heaviest, best))
    shape = len(rows), len(rows[0])
    ids = np.array([[entry for entry, _ in row] for row in rows], np.int64).reshape(shape)
    weights = np.array([[weight for _, weight in row] for row in rows], np.float32).reshape(shape)
    found = heaviest_entries(ids, weights)
    assert [*zip(*(part.tolist() for part in found), strict=True)] == expected


def test_records_without_keys_have_no_distance(
    tiny_model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    textual = build_memory(tiny_model, CORPUS, keys="none")
    seen: list[Mapping[str, np.ndarray]] = []
    scored(tiny_model, textual, method="suffix", window=64, stride=32, records=seen.append)
    assert np.isnan(seen[0]["distance"]).all()
    assert (seen[0]["source_position"] >= 0).any()


def test_a_run_that_fails_leaves_the_records_of_before(
    tiny_model: PreTrainedModel, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.parquet"
    scored(tiny_model, memory, method="base", records=path)
    before = snapshot(tmp_path)
    calls = []

    def interrupted(_stage: str, done: int, _total: int | None) -> None:
        calls.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(tiny_model, memory, method="knn", records=path, progress=interrupted)
    assert calls
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(FULL))
    with pytest.raises(FolderError, match="the disk is full"):
        scored(tiny_model, memory, method="knn", records=path)
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    scored(tiny_model, memory, method="knn", records=path, **GIVEN)
    assert set(parquet.read_table(path)["method"].to_pylist()) == {"knn"}


def test_records_on_a_full_device(
    tiny_model: PreTrainedModel, memory: Memory, tmp_path: Path
) -> None:
    """The device itself, in the place of the file that is written."""
    (tmp_path / "out.parquet.partial").symlink_to("/dev/full")
    with pytest.raises(FolderError, match="the disk is full"):
        scored(tiny_model, memory, method="base", records=tmp_path / "out.parquet")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/out.parquet", "missing does not exist"),
        ("folder", "is a folder"),
        ("notes.txt", "is no Parquet file"),
        ("empty", "is no Parquet file"),
    ],
)
def test_places_that_records_are_not_written_to(
    memory: Memory, model_folder: str, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").touch()
    before = snapshot(tmp_path)
    arguments = ["--text", tmp_path / "notes.txt", "--model", model_folder]
    shown = invoke("eval", memory.path, *arguments, "--records", tmp_path / name)
    assert (shown.code, shown.out) == (2, "")
    assert message in " ".join(shown.err.split())
    assert snapshot(tmp_path) == before


def test_records_need_pyarrow(
    tiny_model: PreTrainedModel, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors_module, "find_spec", lambda _: None)
    with pytest.raises(NearestError, match=r"pip install '\.\[data\]'"):
        scored(tiny_model, memory, records=tmp_path / "out.parquet")
    assert snapshot(tmp_path) == {}


def test_the_report_says_it_all(memory: Memory, model_folder: str, tmp_path: Path) -> None:
    text, records = tmp_path / "text.jsonl", tmp_path / "out.parquet"
    documents = [*mixed_text(), *TEXT]
    text.write_text("\n".join(json.dumps({"id": d.id, "text": d.text}) for d in documents))
    options = ["--text", text, "--model", model_folder, "--k", 1, "--lam", 0.999, "--stream"]
    base, knn = works("eval", memory.path, *options, "--records", records)
    assert parquet.read_metadata(records).num_rows == 2 * base["tokens"]
    shown = " ".join(invoke("eval", memory.path, *options).out.split())
    harm, leak = knn["harm"], base["leak"]
    assert f"knn is worse than the base model at {harm['fraction']:.1%} of the tokens" in shown
    assert harm["documents"]
    for worst in harm["documents"]:
        assert f"{worst['id']} ({worst['nll']:+.3f} a token)" in shown
    share = leak["tokens"] / base["tokens"]
    assert f"2 of 17 documents stand in the memory whole, and {share:.1%} of the tokens" in shown
    assert "(t0, t1, t2, t3, t4, …); --leave-one-out leaves out" in shown
