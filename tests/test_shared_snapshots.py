"""What a snapshot shares with the one before: segments, suffix arrays, indexes."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import random_documents
from folders import Build, copied
from nearest import Document, Memory
from nearest.index.together import TogetherIndex
from nearest.store.snapshot import Snapshot

DOCUMENTS = list(random_documents())
QUERIES = np.random.default_rng(1).normal(scale=3, size=(6, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=["IVF4,SQ8", "IVF4,PQ8x4fs", "exact"])
def folder(
    build_memory: Build, tiny_model: PreTrainedModel, request: pytest.FixtureRequest
) -> Path:
    return build_memory(tiny_model, DOCUMENTS[:9], index=request.param, recall=1.0).path


@pytest.fixture
def add(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    return lambda memory, documents: memory.add(tiny_model, tiny_tokenizer, documents)


def found(memory: Memory) -> list[np.ndarray]:
    context = np.array([0, *memory.document_tokens(1), *memory.document_tokens(0)])
    ends = np.arange(3, len(context), 7)
    told = [
        *memory.search(QUERIES, 9),
        *memory.search(QUERIES, 5, "index"),
        *memory.longest_matches(context, ends, 4),
        *memory.ngrams(context, ends, 3),
    ]
    if not memory.keys_record.index.endswith("fs"):  # which cannot measure chosen entries
        told.append(memory.index_distances(QUERIES, np.arange(18).reshape(6, 3)))
    return told


def as_if_opened(memory: Memory) -> None:
    for one, other in zip(found(memory), found(Memory.open(memory.path)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_memory_that_grows_shares_what_it_had(folder: Path, tmp_path: Path, add: Any) -> None:
    before = Memory.open(copied(folder, tmp_path))
    expected = found(before)
    after = add(before, DOCUMENTS[9:10])
    assert after.segments[0] is before.segments[0]
    assert after._suffix_arrays[0] is before._suffix_arrays[0]
    as_if_opened(after)
    (held,) = before._held.values() if before._held else (None,)
    if held is not None:
        (searched,) = after.searcher.searched
        assert isinstance(searched.backend, TogetherIndex)
        assert searched.backend.parts[0] is held
    smaller = after.remove(["doc-2"])
    assert smaller.segments[1] is after.segments[1]
    assert smaller.segments[0].tokens is before.segments[0].tokens
    as_if_opened(smaller)
    again = add(smaller, [d for d in DOCUMENTS if d.id == "doc-2"])
    as_if_opened(again)
    for one, other in zip(found(before), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_index_that_has_grown_much_is_joined_anew(
    folder: Path, tmp_path: Path, add: Any
) -> None:
    before = Memory.open(copied(folder, tmp_path))
    found(before)
    after = add(before, [Document(f"again-{one.id}", one.text) for one in DOCUMENTS])
    assert not any(isinstance(s.backend, TogetherIndex) for s in after.searcher.searched)
    as_if_opened(after)


def test_files_stay_open_for_whoever_shares_them(folder: Path) -> None:
    """The snapshot that opened them may be gone."""
    memory = Memory.open(folder)
    text = memory.document(0).text
    hidden = [segment.without([1]) for segment in memory.segments]
    without = Memory(Snapshot(memory.path, memory.manifest, hidden), known=memory)
    del memory, hidden
    gc.collect()
    assert without.document(0).text == text
    assert without.documents == 8
    assert len(without.search(QUERIES, 3).ids) == len(QUERIES)


def test_another_set_of_keys_is_not_shared(folder: Path, tmp_path: Path) -> None:
    before = Memory.open(copied(folder, tmp_path))
    after = before.compress("int8")
    assert after.segments[0] is not before.segments[0]
    as_if_opened(after)
