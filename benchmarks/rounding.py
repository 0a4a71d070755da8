"""What rounding changes in a search of an approximate index: alone, with others, and with noise.

    python benchmarks/rounding.py --memory law.memory

Queries of law's test text are searched one by one; then so many at once; then one by one, with
noise as large as the rounding of a forward pass.
"""

import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Float

from common import arguments, model_and_tokenizer, report
from nearest import Memory, read_documents, read_text
from nearest.index.neighbours import Neighbours

QUERIES, K, NOISE = 2_000, 1_024, 1e-6


def searched(memory: Memory, queries: Float[np.ndarray, "q dim"], at_once: int) -> Neighbours:
    parts = [
        memory.search(queries[first : first + at_once], K)
        for first in range(0, len(queries), at_once)
    ]
    return Neighbours(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def compared(one: Neighbours, other: Neighbours) -> dict[str, int]:
    """Queries for which other entries are found, and how many more these are at the most."""
    new = [len(set(b) - set(a)) for a, b in zip(one.ids.tolist(), other.ids.tolist(), strict=True)]
    return {"queries_that_differ": sum(map(bool, new)), "most_entries": max(new)}


def main() -> None:
    options = arguments(__doc__, memory="")
    model, tokenizer = model_and_tokenizer()
    memory = Memory.open(options.memory)
    test = read_documents([Path(options.corpora) / "dclaw" / "test.jsonl"])
    read = read_text(model, memory, list(itertools.islice(test, 8)), tokenizer=tokenizer)
    queries = np.concatenate([block.queries.keys for block in read.read])[:QUERIES]
    alone = searched(memory, queries, 1)
    for at_once in (5, 32, 512):
        report(
            queries=len(queries),
            at_once=at_once,
            **compared(alone, searched(memory, queries, at_once)),
        )
    noise = NOISE * np.random.default_rng(0).standard_normal(queries.shape)
    noisy = (queries * (1 + noise)).astype(np.float32)
    report(queries=len(queries), noise=NOISE, **compared(alone, searched(memory, noisy, 1)))


if __name__ == "__main__":
    main()
