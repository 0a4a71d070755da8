"""How long 1,536 scattered keys take to be measured, by the pages that their file lies in.

The same keys (random, fp16) in two files: one as the system keeps what has just been written, the
other as a memory's are, given back to the disk when written and read anew in large pages. What a
large page is worth depends on kernel and file system; where there are none, both sides are alike.

    python benchmarks/pages.py
"""

import statistics
from pathlib import Path

import numpy as np

from common import arguments, machine, report, timed
from nearest.folder import ArrayFile, open_array
from nearest.index.distances import key_distances

FLOAT16 = np.dtype(np.float16)


def large_pages() -> int:
    """Bytes of files that the system keeps in large pages."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("FileHugePages"))


def main() -> None:
    options = arguments(__doc__, entries=1_000_000, dim=256, rounds=100, candidates=1536)
    before = large_pages()
    rng, shape = np.random.default_rng(0), (options.entries, options.dim)
    paths = {name: options.work / f"pages-{name}.npy" for name in ("written", "as_memories_are")}
    with ArrayFile(paths["as_memories_are"], FLOAT16, shape[1:], rows=shape[0]) as to:
        for first in range(0, shape[0], 1000):
            to.write(first, rng.normal(size=(min(1000, shape[0] - first), shape[1])))
    written = paths["written"]
    with paths["as_memories_are"].open("rb") as source, written.open("wb", buffering=0) as copy:
        while piece := source.read(512_000):
            copy.write(piece)
    keys = {
        "written": np.load(written, mmap_mode="r").view(np.ndarray),
        "as_memories_are": open_array(paths["as_memories_are"], FLOAT16, shape),
    }
    for array in keys.values():
        array[:, ::64].astype(np.float32).sum()  # all is in memory, and mapped
    query = rng.normal(size=(1, shape[1])).astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in keys}
    for _ in range(options.rounds):
        ids = rng.integers(0, shape[0], (1, options.candidates))
        for name, array in keys.items():
            seconds[name].append(
                timed(lambda array=array, ids=ids: key_distances(array, query, ids, "l2"))[0]
            )
    medians = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
    report(
        benchmark="pages",
        microseconds=medians,
        ratio=medians["as_memories_are"] / medians["written"],
        more_in_large_pages=large_pages() - before,
        **machine(),
    )
    for path in paths.values():
        path.unlink()


if __name__ == "__main__":
    main()
