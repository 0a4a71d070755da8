"""Searches among documents with like encoder texts, against memories of these alone."""

import shutil
from collections import Counter
from math import log1p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import documents_apart, make_model, make_tokenizer
from nearest import Memory, attach, evaluate, tune
from nearest.corpus.documents import Document
from nearest.errors import SettingError
from nearest.store.encoder_texts import EncoderTexts
from pairs import make_pair_model, make_pair_tokenizer

K1, B = 0.9, 0.4
TOKENIZER = make_pair_tokenizer()
OPTIONS = {"keys": "fp16", "window": 64, "stride": 32, "tune": False}
KNN: dict[str, Any] = {"lam": 0.6, "temperature": 40.0, "k": 12}


def pairs_of_words(count: int, seed: int) -> list[Document]:
    """Texts whose sources share words of five letters, some more and some fewer."""
    rng = np.random.default_rng(seed)
    words = ["".join(map(chr, rng.integers(97, 123, size=5))) for _ in range(12)]

    def text(size: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, len(words), size=size))

    return [Document(f"{seed}-{n}", text(5), encoder_text=text(4)) for n in range(count)]


DOCUMENTS, TEXT = pairs_of_words(24, 1), pairs_of_words(3, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_pair_model("t5")


@pytest.fixture(scope="module")
def memory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """Of two segments, with removed documents in both."""
    folder = tmp_path_factory.mktemp("near") / "m"
    made = Memory.build(model, TOKENIZER, DOCUMENTS[:14], folder, **OPTIONS)
    made = made.add(model, TOKENIZER, DOCUMENTS[14:])
    return made.remove([DOCUMENTS[3].id, DOCUMENTS[20].id])


def source_of(document: Document) -> list[int]:
    ids: list[int] = TOKENIZER(document.encoder_text)["input_ids"]
    return ids


def scores(memory: Memory, source: list[int]) -> np.ndarray:
    """BM25 of every document of the memory, as the formula says it."""
    texts = [memory.encoder_tokens(number).tolist() for number in range(memory.documents)]
    mean = sum(map(len, texts)) / len(texts)
    held = Counter(token for text in texts for token in set(text))
    found = np.zeros(len(texts))
    for number, text in enumerate(texts):
        counts = Counter(text)
        for token in source:
            idf = log1p((len(texts) - held[token] + 0.5) / (held[token] + 0.5))
            norm = K1 * (1 - B + B * len(text) / mean)
            found[number] += idf * counts[token] / (counts[token] + norm)
    return found


def near(memory: Memory, document: Document, most: int) -> list[int]:
    """The numbers of the documents with the highest scores, which are told apart clearly."""
    found = scores(memory, source_of(document))
    order = np.argsort(-found)
    assert found[order[most - 1]] > found[order[most]] + 1e-4
    return sorted(order[:most].tolist())


@pytest.mark.parametrize("most", [1, 4, 21])
def test_the_entries_are_those_of_the_documents_with_the_highest_bm25(
    memory: Memory, most: int
) -> None:
    sources = [np.array(source_of(one)) for one in TEXT]
    entries = EncoderTexts(memory).entries(sources, most)
    for row, document in zip(entries, TEXT, strict=True):
        expected = [e for n in near(memory, document, most) for e in memory.entries_of(n)]
        assert row[row >= 0].tolist() == expected
        assert (row[len(expected) :] == -1).all()


def memory_of(memory: Memory, model: Any, document: Document, most: int, path: Path) -> Memory:
    """One that holds the documents near to the source, and nothing else."""
    wanted = {memory.document(number).id for number in near(memory, document, most)}
    some = [one for one in DOCUMENTS if one.id in wanted]
    return Memory.build(model, TOKENIZER, some, path, **OPTIONS)


@pytest.mark.parametrize("method", ["knn", "retomaton"])
def test_a_text_is_predicted_as_by_a_memory_of_the_near_documents(
    memory: Memory, model: Any, method: str, tmp_path: Path
) -> None:
    """RetoMaton's pointers lead from them to nothing else: clusters would."""
    restricted = evaluate(model, memory, TEXT, method, tokenizer=TOKENIZER, encoder_texts=4, **KNN)
    everywhere = evaluate(model, memory, TEXT, method, tokenizer=TOKENIZER, **KNN)
    for number, document in enumerate(TEXT):
        small = memory_of(memory, model, document, 4, tmp_path / str(number))
        alone = evaluate(model, small, [document], method, tokenizer=TOKENIZER, **KNN)
        np.testing.assert_allclose(
            restricted.document_nll[number], alone.document_nll[0], rtol=1e-5
        )
    assert np.abs(restricted.document_nll - everywhere.document_nll).min() > 1e-3


def test_among_all_documents_a_search_is_as_without(memory: Memory, model: Any) -> None:
    every, plain = (
        evaluate(model, memory, TEXT, "knn", tokenizer=TOKENIZER, encoder_texts=most, **KNN)
        for most in (1000, 0)
    )
    np.testing.assert_allclose(every.document_nll, plain.document_nll, rtol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_written_as_with_a_memory_of_the_near_documents(
    memory: Memory, model: Any, beams: int, tmp_path: Path
) -> None:
    """A batch of two sources, one of them padded; every beam has its own source."""
    rows = [source_of(one) for one in TEXT[:2]]
    rows[1] = rows[1][3:]
    documents = [TEXT[0], Document("cut", "", encoder_text=str(TEXT[1].encoder_text)[3:])]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with attach(model, memory, "knn", encoder_texts=4, **KNN) as session:
        together = model.generate(ids, attention_mask=(ids != 0).long(), **options)
        named = [session.sources(row) for row in (0, 1)]
    for row, document in enumerate(documents):
        small = memory_of(memory, model, document, 4, tmp_path / str(row))
        with attach(model, small, "knn", **KNN):
            alone = model.generate(torch.tensor(rows[row : row + 1]), **options)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        if beams == 1:
            found = torch.stack(together.scores)[:, row]
            torch.testing.assert_close(found, torch.stack(alone.scores)[:, 0], rtol=0, atol=1e-4)
        ids_of_near = {small.document(number).id for number in range(small.documents)}
        told = {source.document_id for token in named[row] for source in token.sources}
        assert told <= ids_of_near
        assert told or beams > 1  # the best beam may be the model's own


def test_a_plain_call_reads_the_source_that_it_is_given(
    memory: Memory, model: Any, tmp_path: Path
) -> None:
    source, target = torch.tensor([source_of(TEXT[0])]), torch.tensor([[0, 40, 41, 42]])
    with attach(model, memory, "knn", encoder_texts=4, **KNN), torch.no_grad():
        found = model(input_ids=source, decoder_input_ids=target).logits
        read = model.get_encoder()(source)
        with pytest.raises(SettingError, match="give it as input_ids, or leave encoder_texts out"):
            model(encoder_outputs=read, decoder_input_ids=target)
    small = memory_of(memory, model, TEXT[0], 4, tmp_path / "small")
    with attach(model, small, "knn", **KNN), torch.no_grad():
        expected = model(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_what_is_tuned_with_it_is_kept_with_it(memory: Memory, model: Any, tmp_path: Path) -> None:
    memory = Memory.open(shutil.copytree(memory.path, tmp_path / "m"))  # the others' stays untuned
    tuned = tune(model, memory, TEXT, method="knn", tokenizer=TOKENIZER, encoder_texts=4)
    assert memory.settings("knn")["encoder_texts"] == tuned.settings.encoder_texts == 4
    asked = evaluate(model, memory, TEXT, "knn", tokenizer=TOKENIZER)
    assert asked.nll == pytest.approx(tuned.nll, abs=1e-5)


def test_what_has_no_encoder_texts_is_explained(memory: Memory, model: Any, tmp_path: Path) -> None:
    causal = make_model()
    other = Memory.build(
        causal, make_tokenizer(), documents_apart(3, 12), tmp_path / "causal", tune=False
    )
    with pytest.raises(SettingError, match="a model without an encoder"):
        attach(causal, other, "knn", encoder_texts=4)
    merged = Memory.build(model, TOKENIZER, DOCUMENTS, tmp_path / "merged", **OPTIONS)
    merged = merged.compress(merge=True)
    with pytest.raises(SettingError, match="were merged into others"):
        attach(model, merged, "knn", encoder_texts=4)
    with pytest.raises(SettingError, match="at least 1, or 0 for all, got -1"):
        attach(model, memory, "knn", encoder_texts=-1)
    with pytest.raises(SettingError, match="no setting of suffix"):
        attach(model, memory, "suffix", encoder_texts=4)
