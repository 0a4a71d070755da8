"""Self-tuning: a memory's own text, predicted as if it were not in the memory."""

import math
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import make_documents, random_documents
from nearest import Memory, attach, evaluate, tune
from nearest.build.build import store_settings
from nearest.build.compress import Compression, compress_memory
from nearest.cli import app
from nearest.corpus.documents import Document
from nearest.errors import FolderError, NotStoredError, SettingError, SettingsWarning
from nearest.folder import writer_lock
from nearest.models.scoring import read_text
from nearest.retrieval.gates.mixture import MixtureConfig
from nearest.retrieval.gates.shipped import read_gate, shipped_gate, write_gate
from nearest.retrieval.gates.stored import load_gate
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import Settings, method_named
from nearest.verbs import self_tune as module
from nearest.verbs.mixture_examples import mixture_examples
from nearest.verbs.self_tune import self_tune
from nearest.verbs.settings_search import looked_up
from nearest.verbs.sweep import sweep
from nearest.verbs.tune import store_tuned

DOCUMENTS = make_documents(30, 40)
HELD_OUT = make_documents(10, 40, seed=1)


@pytest.fixture
def memory(build_memory: Callable[..., Memory], tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, DOCUMENTS)


def test_what_is_held_out_is_as_in_a_memory_without_the_document(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel, memory: Memory
) -> None:
    """The nearest entries of each document are those of the memory after it was removed."""
    without = build_memory(tiny_model, DOCUMENTS).remove([DOCUMENTS[0].id])
    entries = memory.entries_of(0)
    assert entries.start == 0
    np.testing.assert_array_equal(memory.places(np.array(entries))[0], 0)
    assert memory.places(np.array([entries.stop + 1]))[0].tolist() == [1]
    tokens = [memory.document_tokens(0).astype(np.int64)]
    settings = Settings(k=16)

    def found(one: Memory, k: int) -> Any:
        read = read_text(tiny_model, one, tokens)
        lookup = Lookup(one, "knn", Settings(k=k))
        return read, next(looked_up(lookup, read.read, lambda *_: None, "", 1))

    _, wide = found(memory, settings.k + len(entries))
    _, expected = found(without, settings.k)
    own = np.repeat([[entries.start, entries.stop]], len(wide.rows), axis=0)
    held_out = module._held_out(wide, own, np.ones(len(own), dtype=bool), settings)
    left = held_out.view.candidates
    assert not ((left.ids >= entries.start) & (left.ids < entries.stop)).any()
    wanted = expected.view.candidates
    np.testing.assert_allclose(left.distances, wanted.distances, rtol=1e-4, atol=1e-3)


def test_where_all_candidates_are_the_documents_own_nothing_is_left(memory: Memory) -> None:
    tokens = [memory.document_tokens(0).astype(np.int64)]
    assert len(tokens[0]) > 2
    entries = memory.entries_of(0)
    ids = np.array([list(entries)[:3]])
    own = np.array([[entries.start, entries.stop]])
    assert module._of_own(ids, own).all()


def test_copies_are_told_from_texts_that_share_words(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel
) -> None:
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, 90).tolist()).decode() for _ in range(6)]
    copy = texts[2][:80] + "and then an end"
    memory = build_memory(
        tiny_model, [Document(str(i), text) for i, text in enumerate([*texts, copy])]
    )
    numbers = range(memory.documents)
    tokens = [memory.document_tokens(i).astype(np.int64) for i in numbers]
    own = np.array([(memory.entries_of(i).start, memory.entries_of(i).stop) for i in numbers])
    copied = module._copied(memory, read_text(tiny_model, memory, tokens), own)
    assert np.flatnonzero(copied).tolist() == [2, 6]


@pytest.mark.slow
def test_self_tuned_settings_are_near_those_of_held_out_text(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert memory.settings_from("knn") == "defaults"
    assert self_tune(tiny_model, memory, tiny_tokenizer)
    options = {"tokenizer": tiny_tokenizer}
    methods = ("knn", "suffix", "hybrid")
    assert {memory.settings_from(method) for method in methods} == {"self-tuned"}
    assert memory.settings_from("retomaton") == "defaults"
    assert Memory.open(memory.path).settings("knn") == memory.settings("knn")
    base, *own, hybrid = evaluate(tiny_model, memory, HELD_OUT, ["base", *methods], **options)
    assert hybrid.settings_from == "self-tuned"
    assert hybrid.nll < base.nll
    for method, result in zip(("knn", "suffix"), own, strict=True):
        tuned = tune(tiny_model, memory, HELD_OUT, method=method, store=False, **options)
        assert result.nll < tuned.nll + np.log(1.05)
        assert result.nll < base.nll
    stored = memory.settings("suffix")
    assert stored["suffix_k"] == Settings().suffix_k
    tune(tiny_model, memory, HELD_OUT, **options)
    assert memory.settings_from("knn") == "tuned"
    assert memory.settings_from("suffix") == "self-tuned"


@pytest.mark.parametrize(
    "documents", [DOCUMENTS[:1], DOCUMENTS[:4], make_documents(6, 3), [Document("a", "short")]]
)
def test_little_text_tells_only_what_distances_mean_to_hybrid(
    documents: list[Document],
    build_memory: Callable[..., Memory],
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    memory = build_memory(tiny_model, documents)
    assert self_tune(tiny_model, memory)
    assert {m: memory.settings_from(m) for m in ("knn", "suffix", "hybrid")} == {
        "knn": "defaults", "suffix": "defaults", "hybrid": "self-tuned",
    }  # fmt: skip
    evaluate(tiny_model, memory, HELD_OUT, "hybrid", tokenizer=tiny_tokenizer)


def test_without_keys_little_text_tells_nothing(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel
) -> None:
    memory = build_memory(tiny_model, DOCUMENTS[:4], keys="none")
    assert not self_tune(tiny_model, memory)
    assert memory.manifest.settings == {}


def test_the_own_entries_of_predictions_are_where_their_tokens_stand(
    memory: Memory, tiny_model: PreTrainedModel
) -> None:
    sample = module._Sample.of(tiny_model, memory, None, lambda *_: None)
    read = sample.read
    lookup = Lookup(memory, "knn", Settings(k=4))
    for one in looked_up(lookup, read.read, lambda *_: None, "", 1):
        entries = sample.entries(one)
        np.testing.assert_array_equal(entries[:, 1], entries[:, 0] + 1)
        np.testing.assert_array_equal(memory.values(entries[:, 0]), one.targets)
        nearest = memory.key_distances(one.view.queries.keys, entries[:, :1])
        assert nearest.max() < 1e-2  # the key is the query itself


def test_a_large_document_is_predicted_without_its_parts_and_their_neighbours(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel, monkeypatch: Any
) -> None:
    """Among smaller ones, which are left out whole; parts are of 500 tokens, here of 20."""
    monkeypatch.setattr(module, "_PART", 20)
    book = " ".join(document.text for document in make_documents(12, 40, seed=1))
    memory = build_memory(tiny_model, [*DOCUMENTS[:3], Document("book", book), *DOCUMENTS[3:6]])
    entries = memory.entries_of(3)
    share = len(entries) / memory.entries
    assert 0.5 < share < 0.9
    sample = module._Sample.of(tiny_model, memory, None, lambda *_: None)
    parts = [piece for piece in sample.pieces if piece.document == 3]
    assert len(parts) == math.ceil(share * module._FEW_PREDICTIONS / 20)
    firsts = {piece.first for piece in parts}
    assert len(firsts) == len(parts)
    assert firsts <= set(entries[::20])
    for piece in parts:
        last = min(piece.first + 20, entries.stop)
        assert piece.own == (max(piece.first - 20, entries.start), min(last + 20, entries.stop))
    others = {piece.own for piece in sample.pieces if piece.document != 3}
    smaller = [memory.entries_of(i) for i in range(memory.documents) if i != 3]
    assert others
    assert others <= {(one.start, one.stop) for one in smaller}
    assert sample.enough
    for one in looked_up(
        Lookup(memory, "knn", Settings(k=4)), sample.read.read, lambda *_: None, "", 1
    ):
        np.testing.assert_array_equal(memory.values(sample.entries(one)[:, 0]), one.targets)


def test_a_document_that_is_large_and_short_tells_nothing_as_new_text(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel
) -> None:
    """Without it little of the memory would be left."""
    memory = build_memory(tiny_model, [*DOCUMENTS[:8], Document("long", "court of law " * 60)])
    sample = module._Sample.of(tiny_model, memory, None, lambda *_: None)
    shares = [len(memory.entries_of(piece.document)) / memory.entries for piece in sample.pieces]
    assert max(shares) > 0.2
    assert sample.kept.tolist() == [share <= 0.2 for share in shares]


@pytest.mark.slow
def test_a_single_book_tunes_itself(
    build_memory: Callable[..., Memory],
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    book = " ".join(document.text for document in make_documents(100, 40, seed=1))
    memory = build_memory(tiny_model, [Document("book", book)])
    assert memory.entries > 7_500
    assert self_tune(tiny_model, memory)
    assert {memory.settings_from(m) for m in ("knn", "suffix", "hybrid")} == {"self-tuned"}
    results = evaluate(
        tiny_model, memory, HELD_OUT, ["base", "knn", "hybrid"], tokenizer=tiny_tokenizer
    )
    base, *own = [result.nll for result in results]
    assert max(own) < base


def test_copies_do_not_count_as_text(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel
) -> None:
    rng = np.random.default_rng(0)
    copied, other = (bytes(rng.integers(33, 127, n).tolist()).decode() for n in (60, 20))
    documents = [Document(f"copy-{i}", copied) for i in range(10)]
    memory = build_memory(tiny_model, [*documents, Document("other", other)])
    self_tune(tiny_model, memory)
    assert memory.settings_from("knn") == "defaults"


@pytest.mark.slow
def test_building_ends_with_it_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch,
    build_memory: Callable[..., Memory],
    tiny_model: Any,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    monkeypatch.setattr(module, "self_tune", self_tune)
    untuned = build_memory(tiny_model, DOCUMENTS, tune=False)
    assert untuned.manifest.settings == {}
    with pytest.raises(SettingError, match=r"no gate for hybrid: train it.*--method hybrid"):
        evaluate(tiny_model, untuned, HELD_OUT, "hybrid", tokenizer=tiny_tokenizer)
    for keys, methods in (("fp16", {"knn", "suffix", "hybrid"}), ("none", {"suffix"})):
        memory = build_memory(tiny_model, DOCUMENTS, keys=keys)
        assert set(memory.manifest.settings) == methods
        assert memory.settings_from("suffix") == "self-tuned"


# The gate that ships, and hybrid with it.


def test_a_gate_in_a_file_of_its_own_is_the_gate(tmp_path: Path) -> None:
    gate = shipped_gate()
    write_gate(tmp_path / "gate.safetensors", gate)
    again = read_gate(tmp_path / "gate.safetensors")
    assert again.config == gate.config
    for name, array in gate.state_dict().items():
        assert torch.equal(again.state_dict()[name], array)


def test_the_gate_that_ships_is_for_hybrid_as_it_is() -> None:
    gate, hybrid = shipped_gate(), method_named("hybrid")
    assert gate.config == MixtureConfig.over(hybrid.weighed, 1.0)
    assert (gate.search is not None) == hybrid.asks


@pytest.mark.slow
def test_a_gate_learns_on_from_the_one_that_ships_where_there_is_text(
    build_memory: Callable[..., Memory],
    memory: Memory,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """With little text its networks stay as they are; either way the same text gives the same."""
    little, ships = build_memory(tiny_model, DOCUMENTS[:2]), shipped_gate()
    for one, learns in ((memory, True), (little, False)):
        again = Memory.open(shutil.copytree(one.path, one.path.with_name("again")))
        for each in (one, again):
            self_tune(tiny_model, each, tiny_tokenizer)
        file = one.gate("hybrid")
        assert file is not None
        assert again.gate("hybrid") == file
        own = load_gate(one, "hybrid")
        assert own is not None
        assert own.config.alike(ships.config)
        assert own.config.unit != 1
        arrays = own.state_dict()
        assert not torch.equal(arrays.pop("quantiles"), ships.quantiles)
        same = [torch.equal(array, ships.state_dict()[name]) for name, array in arrays.items()]
        assert all(same) != learns
        result = evaluate(tiny_model, one, HELD_OUT, "hybrid", tokenizer=tiny_tokenizer)
        assert 0 < result.foss < 1
    assert (
        0.2 < evaluate(tiny_model, memory, HELD_OUT, "hybrid", tokenizer=tiny_tokenizer).foss < 0.8
    )


def test_what_is_held_out_of_every_kind_is_not_left(memory: Memory, tiny_model: Any) -> None:
    """Of hybrid's candidates: neighbours, pointers, matches and places of the text."""
    sample = module._Sample.of(tiny_model, memory, None, lambda *_: None)
    settings = Settings(k=8, suffix_k=4, max_knns=6)
    wide = module._wider(settings, memory, ("dense", "pointers", "suffix"))
    sample.kept[1] = False
    left = partial(sample.left, settings=settings)
    _, ways = mixture_examples(memory, "hybrid", wide, sample.read.read, left=left)
    for searched, before in ways:
        found = searched.view.candidates
        assert not module._of_own(found.ids, module._own(sample.pieces)[searched.documents]).any()
        assert not (searched.documents == 1).any()
        assert all(n <= most for n, most in zip(found.columns, (8, 6, 4, 10**6), strict=True))
        assert before.view.candidates.columns == (0, *found.columns[1:])
        assert found.has("dense").all()


@pytest.mark.slow
def test_a_memory_that_tuned_itself_does_no_harm_and_is_attached_as_it_is_evaluated(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    self_tune(tiny_model, memory, tiny_tokenizer)
    strange = random_documents()
    base, hybrid = evaluate(
        tiny_model, memory, strange, ["base", "hybrid"], tokenizer=tiny_tokenizer
    )
    most = np.log(2) + 1e-3  # nats a document, by the guard
    assert (hybrid.document_nll <= base.document_nll + most).all()
    ids = tiny_tokenizer(HELD_OUT[0].text, return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.tensor([[tiny_tokenizer.bos_token_id]]), ids[:, :15]], dim=1)
    result = evaluate(tiny_model, memory, [ids[0].numpy()], "hybrid")
    with torch.inference_mode(), attach(tiny_model, memory, method="hybrid") as session:
        assert session.settings_from == "self-tuned"
        log_probs = tiny_model(input_ids=ids).logits[0].log_softmax(-1)
    nll = -log_probs[:-1].gather(1, ids[0, 1:, None]).mean()
    assert float(nll) == pytest.approx(result.nll, abs=1e-4)


# What is said of settings.


def test_untuned_settings_are_told_unless_they_are_given(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.warns(SettingsWarning, match=r"not tuned for knn.*nearest tune"):
        evaluate(tiny_model, memory, HELD_OUT, tokenizer=tiny_tokenizer)
    with pytest.warns(SettingsWarning, match="not tuned for retomaton"):
        attach(tiny_model, memory, method="retomaton").detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(tiny_model, memory, HELD_OUT, tokenizer=tiny_tokenizer, lam=0.2, temperature=9.0)


@pytest.mark.slow
def test_where_settings_come_from_is_told(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def told(memories: Any, **options: Any) -> str:
        base, result = evaluate(
            tiny_model, memories, HELD_OUT, ["base", "knn"], tokenizer=tiny_tokenizer, **options
        )
        assert base.settings_from is base.to_dict()["settings_from"] is None
        with attach(tiny_model, memories, **options) as session:
            assert session.settings_from == result.settings_from
            assert f"settings {session.settings_from}: lam=" in repr(session)
            with session.weighted(*(0.2 for _ in memories)):
                assert session.settings_from == result.settings_from
        return str(result.to_dict()["settings_from"])

    with pytest.warns(SettingsWarning):
        assert told([memory]) == "defaults"
    assert told([memory], settings=Settings(temperature=9.0)) == "given"
    untuned = Memory.open(memory.path)
    self_tune(tiny_model, memory, tiny_tokenizer)
    assert told([memory]) == told([memory], lam=0.3) == "self-tuned"
    tune(tiny_model, memory, HELD_OUT, tokenizer=tiny_tokenizer)
    assert told([memory]) == "tuned"
    with pytest.warns(SettingsWarning):  # of several the least
        assert told([memory, untuned]) == "defaults"


@pytest.mark.slow
def test_what_changed_since_tuning_is_told(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tune(tiny_model, memory, HELD_OUT, tokenizer=tiny_tokenizer)
    assert memory.changed_since_tuning("knn") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(tiny_model, memory, HELD_OUT, tokenizer=tiny_tokenizer)
    more = memory.add(tiny_model, tiny_tokenizer, [Document("more", "and more")])
    assert list(more.changed_since_tuning("knn")) == ["documents"]
    compress_memory(memory.path, Compression(pca=16))
    with pytest.warns(SettingsWarning, match="32 dims.*16 dims"):
        evaluate(tiny_model, Memory.open(memory.path), HELD_OUT, tokenizer=tiny_tokenizer)
    with pytest.warns(SettingsWarning, match="32 dims.*16 dims"):
        sweep(tiny_model, Memory.open(memory.path), HELD_OUT[:2], ["knn"], tokenizer=tiny_tokenizer)


def test_a_gate_trained_with_other_keys_is_refused(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {"method": "knn+buckets", "tokenizer": tiny_tokenizer}
    tune(tiny_model, memory, HELD_OUT, **options)
    evaluate(tiny_model, memory, HELD_OUT, **options)
    compress_memory(memory.path, Compression(pca=16))
    with pytest.raises(SettingError, match=r"other keys.*nearest tune"):
        evaluate(tiny_model, Memory.open(memory.path), HELD_OUT, **options)


# Nothing is lost.


def test_a_locked_memory_is_refused_before_anything_is_read(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def text() -> Any:
        raise AssertionError("read")
        yield

    with writer_lock(memory.path), pytest.raises(FolderError, match="another process"):
        tune(tiny_model, memory, text(), tokenizer=tiny_tokenizer)


def test_what_cannot_be_stored_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
    memory: Memory,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FolderError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("nearest.verbs.tune.store_settings", full)
        with pytest.raises(NotStoredError, match="disk is full") as raised:
            tune(tiny_model, memory, HELD_OUT, tokenizer=tiny_tokenizer)
    assert memory.settings("knn") == {}
    store_tuned(memory, raised.value.tuned)
    assert memory.settings("knn")["lam"] == raised.value.tuned.settings.lam
    assert Memory.open(memory.path).settings("knn") == memory.settings("knn")


def test_the_command_tries_again_to_store_what_it_found(
    monkeypatch: pytest.MonkeyPatch, memory: Memory, model_folder: str, tmp_path: Path
) -> None:
    """A gate took minutes to train, and another process may hold the memory for one."""
    text = tmp_path / "held-out.txt"
    text.write_text("the court shall be the court of the people\n" * 40)
    tried: list[int] = []

    def full(*arguments: Any, **options: Any) -> None:
        tried.append(1)
        if len(tried) < 3:
            raise FolderError("the disk is full")
        store_settings(*arguments, **options)

    monkeypatch.setattr("nearest.verbs.tune.store_settings", full)
    monkeypatch.setattr(sys.modules["nearest.cli.app"], "_STORE_EVERY", 0)
    command = ["tune", str(memory.path), "--text", str(text), "--model", model_folder, "--gate"]
    done = CliRunner().invoke(app, [*command, "buckets", "--force"])
    assert done.exit_code == 0, done.output
    assert done.output.count("the disk is full") == 2
    assert Memory.open(memory.path).gate("knn+buckets") is not None
    monkeypatch.setattr(sys.modules["nearest.cli.app"], "_STORE_TRIES", 1)
    tried.clear()
    given_up = CliRunner().invoke(app, [*command, "buckets", "--force"])
    assert given_up.exit_code == 2
    assert "could not be stored (the disk is full)" in given_up.output
