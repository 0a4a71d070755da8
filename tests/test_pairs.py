"""Memories of encoder–decoders: documents with a source, against plain passes of the model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Speech2TextConfig, Speech2TextForConditionalGeneration

from automaton_oracle import Corpus, Oracle, states_of
from conftest import edit_manifest, make_tokenizer, snapshot
from folders import copied, found_by_verify, replaced
from nearest import Document, Memory, evaluate, read_documents, sweep, tune
from nearest.build.build import BuildOptions, planned_memory
from nearest.build.compact import compact_memory
from nearest.build.importing import ImportOptions, import_store
from nearest.build.reproduce import reproduction_problems
from nearest.corpus.batches import batch_windows
from nearest.encode import encoder
from nearest.encode.identity import token_rules
from nearest.encode.layers import find_key_layer
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import CorpusError, FolderError, ModelError, SettingError
from nearest.store import journal as unfinished
from nearest.store.verify import verify
from oracle import keys_and_logits
from pairs import CONFIGS, EOS, PairTokenizer, make_pair_model, make_pair_tokenizer, pair_documents

TOKENIZER = make_pair_tokenizer()
DOCUMENTS = pair_documents(8)
TEXT = pair_documents(3, seed=5)
SEGMENT = "segments/000001"


def source_ids(document: Document) -> torch.Tensor:
    return torch.tensor(TOKENIZER(document.encoder_text)["input_ids"])


def text_ids(document: Document, start: int) -> list[int]:
    return [start, *TOKENIZER(document.text, add_special_tokens=False)["input_ids"], EOS]


@pytest.fixture(scope="module", params=CONFIGS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model and a memory of pairs; of T5, with other keys."""
    model = make_pair_model(request.param)
    layer = "last_hidden" if request.param == "t5" else "last_ffn_input"
    path = tmp_path_factory.mktemp("pairs") / "m"
    options = {"keys": "fp16", "key_layer": layer, "window": 32, "stride": 16}
    memory = Memory.build(model, TOKENIZER, DOCUMENTS, path, **options)
    start = token_rules(model, TOKENIZER).start_token
    return SimpleNamespace(model=model, memory=memory, layer=layer, start=start)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, path = make_pair_model(), tmp_path_factory.mktemp("pairs") / "m"
    memory = Memory.build(model, TOKENIZER, DOCUMENTS, path, keys="fp16")
    return SimpleNamespace(model=model, memory=memory)


# --- keys and scores ------------------------------------------------------------------------------


def test_keys_are_the_decoders_states_after_reading_the_source(world: Any) -> None:
    """Each in the first window that holds its position; two documents are longer than a window."""
    segment = world.memory.segments[0]
    assert sum(len(segment.tokens_of(n)) > 33 for n in range(4)) >= 2
    for number, document in enumerate(DOCUMENTS[:4]):
        source, tokens = source_ids(document), text_ids(document, world.start)
        assert segment.tokens_of(number).tolist() == tokens
        assert segment.source_of(number).tolist() == source.tolist()
        first = int(segment.offsets[number])
        stored = segment.keys.rows(first + np.arange(len(tokens) - 1))
        for position in range(0, len(tokens) - 1, 5):
            begin = 0 if position < 32 else 16 * -(-(position - 31) // 16)
            window = torch.tensor(tokens[begin : position + 1])
            keys, _ = keys_and_logits(world.model, window, world.layer, source)
            np.testing.assert_allclose(stored[position], keys[-1], rtol=2e-3, atol=2e-3)
    assert reproduction_problems(world.memory, world.model, TOKENIZER) == []
    assert verify(world.memory.path) == []


def test_scores_are_those_of_training_labels_and_of_the_oracle(world: Any) -> None:
    """The base model's nll is its own loss; EOS is predicted as any other token."""
    settings = {"lam": 0.6, "temperature": temperature_of(world.memory), "k": 12, "min_knns": 3}
    methods = ["base", "knn", "retomaton", "suffix"]
    results = evaluate(
        world.model, world.memory, TEXT, methods, tokenizer=TOKENIZER, window=64, stride=32,
        **settings,
    )  # fmt: skip
    losses: dict[str, list[float]] = {method: [] for method in methods}
    clear = 0
    for document in TEXT:
        tokens, source = text_ids(document, world.start), source_ids(document)
        with torch.no_grad():
            labels = torch.tensor([tokens[1:]])
            loss = world.model(input_ids=source[None], labels=labels).loss
        losses["base"].append(float(loss) * (len(tokens) - 1))
        states = states_of(world.model, tokens[:-1], world.layer, source)
        for method in methods[1:]:
            of_method = dict(settings)
            if method != "retomaton":
                of_method.pop("min_knns")
            if method == "suffix":
                of_method = {"lam": 0.6, "temperature": settings["temperature"]}
            given = Oracle(Corpus(world.memory), method, **of_method)
            predicted = given.predict(*states, tokens[:-1])
            clear += sum(one.clear for one in predicted)
            losses[method].append(
                -sum(one.log_probs[t] for one, t in zip(predicted, tokens[1:], strict=True))
            )
    assert clear > 300
    for result in results:
        np.testing.assert_allclose(result.document_nll, losses[result.method], rtol=2e-3)
    # The source matters, or else nothing here was tested.
    other = [Document(d.id, d.text, encoder_text="other") for d in TEXT]
    changed = evaluate(world.model, None, other, "base", tokenizer=TOKENIZER)
    assert abs(changed.nll - results[0].nll) > 1e-3


def temperature_of(memory: Memory) -> float:
    """At which some neighbours weigh much more than others, and none alone."""
    keys = memory.keys.rows(memory.valued_entries()[:40])
    return float(((keys[:, None] - keys) ** 2).sum(-1).mean()) / 8


def test_a_text_is_predicted_without_the_entries_of_its_own_source(tmp_path: Path) -> None:
    """Equal texts of other sources stay candidates, and the first of them is not left out for it.

    The last document is not in the memory.
    """
    model, text = make_pair_model(), pair_documents(1)[0].text
    sources = ["one", "two", "three"]
    pairs = [Document(source, text, encoder_text=source) for source in sources]
    first = [*DOCUMENTS[1:4], *pairs[:2]]
    memory = Memory.build(model, TOKENIZER, first, tmp_path / "m", keys="fp16")
    memory = memory.add(model, TOKENIZER, DOCUMENTS[4:]).remove(["one"])
    memory = memory.add(model, TOKENIZER, pairs[:1])
    settings = {"lam": 0.6, "temperature": temperature_of(memory), "k": 12}
    given = {"tokenizer": TOKENIZER, "leave_one_out": True, **settings}
    result = evaluate(model, memory, pairs, "knn", **given)
    begins = {}
    for number in range(memory.documents):
        found = memory.document(number).id
        begins[found] = sum(len(memory.document_tokens(n)) for n in range(number))
    documents = [memory.document(n) for n in range(memory.documents)]
    stored = Memory.build(model, TOKENIZER, documents, tmp_path / "once", keys="fp16")
    tokens = text_ids(pairs[0], 0)
    for document, nll in zip(pairs, result.document_nll, strict=True):
        states = states_of(model, tokens[:-1], source=source_ids(document))
        own = begins.get(document.id)
        predicted = Oracle(Corpus(stored), "knn", own=own, **settings).predict(*states, tokens)
        losses = [-one.log_probs[t] for one, t in zip(predicted, tokens[1:], strict=True)]
        np.testing.assert_allclose(nll, sum(losses), rtol=2e-3)


def test_sources_are_read_with_their_rows() -> None:
    """Each row of a batch has its document's whole source; long ones count for a batch's size."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, size=n) for n in (3, 40, 20, 9, 2, 33)]
    sources = [rng.integers(2, 99, size=n) for n in (100, 4, 1, 30, 64, 7)]
    rows = 0
    for batch in batch_windows(documents, 16, 8, 4, sources):
        assert batch.encoder_inputs is not None
        size = len(batch.inputs) * max(batch.inputs.shape[1], batch.encoder_inputs.tokens.shape[1])
        assert size <= 64 or len(batch.inputs) == 1
        ends = np.cumsum(batch.predicts.sum(1))
        numbers = batch.documents[ends - 1].tolist()
        for row, number in enumerate(numbers):
            found = batch.encoder_inputs.tokens[row][batch.encoder_inputs.mask[row]]
            np.testing.assert_array_equal(found, sources[number])
            assert batch.encoder_inputs.mask[row, : len(found)].all()
        rows += len(numbers)
    assert rows == 12


def test_sources_and_targets_are_tokenised_apart(tmp_path: Path) -> None:
    model, tokenizer = make_pair_model(), make_pair_tokenizer(PairTokenizer)
    pairs = [Document("a", "Text", encoder_text="Source")]
    memory = Memory.build(model, tokenizer, pairs, tmp_path / "m")
    assert TOKENIZER.decode(memory.document_tokens(0)[1:-1]) == "tEXT"
    assert TOKENIZER.decode(memory.segments[0].source_of(0)[:-1]) == "Source"
    assert reproduction_problems(memory, model, tokenizer) == []
    with pytest.raises(ModelError, match="this tokenizer differs"):
        reproduction_problems(memory, model, TOKENIZER)


def test_a_memory_is_tuned_swept_and_planned(t5: Any, tmp_path: Path) -> None:
    path = copied(t5.memory.path, tmp_path)
    tuned = tune(t5.model, Memory.open(path), TEXT, tokenizer=TOKENIZER)
    assert tuned.nll <= tuned.base_nll
    swept = sweep(t5.model, Memory.open(path), TEXT, ["knn"], skip=[0], tokenizer=TOKENIZER)
    assert [point.result.tokens for point in swept.points] == [tuned.tokens] * len(swept.points)
    options = BuildOptions(keys="fp16")
    planned = planned_memory(tmp_path / "new", DOCUMENTS, t5.model, TOKENIZER, options)
    files = [f for s in t5.memory.manifest.segments for f in s.files.values()]
    assert planned.entries == t5.memory.entries
    assert abs(planned.bytes_needed / sum(file.size for file in files) - 1) < 0.25


# --- a memory's life ------------------------------------------------------------------------------


def test_documents_come_and_go_with_their_sources(t5: Any, tmp_path: Path) -> None:
    """What is left after all of it is what would be built of it; removed sources are erased."""
    memory = Memory.build(t5.model, TOKENIZER, DOCUMENTS[:5], tmp_path / "m", keys="fp16")
    secret = Document("pair-2", "new text", encoder_text="the source of the new text")
    memory = memory.add(t5.model, TOKENIZER, DOCUMENTS[5:])
    memory = memory.update(t5.model, TOKENIZER, [secret]).remove(["pair-2", "pair-0"])
    assert reproduction_problems(memory, t5.model, TOKENIZER) == []
    compact_memory(memory.path)
    memory = memory.refresh()
    left = [d for d in DOCUMENTS if d.id not in ("pair-0", "pair-2")]
    once = Memory.build(t5.model, TOKENIZER, left, tmp_path / "once", keys="fp16")
    (segment,), (expected,) = memory.segments, once.segments
    for name in ("tokens", "suffixes", "offsets"):
        np.testing.assert_array_equal(getattr(segment, name), getattr(expected, name))
    for name in ("tokens", "offsets"):
        found = getattr(segment.sources, name)
        np.testing.assert_array_equal(found, getattr(expected.sources, name))
    np.testing.assert_allclose(
        memory.keys.rows(memory.valued_entries()), once.keys.rows(once.valued_entries()), atol=0.02
    )
    assert memory.document(0).metadata == DOCUMENTS[1].metadata
    ids = np.array(TOKENIZER(secret.encoder_text)["input_ids"], np.uint16).tobytes()
    assert [name for name, data in snapshot(memory.path).items() if data and ids in data] == []
    assert verify(memory.path) == []


def test_a_killed_build_goes_on_with_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    model, options = make_pair_model("bart"), {"window": 32, "stride": 16, "batch_size": 1}
    Memory.build(model, TOKENIZER, DOCUMENTS, tmp_path / "whole", **options)
    encode, made = encoder.encode_keys, []

    def killed(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == 6:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(encoder, "encode_keys", killed)
    with pytest.raises(KeyboardInterrupt):
        Memory.build(model, TOKENIZER, DOCUMENTS, tmp_path / "m", **options)
    Memory.build(model, TOKENIZER, DOCUMENTS, tmp_path / "m", **options)
    assert snapshot(tmp_path / "m") == snapshot(tmp_path / "whole")
    monkeypatch.undo()
    reader = encoder.Encoder.of(model, find_key_layer(model, "last_ffn_input"), **options)
    texts = [text_ids(document, EOS) for document in DOCUMENTS]
    passes = len(
        list(
            reader.batches(
                map(np.array, texts), [source_ids(document).numpy() for document in DOCUMENTS]
            )
        )
    )
    assert len(made) == passes + 1  # only the one that was interrupted was begun twice


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("sources.npy", lambda ids: ids + 300, "lie outside 0 to 257"),
        ("sources.offsets.npy", lambda offsets: offsets[::-1].copy(), "do not rise from 0"),
        ("sources.offsets.npy", lambda offsets: offsets[:-1].copy(), "the manifest says"),
    ],
)
def test_damaged_sources_are_found(
    t5: Any, tmp_path: Path, place: str, change: Callable[[Any], Any], message: str
) -> None:
    folder = copied(t5.memory.path, tmp_path)
    path = f"{SEGMENT}/{place}"
    replaced(folder, path, change(np.load(folder / path)))
    assert message in found_by_verify(folder)


def test_other_sources_are_found_by_the_model(t5: Any, tmp_path: Path) -> None:
    folder = copied(t5.memory.path, tmp_path)
    sources = np.load(folder / SEGMENT / "sources.npy")
    replaced(folder, f"{SEGMENT}/sources.npy", np.where(sources > 1, 257 - sources, sources))
    assert verify(folder) == []
    problems = "; ".join(reproduction_problems(Memory.open(folder), t5.model, TOKENIZER))
    assert "the source of a document gives other tokens" in problems
    assert "keys differ from what the model makes" in problems


def test_a_manifest_without_sources_is_refused(t5: Any, tmp_path: Path) -> None:
    folder = copied(t5.memory.path, tmp_path)
    edit_manifest(folder, lambda manifest: manifest["segments"][0].pop("source_tokens"))
    with pytest.raises(FolderError, match="a segment has no sources"):
        Memory.open(folder)


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "line 2 has no text for the encoder.*encoder–decoder.*encoder-field"),
        ({"source": 7}, ".*:2.*field 'source'.*a number"),
        ({"source": None}, "has no text for the encoder"),
        ({"source": ""}, "has no text for the encoder"),
        ({"source": "a" * 64}, "line 2 has 65 tokens, and the encoder has 64 positions"),
    ],
    ids=str,
)
def test_documents_without_a_source_that_can_be_read(
    line: dict[str, Any], message: str, tmp_path: Path
) -> None:
    corpus = tmp_path / "pairs.jsonl"
    first = {"source": "a" * 63, "text": "one"}
    corpus.write_text(f"{json.dumps(first)}\n{json.dumps({'text': 'two', **line})}\n")
    model = make_pair_model("bart")
    message = message.replace("line 2", ".*:2")
    for use in (
        lambda: Memory.build(model, TOKENIZER, read_documents([corpus]), tmp_path / "m"),
        lambda: evaluate(model, None, read_documents([corpus]), "base", tokenizer=TOKENIZER),
    ):
        with pytest.raises(CorpusError, match=message):
            use()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (["a string"], {}, "has no text for the encoder"),
        ([np.arange(9)], {}, "arrays of token ids have none"),
        (TEXT, {"stream": True}, "reads a text of its own for each document"),
        (TEXT, {"score_eos": True}, "their ends are always scored"),
    ],
)
def test_texts_that_cannot_be_scored(
    t5: Any, text: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((CorpusError, SettingError), match=message):
        evaluate(t5.model, t5.memory, text, "knn", tokenizer=TOKENIZER, **options)


def test_models_and_memories_of_the_other_kind(
    t5: Any, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    causal = Memory.build(tiny_model, tokenizer, DOCUMENTS, tmp_path / "causal", keys="none")
    assert causal.document(0).encoder_text == DOCUMENTS[0].encoder_text
    assert causal.segments[0].source_of(0) is None
    with pytest.raises(
        ModelError, match=r"is an encoder–decoder and .* of a causal language model"
    ):
        evaluate(t5.model, causal, TEXT, "suffix", tokenizer=TOKENIZER, force=True)
    with pytest.raises(
        ModelError, match=r"is a causal language model and .* of an encoder–decoder"
    ):
        evaluate(tiny_model, t5.memory, TEXT, "knn", tokenizer=tokenizer, force=True)
    with pytest.raises(ModelError, match="is a causal language model"):
        t5.memory.add(tiny_model, tokenizer, TEXT, force=True)
    with pytest.raises(ModelError, match="does not hold the texts that its encoder read"):
        import_store(tmp_path, tmp_path / "m", t5.model, TOKENIZER, ImportOptions())


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    config = Speech2TextConfig(
        vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="reads input_features, and a memory holds text"):
        find_key_layer(Speech2TextForConditionalGeneration(config).eval(), "last_hidden")
    model = make_pair_model()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="does not say what its decoder starts with"):
        Memory.build(model, TOKENIZER, DOCUMENTS, tmp_path / "m")


def test_ids_are_made_of_source_and_text(tmp_path: Path) -> None:
    """Many sources may have one text, such as "Yes."."""
    corpus = tmp_path / "pairs.jsonl"
    lines = [{"source": "Ja.", "text": "Yes."}, {"source": "Doch.", "text": "Yes."}]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_documents([corpus], encoder_field="source")
    assert first.id != second.id
    given = [Document("", line["text"], encoder_text=line["source"]) for line in lines]
    memory = Memory.build(make_pair_model(), TOKENIZER, given, tmp_path / "m")
    assert memory.documents == 2


def test_a_folder_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    for name in ("t5", "t5-gated", "bart", "marian"):
        model = make_pair_model(name)
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        loaded, tokenizer = load_model_and_tokenizer(str(tmp_path / name))
        assert type(loaded) is type(model)
        ids = torch.tensor([[5, 6, 1]])
        torch.testing.assert_close(
            loaded(input_ids=ids, decoder_input_ids=ids).logits,
            model(input_ids=ids, decoder_input_ids=ids).logits,
        )
        assert tokenizer("ab")["input_ids"][-1] == EOS


def test_a_field_named_source_is_metadata_unless_an_encoder_reads_it(
    tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """Corpora for retrieval keep a path or an address in `source`."""
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text('{"text": "Hallo", "source": "a/b.html"}\n')
    (document,) = read_documents([corpus])
    assert (document.encoder_text, document.metadata) == (None, {"source": "a/b.html"})
    (document,) = read_documents([corpus], encoder_field="source")
    assert (document.encoder_text, document.metadata) == ("a/b.html", {})
    memory = Memory.build(tiny_model, make_tokenizer(), [Document("a", "Hallo", {"source": "b"})],
                          tmp_path / "causal", keys="none")  # fmt: skip
    assert memory.document(0) == Document("a", "Hallo", {"source": "b"}, "a")
    with pytest.raises(CorpusError, match="no text for the encoder"):
        Memory.build(make_pair_model(), TOKENIZER, [Document("a", "Hallo", {"source": "b"})],
                     tmp_path / "pairs")  # fmt: skip


def test_rows_name_the_encoder_text_in_any_field(tmp_path: Path) -> None:
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text('{"text": "Ja", "encoder_text": "Yes"}\n{"text": "Nein", "en": "No"}\n')
    found = list(read_documents([corpus], encoder_field="en"))
    assert [(d.text, d.encoder_text) for d in found] == [("Ja", "Yes"), ("Nein", "No")]
    memory = Memory.build(make_pair_model(), TOKENIZER, found, tmp_path / "m")
    assert [memory.document(n).encoder_text for n in range(2)] == ["Yes", "No"]
