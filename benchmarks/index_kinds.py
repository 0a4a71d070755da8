"""Recall and time of kinds of FAISS index over the same keys of law, with queries of its test text.

Recall is of all k exact neighbours, after the candidates were re-ranked by the stored keys; time is
of finding the candidates, FAISS alone.

    python benchmarks/index_kinds.py
"""

import numpy as np

from common import (
    arguments,
    first_documents,
    is_built,
    machine,
    model_and_tokenizer,
    report,
    stream_of_windows,
    timed,
)
from nearest import Memory
from nearest.encode.encoder import Encoder
from nearest.encode.layers import find_key_layer
from nearest.index.approximate import ApproximateIndex, build_index
from nearest.index.neighbours import Neighbours, sort_nearest_first
from nearest.index.tuning import recall

SPECS = (
    "IVF1024,PQ64x4fs;IVF1024,PQ64x4fsr;IVF1024,PQ128x4fs;IVF1024,PQ128x4fsr;RR256,IVF1024,RaBitQfs"
)


def main() -> None:
    options = arguments(
        __doc__, specs=SPECS, memory_tokens=1_000_000, queries=2048, k=1024, candidates=1536
    )
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = options.work / f"attach-{options.memory_tokens}.memory"
    if not is_built(path):
        train = first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens)
        Memory.build(model, tokenizer, train, path)
    (segment,) = Memory.open(path).segments
    keys, ids = segment.keys, segment.searched
    windows = stream_of_windows(
        first_documents(law / "test.jsonl", tokenizer, 20_480), tokenizer, 512
    )
    encoder = Encoder.of(model, find_key_layer(model, "last_ffn_input"))
    made = np.concatenate([rows.numpy() for _, rows in encoder.keys(windows)])
    queries = made[np.random.default_rng(0).permutation(len(made))[: options.queries]]
    few = queries[:512]
    truth = segment.exact_index().search(few, options.k).ids
    report(**machine(), entries=len(ids))
    for spec in options.specs.split(";"):
        built, index = timed(
            lambda spec=spec: build_index(keys, ids, spec, np.random.default_rng(0))
        )
        for nprobe in (8, 16, 32):
            searched = ApproximateIndex(index, keys.metric, nprobe)
            runs = [
                timed(lambda searched=searched: searched.search(queries, options.candidates))
                for _ in range(3)
            ]
            found = runs[0][1].ids[: len(few)]
            ranked = sort_nearest_first(Neighbours(found, keys.distances(few, found)), options.k)
            report(
                index=spec,
                build_s=built,
                nprobe=nprobe,
                recall=recall(ranked.ids, truth),
                ms=1000 * min(seconds for seconds, _ in runs) / len(queries),
            )


if __name__ == "__main__":
    main()
