"""The memories that are tortured, what changes them, and what they answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conftest import (
    gates_trained_at_once,
    make_documents,
    make_model,
    make_tokenizer,
    random_documents,
)
from nearest import Document, Memory, tune
from nearest.build.cluster import KMeans, cluster_memory
from nearest.build.compress import Compression, compress_memory
from nearest.build.index import rebuild_index
from nearest.store.parts.index import IndexChoice

MODEL = make_model(), make_tokenizer()
DOCUMENTS = random_documents()
LATER = [Document("later", "what came later, and then more of it")]
TEXT = make_documents(1, 12)


def build(path: Path) -> None:
    """A memory of one segment."""
    Memory.build(*MODEL, DOCUMENTS[:6], path, keys="int8", index="IVF4,SQ8", tune=False)


def furnish(path: Path) -> None:
    """A memory with every kind of file."""
    Memory.build(*MODEL, DOCUMENTS[:6], path, index="IVF4,SQ8", tune=False)
    compress_memory(path, Compression(keys="pq8", pca=16, merge=True))
    cluster_memory(path, KMeans(10))
    memory = Memory.open(path).add(*MODEL, DOCUMENTS[6:]).remove(["doc-2", "doc-7"])
    with gates_trained_at_once():
        tune(MODEL[0], memory, make_documents(5, 40), method="suffix+mixture", tokenizer=MODEL[1])


CHANGES: dict[str, Callable[[Path], Any]] = {
    "add": lambda path: Memory.open(path).add(*MODEL, LATER),
    "update": lambda path: Memory.open(path).update(*MODEL, [Document("doc-1", "another text")]),
    "remove": lambda path: Memory.open(path).remove(["doc-1"]),
    "compact": lambda path: Memory.open(path).compact(),
    "tune": lambda path: tune(
        MODEL[0], Memory.open(path), TEXT, method="suffix", tokenizer=MODEL[1]
    ),
    "index": lambda path: rebuild_index(path, IndexChoice("Flat")),
    "cluster": lambda path: cluster_memory(path, KMeans(7)),
    "compress": lambda path: compress_memory(path, Compression(keys="int8")),
}


def answers(path: Path) -> tuple[Any, ...]:
    """What a generation says, by every access path."""
    memory = Memory.open(path)
    queries = np.random.default_rng(0).normal(scale=3, size=(3, 32)).astype(np.float32)
    context = np.array([0, 100, 101, 102])
    clusters = memory.clusters
    found = memory.search(queries, 6)
    return (
        [memory.document(number).text for number in range(memory.documents)],
        found.ids.tolist(),
        memory.index_distances(queries, found.ids).tolist(),
        memory.longest_matches(context, np.arange(4), 9).ids.tolist(),
        [array.tolist() for array in memory.ngrams(context, np.arange(4), 3)],
        None if clusters is None else clusters.members.tolist(),
        memory.manifest.settings,
        {name: memory.gate(name) for name in memory.manifest.gates},
    )
