"""Python as people expect it: whatever holds texts is taken, and what comes back can be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import nearest
from conftest import make_documents
from nearest import Memory, attach, evaluate, read_documents
from nearest.corpus.documents import Document
from nearest.corpus.incoming import incoming_documents
from nearest.corpus.report import CorpusWarning
from nearest.corpus.tokens import TokenRules
from nearest.errors import CorpusError

TEXTS = ["the court shall", "a person of the district", "law"]


@pytest.fixture(scope="module")
def memory(build_memory: Callable[..., Memory], tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, make_documents(6, 20, seed=6))


def _folder(path: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    return path


def _pandas(_: Path) -> Any:
    import pandas

    return pandas.DataFrame({"text": TEXTS, "score": [1.0, float("nan"), 2.0]})


def _dataset(_: Path) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"text": TEXTS})


def _arrow(_: Path) -> Any:
    import pyarrow

    return pyarrow.table({"text": TEXTS})


DOCUMENTS: dict[str, Callable[[Path], Any]] = {
    "strings": lambda _: TEXTS,
    "a tuple": lambda _: tuple(TEXTS),
    "a generator": lambda _: (text for text in TEXTS),
    "documents": lambda _: [Document(str(number), text) for number, text in enumerate(TEXTS)],
    "rows": lambda _: [{"text": text, "year": 1999} for text in TEXTS],
    "a path": _folder,
    "a corpus": lambda path: read_documents(_folder(path)),
    "a DataFrame": _pandas,
    "a column": lambda path: _pandas(path)["text"],
    "a dataset": _dataset,
    "a dataset's column": lambda path: _dataset(path)["text"],
    "an Arrow table": _arrow,
}


@pytest.mark.parametrize("given", DOCUMENTS.values(), ids=DOCUMENTS)
def test_whatever_holds_texts_is_scored_and_built_from(
    given: Callable[[Path], Any],
    tmp_path: Path,
    memory: Memory,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    (tmp_path / "given").mkdir()
    expected = evaluate(tiny_model, memory, TEXTS, tokenizer=tiny_tokenizer, lam=0.3)
    found = evaluate(
        tiny_model, memory, given(tmp_path / "given"), tokenizer=tiny_tokenizer, lam=0.3
    )
    assert found.nll == expected.nll
    built = Memory.build(
        tiny_model, tiny_tokenizer, given(tmp_path / "given"), tmp_path / "m", keys="none"
    )
    assert [built.document(number).text for number in range(built.documents)] == TEXTS


IDS = [[0, 5, 6, 7], [0, 8, 9]]


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        [tuple(row) for row in IDS],
        [np.array(row) for row in IDS],
        [np.array(row, np.uint16) for row in IDS],
        [torch.tensor(row) for row in IDS],
    ],
    ids=["lists", "tuples", "arrays", "unsigned arrays", "tensors"],
)
def test_token_ids_are_scored_however_they_are_given(
    given: Any, memory: Memory, tiny_model: PreTrainedModel
) -> None:
    expected = evaluate(tiny_model, memory, [np.array(row) for row in IDS], lam=0.3)
    found = evaluate(tiny_model, memory, given, lam=0.3)
    assert (found.tokens, found.nll) == (5, expected.nll)


def test_rows_of_a_tensor_are_sequences(memory: Memory, tiny_model: PreTrainedModel) -> None:
    rows = torch.tensor([[0, 5, 6], [0, 8, 9]])
    assert evaluate(tiny_model, memory, rows, lam=0.3).tokens == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("one text", "give a list"),
        (b"bytes", "give a list"),
        (Document("a", "one"), "give a list"),
        ([1, 2, 3], "one sequence of token ids is given: give a list"),
        (np.array([1, 2, 3]), "one sequence of token ids is given"),
        ([[1, 2], "text"], "mixed"),
        ([["a", "b"]], "given as list"),
        ([[1.5, 2.5]], "given as list"),
        ([None], "given as NoneType"),
        ([3.5], "given as float"),
        (None, "given as NoneType"),
        (7, "given as int"),
        ({"text": TEXTS}, "give one of its values"),
        ([{"body": "x"}], "no field 'text' .it has 'body'"),
        ([[]], "empty"),
        ([], "no token to predict"),
        ([[0, 999_999]], "outside the model's vocabulary"),
        ([[1, 2], [[1, 2], [3]]], "document 2 is no sequence of token ids"),
        ([torch.tensor([1, 2]).bfloat16()], "document 1 is no sequence of token ids"),
    ],
)
def test_what_is_no_list_of_documents_is_named(
    given: Any,
    message: str,
    memory: Memory,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(CorpusError, match=message):
        evaluate(tiny_model, memory, given, tokenizer=tiny_tokenizer)


def test_sources_are_readable_and_become_dictionaries(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    inputs = tiny_tokenizer(tiny_tokenizer.bos_token + "the court", return_tensors="pt")
    with attach(tiny_model, memory, lam=0.5) as session:
        tiny_model.generate(**inputs, max_new_tokens=3, do_sample=False)
        first = session.sources(0)[0]
    shown = repr(first)
    assert len(shown) < 300
    assert f"{first.memory_weight:.0%}" in shown
    strongest = first.sources[0]
    assert f"{strongest.document_id}@{strongest.position}" in shown
    found = first.to_dict()
    assert found["token"] == first.token
    assert found["sources"][0]["document_id"] == strongest.document_id


def test_the_list_of_public_names_is_complete_and_loads() -> None:
    for name in nearest.__all__:
        assert name in dir(nearest)
        assert getattr(nearest, name) is not None
    for name in (
        *("add", "sync", "update", "remove", "compact", "cluster", "compress", "reindex"),
        *("verify", "info", "import_store", "search_text", "push_to_hub", "from_pretrained"),
    ):
        assert callable(getattr(Memory, name))


def test_cells_of_a_frame_that_are_arrays_or_empty() -> None:
    import pandas

    frame = pandas.DataFrame(
        {"text": ["one", None, "three"], "year": [2020, None, 2022], "id": ["a", "b", None]}
    )
    plain = [("a", "one", {"year": 2020}), ("three", {"year": 2022})]
    for given in (frame, frame.convert_dtypes()):
        with pytest.warns(CorpusWarning, match="1 empty"):
            first, last = incoming_documents(given, TokenRules(0, 10))
        assert [(first.id, first.text, first.metadata), (last.text, last.metadata)] == plain
    arrays = pandas.DataFrame({"text": ["one"], "tags": [np.array(["x", "y"])]})
    (document,) = incoming_documents(arrays, TokenRules(0, 10))
    assert document.metadata == {"tags": ["x", "y"]}
    with pytest.raises(CorpusError, match="no field 'text'"):
        list(incoming_documents(pandas.DataFrame({"body": ["x"]}), TokenRules(0, 10)))
