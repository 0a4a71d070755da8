"""A failing disk, at operations of every kind that write: a clear error, a whole generation."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import random_documents
from faults import ERRORS, disk
from folders import Build, copied, files, live_files
from nearest import Document, Memory
from nearest.build.build import store_settings
from nearest.build.cluster import KMeans, cluster_memory
from nearest.build.compress import Compression, compress_memory
from nearest.build.index import rebuild_index
from nearest.errors import FolderError
from nearest.store.parts.index import IndexChoice
from nearest.store.verify import verify

DOCUMENTS = random_documents()[:4]
NEW = [Document("new", "a text that was not there", {"a": "b"})]
Model = tuple[PreTrainedModel, PreTrainedTokenizerFast]
Change = Callable[[Path, Model], Any]

CHANGES: dict[str, Change] = {
    "add": lambda path, model: Memory.open(path).add(*model, NEW),
    "update": lambda path, model: Memory.open(path).update(
        *model, [Document("doc-1", "another text")]
    ),
    "remove": lambda path, model: Memory.open(path).remove(["doc-1"]),
    "compact": lambda path, model: Memory.open(path).compact(),
    "index": lambda path, model: rebuild_index(path, IndexChoice("Flat")),
    "cluster": lambda path, model: cluster_memory(path, KMeans(7)),
    "compress": lambda path, model: compress_memory(path, Compression(pca=16, merge=True)),
    "settings": lambda path, model: store_settings(path, "knn", {"lam": 0.5}),
}


@pytest.fixture(scope="module")
def model(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Model:
    return tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def started(build_memory: Build, model: Model) -> Path:
    """A memory of two segments with clusters, of which a document was removed."""
    memory = build_memory(model[0], DOCUMENTS, keys="int8", index="IVF4,SQ8")
    cluster_memory(memory.path, KMeans(10))
    memory.refresh().add(*model, [Document("second", "what came later, and then more")])
    memory.refresh().remove(["doc-2"])
    return memory.path


def answers(path: Path) -> tuple[Any, ...]:
    """What a generation says: its documents, and what a search, a match and a cluster give."""
    memory = Memory.open(path)
    queries = np.random.default_rng(0).normal(scale=3, size=(3, 32)).astype(np.float32)
    found = memory.search(queries, 6)
    context = np.array([0, 100, 101, 102])
    clusters = memory.clusters
    assert clusters is not None
    return (
        memory.manifest.version,
        [memory.document(number).text for number in range(memory.documents)],
        found.ids.tolist(),
        memory.longest_matches(context, np.arange(4), 9).ids.tolist(),
        clusters.members.tolist(),
        memory.settings("knn"),
    )


def live_bytes(path: Path) -> dict[str, bytes]:
    """The files of the present generation."""
    return {name: (path / name).read_bytes() for name in live_files(path)}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_that_fails_leaves_a_whole_generation(
    change: str, started: Path, model: Model, tmp_path: Path
) -> None:
    whole, path = (copied(started, tmp_path / name) for name in ("whole", "failing"))
    with disk() as counted:
        CHANGES[change](whole, model)
    old, new = live_bytes(path), answers(whole)
    errors = itertools.cycle(ERRORS.values())
    for number in range(1, len(counted.operations) + 1, 3):  # `make torture` tries them all
        failing = disk(number, next(errors))
        with failing, pytest.raises(FolderError, match=r"cannot write to .* then run again"):
            CHANGES[change](path, model)
        left = live_bytes(path)
        if left != old:  # published; what failed then was clearing up
            assert counted.operations[number - 1] in ("fsync", "unlink")
            assert verify(path) == []
            assert answers(path) == new
            path = copied(started, tmp_path / f"failing-{number}")
    assert verify(path) == []
    CHANGES[change](path, model)  # and nothing of the failures is in its way
    assert answers(path) == new
    assert files(path) == live_files(path)


@pytest.mark.parametrize("change", CHANGES)
def test_writes_that_stop_half_way_are_gone_on_with(
    change: str, started: Path, model: Model, tmp_path: Path
) -> None:
    whole, short = (copied(started, tmp_path / name) for name in ("whole", "short"))
    CHANGES[change](whole, model)
    with disk(short=True) as counted:
        CHANGES[change](short, model)
    assert counted.operations.count("pwrite") + counted.operations.count("write") > 2
    assert answers(short) == answers(whole)
    assert verify(short) == []
