"""A hundred additions: whether the last costs as the first, and what reading over them costs."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from memories import MODEL

from conftest import WORDS
from nearest import Document, Memory, evaluate

ADDITIONS, TOKENS, DOCUMENTS = 100, 20_000, 20


def documents(number: int) -> list[Document]:
    """About 20,000 tokens of random words: one a byte."""
    rng = np.random.default_rng(number)
    size = TOKENS // DOCUMENTS
    return [
        Document(f"{number}-{i}", " ".join(rng.choice(WORDS, size=size // 4))[:size])
        for i in range(DOCUMENTS)
    ]


def growth(folder: Path, share: float) -> dict[str, Any]:
    """Times of additions, and of an evaluation before and after compacting."""
    path = folder / "memory"
    memory = Memory.build(*MODEL, documents(0), path)
    times = []
    for number in range(1, max(3, int(ADDITIONS * share)) + 1):
        made = documents(number)
        started = time.perf_counter()
        memory = memory.add(*MODEL, made)
        times.append(time.perf_counter() - started)
    text = documents(10**6)[:2]

    def seconds(method: str) -> float:
        best = []
        for _ in range(3):
            started = time.perf_counter()
            evaluate(MODEL[0], memory, text, method, tokenizer=MODEL[1])
            best.append(time.perf_counter() - started)
        return min(best)

    figures: dict[str, Any] = {"additions": len(times), "entries": memory.entries}
    figures["segments"] = len(memory.segments)
    figures |= {
        "first_s": round(times[0], 2),
        "first_ten_median_s": round(float(np.median(times[:10])), 2),
        "last_ten_median_s": round(float(np.median(times[-10:])), 2),
        "last_s": round(times[-1], 2),
        "slowest_s": round(max(times), 2),
    }
    before = {method: seconds(method) for method in ("knn", "suffix")}
    started = time.perf_counter()
    memory = memory.compact()
    figures["compact_s"] = round(time.perf_counter() - started, 1)
    for method, took in before.items():
        figures[f"{method}_s"] = round(took, 2)
        figures[f"{method}_compacted_s"] = round(seconds(method), 2)
    return figures
