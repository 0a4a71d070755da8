"""k-means with every centroid compared, and with those of the nearest lists alone.

python benchmarks/clusters.py --memory law.memory --clusters 20000
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

import nearest.index.clusters
from common import arguments, machine, report
from nearest import Memory
from nearest.index.clusters import Clusters, kmeans_clusters


def spread(memory: Memory, clusters: Clusters) -> float:
    """Mean squared distance of entries to the mean of their cluster."""
    entries = memory.valued_entries()
    labels, rows = clusters.labels[entries], memory.keys.rows(entries)
    counts = np.diff(clusters.offsets)
    means = np.zeros((len(counts), memory.keys.dim), np.float32)
    np.add.at(means, labels, rows)
    means /= np.maximum(counts, 1)[:, None]
    return float(((rows - means[labels]) ** 2).sum(axis=1).mean())


def main() -> None:
    options: Any = arguments(__doc__, memory=Path("law.memory"), clusters=20_000, iterations=2)
    memory = Memory.open(options.memory)
    report(**machine(), entries=memory.entries, clusters=options.clusters)
    for name, exact_up_to in (("all centroids", options.clusters), ("nearest lists", 1)):
        nearest.index.clusters._EXACT_CENTROIDS = exact_up_to
        moments: list[float] = []
        started = time.perf_counter()
        clusters = kmeans_clusters(
            memory.keys,
            memory.valued_entries(),
            memory.positions,
            options.clusters,
            np.random.default_rng(0),
            sample=8 * options.clusters,
            iterations=options.iterations,
            progress=lambda stage, *_, m=moments: m.append(time.perf_counter()),
        )
        sizes = np.diff(clusters.offsets)
        report(
            compared=name,
            seconds=time.perf_counter() - started,
            assignment_us_an_entry=1e6 * (moments[-1] - moments[1]) / memory.entries,
            spread=spread(memory, clusters),
            largest=int(sizes.max()),
            empty=int((sizes == 0).sum()),
        )


if __name__ == "__main__":
    main()
