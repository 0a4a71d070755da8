"""A hundred additions: whether the last costs as the first, and what reading over them costs.

With the model that ships for the demo, and sentences of Python's reference in random order: each
stands in the memory about twenty times, as statutes and manuals repeat theirs.
"""

import re
import shutil
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from nearest import Document, Memory, evaluate
from nearest.demo.corpus import split_topics
from nearest.demo.run import MODEL
from nearest.encode.loading import load_model_and_tokenizer

ADDITIONS, DOCUMENTS, CHARACTERS = 100, 20, 3_300  # an addition is about 20,000 tokens
METHODS = ("knn", "retomaton", "suffix")
ROUNDS = 3


def documents(sentences: list[str], number: int) -> list[Document]:
    """Twenty documents of random sentences, the same ones for the same number."""
    rng = np.random.default_rng(number)
    made = []
    for i in range(DOCUMENTS):
        text = ""
        while len(text) < CHARACTERS:
            text += sentences[rng.integers(len(sentences))] + " "
        made.append(Document(f"{number}-{i}", text))
    return made


def growth(folder: Path, share: float) -> dict[str, Any]:
    """Times of additions, and of evaluations over the memory and a compacted copy in turns."""
    split = split_topics(topics)
    sentences = re.split(r"(?<=[.:])\s+", "\n".join(document.text for document in split.memory))
    model, tokenizer = load_model_and_tokenizer(str(MODEL))
    memory = Memory.build(model, tokenizer, documents(sentences, 0), folder / "memory", tune=False)
    times = []
    for number in range(1, max(3, int(ADDITIONS * share)) + 1):
        made = documents(sentences, number)
        started = time.perf_counter()
        memory = memory.add(model, tokenizer, made)
        times.append(time.perf_counter() - started)
    compacted = Memory.open(shutil.copytree(memory.path, folder / "compacted"))
    started = time.perf_counter()
    compacted = compacted.compact()
    compacting = time.perf_counter() - started

    def seconds(memory: Memory, method: str) -> float:
        started = time.perf_counter()
        evaluate(model, memory, split.test[:5], method, tokenizer=tokenizer)
        return time.perf_counter() - started

    figures: dict[str, Any] = {
        "additions": len(times),
        "entries": memory.entries,
        "segments": len(memory.segments),
        "first_s": round(times[0], 2),
        "first_ten_median_s": round(statistics.median(times[:10]), 2),
        "last_ten_median_s": round(statistics.median(times[-10:]), 2),
        "last_s": round(times[-1], 2),
        "slowest_s": round(max(times), 2),
        "compact_s": round(compacting, 1),
    }
    for method in METHODS:
        rounds = [(seconds(memory, method), seconds(compacted, method)) for _ in range(ROUNDS + 1)]
        grown, whole = (statistics.median(side) for side in zip(*rounds[1:], strict=True))
        figures[method] = {
            "grown_s": round(grown, 2),
            "compacted_s": round(whole, 2),
            "ratio": round(grown / whole, 2),
        }
    return figures
