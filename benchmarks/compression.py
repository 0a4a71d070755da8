"""What compressing keys costs in perplexity and gains in bytes and time.

Each compression is made of a copy of one memory (`nearest build … --keys fp16`); λ and temperature
are tuned anew on valid and scored on test, for kNN-LM and for suffix matching.

    python benchmarks/compression.py --memory law.memory --documents 40
"""

import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, machine, model_and_tokenizer, report
from nearest import Memory, evaluate, read_documents, tune
from nearest.memory.compress import Compression, compress_memory

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
    options: Any = arguments(__doc__, memory=Path("law.memory"), documents=40)
    model, tokenizer = model_and_tokenizer()
    texts = {
        name: list(
            islice(read_documents([options.corpora / f"dclaw/{name}.jsonl"]), options.documents)
        )
        for name in ("valid", "test")
    }
    report(**machine(), entries=Memory.open(options.memory).entries)
    for name, how in COMPRESSIONS.items():
        path = options.work / "compressed.memory"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(options.memory, path)
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
            tuned = tune(model, memory, texts["valid"], method=method, tokenizer=tokenizer)
            memory = Memory.open(path)
            result = evaluate(model, memory, texts["test"], method, tokenizer=tokenizer)
            record[method] = {
                "ppl": result.ppl,
                "added_ms": result.added_ms,
                "temperature": tuned.settings.temperature,
                "lam": tuned.settings.lam,
            }
        report(**record)


if __name__ == "__main__":
    main()
