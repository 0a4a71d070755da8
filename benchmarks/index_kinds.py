"""Recall and time of kinds of FAISS index over the same keys of law, with queries of its test text.

Recall is of all k exact neighbours, after the candidates were re-ranked by the stored keys; time is
of finding the candidates, FAISS alone.

    python benchmarks/index_kinds.py
"""

import numpy as np

from common import arguments, machine, memory_of_tokens, query_keys, report, timed
from nearest import Memory
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import build_index, code_bytes
from nearest.index.neighbours import Neighbours, sort_nearest_first
from nearest.index.tuning import recall

SPECS = (
    "IVF1024,PQ64x4fs;IVF1024,PQ64x4fsr;IVF1024,PQ128x4fs;IVF1024,PQ128x4fsr;RR256,IVF1024,RaBitQfs"
)


def main() -> None:
    options = arguments(
        __doc__, specs=SPECS, memory_tokens=1_000_000, queries=2048, k=1024, candidates=1536
    )
    (segment,) = Memory.open(memory_of_tokens(options, "law")).segments
    keys, ids = segment.keys, segment.searched
    queries = query_keys(options, options.queries)
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
                bytes_an_entry=code_bytes(spec, keys.dim) + 8,
                nprobe=nprobe,
                recall=recall(ranked.ids, truth),
                ms=1000 * min(seconds for seconds, _ in runs) / len(queries),
            )


if __name__ == "__main__":
    main()
