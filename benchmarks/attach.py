"""What an attached memory adds to a token that is generated alone (batch 1), by kind of index.

One memory of law with each index in turn, kNN-LM with default settings; greedy, from a prompt of
the test text. The base model and the attached one take turns, and medians are of single tokens.

    python benchmarks/attach.py
"""

import shutil
import statistics
import time
from itertools import islice, pairwise
from typing import Any

import torch

from common import (
    arguments,
    is_built,
    machine,
    memory_of_tokens,
    model_and_tokenizer,
    report,
)
from nearest import Memory, attach, read_documents
from nearest.memory.index_files import IndexChoice
from nearest.memory.writer import rebuild_index


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """The prompt, then each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def token_times(model: Any, prompt: dict[str, Any]) -> list[float]:
    """Milliseconds from each new token to the next."""
    clock = Clock()
    model.generate(**prompt, streamer=clock)
    return [1000 * (b - a) for a, b in pairwise(clock.times[1:])]


def main() -> None:
    options = arguments(
        __doc__, memory_tokens=1_000_000, new=100, rounds=5, indexes="auto,exact,HNSW32"
    )
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    original = memory_of_tokens(options, "law")
    (document,) = islice(read_documents([law / "test.jsonl"]), 1)
    ids = [tokenizer.bos_token_id, *tokenizer(document.text)["input_ids"]][:64]
    prompt: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "max_new_tokens": options.new,
        "min_new_tokens": options.new,
        "pad_token_id": tokenizer.bos_token_id,
    }
    report(**machine(), entries=Memory.open(original).entries)
    for spec in options.indexes.split(","):
        path = original
        if spec != "auto":
            path = original.with_name(f"{original.stem}-{spec}.memory")
            if not is_built(path):
                shutil.copytree(original, path)
                rebuild_index(path, IndexChoice(spec))
        memory = Memory.open(path)

        def attached(memory: Memory = memory) -> list[float]:
            with attach(model, memory, "knn"):
                return token_times(model, prompt)

        attached()
        base_ms, attached_ms = [], []
        for _ in range(options.rounds):
            base_ms += token_times(model, prompt)
            attached_ms += attached()
        middle = statistics.median(base_ms)
        record = memory.segments[0].record.index
        report(
            benchmark="attach",
            index=record.spec,
            nprobe=record.nprobe,
            recall=record.recall,
            base_ms=middle,
            added_ms=statistics.median(attached_ms) - middle,
        )


if __name__ == "__main__":
    main()
