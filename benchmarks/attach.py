"""What an attached memory adds to a token that is generated alone (batch 1), by kind of index.

One memory of law with each index in turn, kNN-LM with default settings; greedy, from a prompt of
the test text. The base model and the attached one take turns.

    python benchmarks/attach.py
"""

import shutil
from itertools import islice
from typing import Any

import torch

from common import (
    arguments,
    interleaved,
    is_built,
    machine,
    medians,
    memory_of_tokens,
    model_and_tokenizer,
    report,
    timed,
)
from nearest import Memory, attach, read_documents
from nearest.memory.index_files import IndexChoice
from nearest.memory.writer import rebuild_index


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

        def base() -> float:
            return timed(lambda: model.generate(**prompt))[0]

        def attached(memory: Memory = memory) -> float:
            with attach(model, memory, "knn"):
                return timed(lambda: model.generate(**prompt))[0]

        base()
        attached()
        middle = medians(interleaved(options.rounds, base=base, attached=attached))
        record = memory.segments[0].record.index
        report(
            benchmark="attach",
            index=record.spec,
            nprobe=record.nprobe,
            recall=record.recall,
            base_ms=1000 * middle["base"] / options.new,
            added_ms=1000 * (middle["attached"] - middle["base"]) / options.new,
        )


if __name__ == "__main__":
    main()
