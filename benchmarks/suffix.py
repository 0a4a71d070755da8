"""What methods without dense searches add to a token on one core, with int8 keys.

The memory is a copy of the law memory of methods.py with its keys as int8, tuned as it is there;
everything runs on one core.

    python benchmarks/suffix.py
"""

import os
import shutil
import statistics

import faiss
import torch

from common import arguments, is_built, machine, memory_of, model_and_tokenizer, report
from nearest import Memory, evaluate, read_documents, read_text, tune
from nearest.build.compress import Compression, compress_memory

METHODS = {
    "suffix, 256 matches": ("suffix", {"suffix_k": 256}),
    "suffix, 1024 matches": ("suffix", {"suffix_k": 1024}),
    "suffix+mixture": ("suffix+mixture", {}),
    "hybrid, skip 1": ("hybrid", {"skip": 1.0}),
}


def main() -> None:
    options = arguments(__doc__, documents=40, rounds=5)
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = options.work / "dclaw-int8.memory"
    if not is_built(path):
        shutil.copytree(memory_of(options, "dclaw"), path)
        compress_memory(path, Compression(keys="int8"))
        valid = read_text(
            model, Memory.open(path), read_documents([law / "valid.jsonl"]), tokenizer=tokenizer
        )
        for method in ("suffix", "suffix+mixture", "hybrid"):
            tune(model, Memory.open(path), valid, method=method)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    memory = Memory.open(path)
    texts = list(read_documents([law / "test.jsonl"]))[: options.documents]
    read = read_text(model, memory, texts, tokenizer=tokenizer)
    report(**machine(), cores=1, entries=memory.entries, tokens=read.text.predictions)
    for name, (method, settings) in METHODS.items():
        results = [
            evaluate(model, memory, read, method, **settings) for _ in range(options.rounds + 1)
        ][1:]  # the first compiles, and reads the files into memory
        report(
            benchmark="suffix",
            method=name,
            ppl=results[0].ppl,
            foss=results[0].foss,
            added_ms=statistics.median(result.added_ms for result in results),
        )


if __name__ == "__main__":
    main()
