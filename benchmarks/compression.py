"""What compressing keys costs in perplexity and gains in bytes and time.

Each compression is made of a copy of one memory (`nearest build … --keys fp16`); λ and temperature
are tuned anew on valid and scored on test, for kNN-LM and for suffix matching.

    python benchmarks/compression.py [--memory-tokens 300000] [--documents 40] [--only "fp16;int8"]
"""

import shutil
import time
from itertools import islice
from typing import Any

import numpy as np

from common import arguments, machine, memory_of, memory_of_tokens, model_and_tokenizer, report
from nearest import Memory, evaluate, read_documents, read_text, tune
from nearest.build.compress import Compression, compress_memory

COMPRESSIONS = {
    "fp16": None,
    "int8": Compression(keys="int8"),
    "pca 128": Compression(pca=128),
    "pca 128, int8": Compression(pca=128, keys="int8"),
    "pq64": Compression(keys="pq64"),
    "pq32": Compression(keys="pq32"),
    "merge": Compression(merge=True),
}
CANDIDATES = 256


def microseconds_a_query(memory: Memory, rounds: int = 400) -> float:
    """Distances from one query at a time to candidates scattered over the memory; the median."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(rounds, memory.keys_record.dim)).astype(np.float32)
    ids = rng.choice(memory.valued_entries(), size=(rounds, CANDIDATES))
    seconds = []
    for i in range(rounds):
        started = time.perf_counter()
        memory.key_distances(queries[i : i + 1], ids[i : i + 1])
        seconds.append(time.perf_counter() - started)
    return 1e6 * float(np.median(seconds))


def main() -> None:
    options: Any = arguments(__doc__, documents=10_000, memory_tokens=0, only="")
    model, tokenizer = model_and_tokenizer()
    some = options.memory_tokens
    original = memory_of_tokens(options, "law") if some else memory_of(options, "dclaw")
    read = {}
    for split in ("valid", "test"):
        texts = islice(
            read_documents([options.corpora / f"dclaw/{split}.jsonl"]), options.documents
        )
        read[split] = read_text(model, Memory.open(original), texts, tokenizer=tokenizer)
    report(**machine(), entries=Memory.open(original).entries)
    for name, how in COMPRESSIONS.items():
        if options.only and name not in options.only.split(";"):
            continue
        path = options.work / "compressed.memory"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(original, path)
        started = time.perf_counter()
        if how is not None:
            compress_memory(path, how)
        seconds = time.perf_counter() - started
        memory = Memory.open(path)
        (segment,) = memory.manifest.segments
        stored = sum(
            file.size
            for kind, file in segment.files.items()
            if kind in ("keys", "scales", "rows", "weights")
        )
        record: dict[str, Any] = {
            "keys": name,
            "key_bytes": stored / memory.entries,
            "index_bytes": segment.index.file.size / memory.entries if segment.index.file else 0,
            "seconds": seconds,
            "distances_us": microseconds_a_query(memory),
        }
        for method in ("knn", "suffix"):
            tuned = tune(model, memory, read["valid"], method=method)
            memory = Memory.open(path)
            result = evaluate(model, memory, read["test"], method)
            record[method] = {
                "ppl": result.ppl,
                "added_ms": result.added_ms,
                "temperature": tuned.settings.temperature,
                "lam": tuned.settings.lam,
            }
        report(**record)


if __name__ == "__main__":
    main()
