"""What the command can do, `Memory` can: build with options, cluster, compress, reindex, verify."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import random_documents
from folders import Build, copied
from nearest import BuildOptions, Memory
from nearest.build.build import store_settings
from nearest.errors import SettingError
from nearest.store.segment import Segment

DOCUMENTS = random_documents()


@pytest.fixture(scope="module")
def built(build_memory: Build, tiny_model: PreTrainedModel) -> Memory:
    return build_memory(tiny_model, DOCUMENTS[:6])


@pytest.fixture
def memory(built: Memory, tmp_path: Path) -> Memory:
    return Memory.open(copied(built.path, tmp_path))


def test_options_are_typed_and_their_fields_can_be_given_alone(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model, tiny_tokenizer, DOCUMENTS[:2]
    options = BuildOptions(keys="int8", window=32)
    whole = Memory.build(*model, tmp_path / "a", options)
    fields = {"keys": "int8", "window": 32}
    assert Memory.build(*model, tmp_path / "b", **fields).keys_record == whole.keys_record
    other = Memory.build(*model, tmp_path / "c", options, window=16)
    assert other.keys_record.window == 16
    assert dataclasses.replace(options, window=16).keys == other.keys_record.format


def test_keys_are_int8_unless_asked_otherwise(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    memory = Memory.build(tiny_model, tiny_tokenizer, DOCUMENTS[:2], tmp_path / "m")
    assert memory.keys_record.format == BuildOptions().keys == "int8"


def test_an_unknown_option_is_named_with_those_there_are(
    memory: Memory,
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model, tiny_tokenizer, ["a b"]
    with pytest.raises(SettingError, match=r"'windw'.*batch_size"):
        Memory.build(*model, tmp_path / "m", windw=3)
    with pytest.raises(SettingError, match=r"'windw'.*batch_size"):
        memory.add(*model, windw=3)


def test_what_a_memory_is_shows(memory: Memory) -> None:
    assert len(memory) == memory.entries == sum(len(d) - 1 for d in tokens_of(memory))
    for part in (str(memory.path), f"{memory.documents}", f"{memory.entries:,}", "fp16"):
        assert part in repr(memory)
    info = memory.info()
    assert (info["documents"], info["entries"]) == (memory.documents, memory.entries)


def tokens_of(memory: Memory) -> list[np.ndarray]:
    return [memory.document_tokens(number) for number in range(memory.documents)]


def test_changes_give_the_memory_that_they_make(memory: Memory) -> None:
    clustered = memory.cluster(7)
    assert clustered.manifest.clusters.clusters == 7
    assert memory.cluster(greedy_merge=True).manifest.clusters.made_by == "greedy merge"
    smaller = memory.compress(pca=8)
    assert smaller.keys_record.stored_dim == 8
    assert smaller.reindex("IVF2,Flat").segments[0].record.index.spec == "IVF2,Flat"
    assert smaller.verify() == []
    assert memory.manifest.version == 1  # what was open stays what it was


@pytest.mark.parametrize("given", [{}, {"clusters": 3, "greedy_merge": True}])
def test_clusters_are_found_in_one_way(memory: Memory, given: dict[str, object]) -> None:
    with pytest.raises(SettingError, match="greedy_merge"):
        memory.cluster(**given)


def test_settings_are_stale_after_what_they_were_found_with_has_changed(
    memory: Memory, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def tuned(memory: Memory) -> Memory:
        store_settings(memory.path, "knn", {"lam": 0.5})
        return memory.refresh()

    assert memory.changed_since_tuning("knn") == {}  # not tuned at all
    memory = tuned(memory)
    assert memory.changed_since_tuning("knn") == {}
    assert memory.cluster(4).changed_since_tuning("knn") == {}
    memory = memory.add(tiny_model, tiny_tokenizer, DOCUMENTS[6:8])
    assert list(memory.changed_since_tuning("knn")) == ["documents"]
    memory = memory.compress(pca=8)
    assert list(memory.changed_since_tuning("knn")) == ["keys", "documents"]
    assert memory.info()["tuned_before_keys_changed"] == ["knn"]
    memory = tuned(memory)
    assert memory.changed_since_tuning("knn") == {}
    assert list(memory.remove(["doc-0"]).changed_since_tuning("knn")) == ["documents"]
    memory = tuned(memory.refresh()).reindex("IVF2,Flat")
    assert list(memory.changed_since_tuning("knn")) == ["keys"]
    assert list(memory.compact().changed_since_tuning("knn")) == ["keys"]


def test_settings_found_before_another_writer_changed_the_keys_are_stale(memory: Memory) -> None:
    """As when a long tuning ends after a `compress` that began later."""
    memory.compress(pca=8)
    store_settings(memory.path, "knn", {"lam": 0.5}, found_in=memory.manifest)
    assert memory.refresh().settings("knn") == {"lam": 0.5}
    assert list(memory.refresh().changed_since_tuning("knn")) == ["keys"]
    present = memory.refresh()
    store_settings(memory.path, "knn", {"lam": 0.5}, found_in=present.manifest)
    assert present.refresh().changed_since_tuning("knn") == {}


def test_values_are_read_from_the_tokens_alone(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No look at the suffix array, which is twice the size of the tokens."""
    memory = memory.remove(["doc-1"])
    ids = memory.valued_entries()
    tokens = np.concatenate([segment.tokens for segment in memory.segments])
    touched = property(lambda _: pytest.fail("the suffix array was touched"))
    monkeypatch.setattr(Segment, "suffixes", touched)
    np.testing.assert_array_equal(memory.values(ids), tokens[ids + 1])
