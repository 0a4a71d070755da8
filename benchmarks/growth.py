"""What memories cost as they grow: 10^5, 10^6 and 10^7 entries, each in a table row and in a plot.

The keys are synthetic, clustered as real ones are: keys of law (`dclaw/train-2m`) in an order by
chance, and from the second round on with noise, so that a copy is about as far from its origin as
the tenth neighbour is. Queries are keys of the test text. Each memory is looked up by a process of
its own: time to open, time of a search of k neighbours (with re-ranking), and memory.

    python benchmarks/growth.py
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import arguments, machine, memory_of, model_and_tokenizer, query_keys, report, timed
from nearest import Memory
from nearest.build.importing import ImportOptions, import_store
from nearest.index.tuning import recall
from nearest.pages.figures import RULE, STYLE, TEAL

BLOCK = 65_536
QUERIES = "growth-queries.npy"
RECALL_QUERIES = 256


def main() -> None:
    options = arguments(
        __doc__,
        sizes="100000,1000000,10000000",
        keys="fp16",
        index="auto",
        k=1024,
        queries=2048,
        rounds=5,
        plot=Path(),
        look_up=Path(),
    )
    if options.look_up.name:
        look_up(options.look_up, options)
        return
    model, tokenizer = model_and_tokenizer()
    source = Memory.open(memory_of(options, "dclaw"))
    np.save(options.work / QUERIES, query_keys(options, options.queries))
    noise = neighbour_distance(source) / np.sqrt(source.keys.dim)
    report(**machine(), source_entries=source.entries, noise=noise)
    rows = []
    for size in map(int, options.sizes.split(",")):
        store = options.work / f"growth-{size}"
        path = store.with_suffix(".memory")
        shutil.rmtree(path, ignore_errors=True)
        write_store(store, source, size, noise)
        choice = ImportOptions(split=True, index=options.index, keys=options.keys)
        seconds, _ = timed(
            lambda store=store, path=path, choice=choice: import_store(
                store, path, model, tokenizer, choice
            )
        )
        shutil.rmtree(store)
        rows.append({"entries": size, "build_s": seconds, **looked_up(path, options)})
        report(benchmark="growth", **rows[-1])
    report(search_growth=rows[-1]["search_ms"] / rows[0]["search_ms"])
    if options.plot.name:
        draw(rows, options.plot)


def neighbour_distance(source: Memory) -> float:
    """How far an entry's tenth neighbour is, the median of some (not squared)."""
    some = np.random.default_rng(1).choice(source.keyed_entries(), RECALL_QUERIES, replace=False)
    found = source.search(source.keys.rows(some), 11)
    return float(np.sqrt(np.median(found.distances[:, -1])))


def write_store(folder: Path, source: Memory, size: int, noise: float) -> None:
    """A datastore of earlier tools with so many entries; their values are the text, shuffled."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng = np.random.default_rng(2)
    (segment,) = source.segments
    bounds = [segment.offsets[number : number + 2] for number in rng.permutation(source.documents)]
    order = np.concatenate([np.arange(start, stop) for start, stop in bounds])
    ends = np.cumsum([stop - start for start, stop in bounds]) - 1
    tokens = np.asarray(segment.tokens)
    values = np.append(tokens[order[1:]], tokens[0])  # of a document's last: the next one's start
    keyed = order.copy()
    keyed[ends] -= 1  # a document's last has no key of its own
    shape = (size, source.keys.dim)
    keys_file = np.memmap(folder / f"dstore_{size}_keys.npy", np.float16, "w+", shape=shape)
    values_file = np.memmap(folder / f"dstore_{size}_vals.npy", np.int32, "w+", shape=(size,))
    for first in range(0, size, BLOCK):
        wanted = np.arange(first, min(first + BLOCK, size))
        rows = source.keys.rows(keyed[wanted % len(order)])
        again = wanted >= len(order)
        rows[again] += rng.normal(scale=noise, size=(again.sum(), rows.shape[1]))
        keys_file[wanted], values_file[wanted] = rows, values[wanted % len(order)]


def looked_up(path: Path, options: Any) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, __file__, "--look-up", str(path), "--work", str(options.work)]
    command += ["--k", str(options.k), "--rounds", str(options.rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def look_up(path: Path, options: Any) -> None:
    """Open a memory, search it, and say what that took."""
    opening, memory = timed(lambda: Memory.open(path))
    before = resident()
    queries = np.load(options.work / QUERIES)
    few = queries[:RECALL_QUERIES]
    first, found = timed(lambda: memory.search(few, options.k))
    index = resident()
    seconds = [timed(lambda: memory.search(queries, options.k))[0] for _ in range(options.rounds)]
    alone = [timed(lambda query=query: memory.search(query[None], options.k))[0] for query in few]
    (segment,) = memory.segments
    exact = segment.exact_index().search(few, options.k)
    record = segment.record.index
    report(
        spec=record.spec,
        nprobe=record.nprobe,
        margin=record.margin,
        recall_of_keys=record.recall,
        recall=recall(found.ids, exact.ids),
        open_s=opening,
        first_search_s=first,
        search_ms=1000 * statistics.median(seconds) / len(queries),
        search_alone_ms=1000 * statistics.median(alone),
        disk_bytes_an_entry=sum(file.size for file in memory.manifest.file_records())
        / memory.entries,
        index_bytes_an_entry=record.file.size / memory.entries if record.file else 0,
        resident_mb={name: (index[name] - before[name]) / 1e6 for name in index},
    )


def bytes_of(memory: Memory) -> int:
    """On the disk."""
    return sum(file.size for file in memory.manifest.file_records())


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and of files that the system may drop."""
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: 1024 * int(status[field].split()[0])
        for name, field in (("own", "RssAnon"), ("files", "RssFile"))
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a search, time to build, and bytes, against entries."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(9, 2.8), layout="constrained")
        entries = [row["entries"] for row in rows]
        for axes, (label, values) in zip(
            drawn.subplots(1, 3),
            (
                ("search, ms a token", [row["search_ms"] for row in rows]),
                ("build, s", [row["build_s"] for row in rows]),
                ("index in memory, MB", [row["resident_mb"]["own"] for row in rows]),
            ),
            strict=True,
        ):
            axes.semilogx(entries, values, color=TEAL, marker="o")
            axes.set_ylim(0, 1.1 * max(values))
            axes.set_xlabel("entries")
            axes.set_ylabel(label)
            axes.grid(color=RULE, linewidth=0.8)
        drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
