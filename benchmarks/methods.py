"""Every method in one table: perplexity, saved searches and time, on law or on WikiText-2.

The memory is the corpus's training text, everything is tuned on its valid text and scored on the
whole of its test text. RetoMaton is tuned for each `min_knns`, without clusters and with those of
k-means; of these the lowest on valid is the one that others are compared to. "suffix counts" is a
memory without keys (`--keys none`).

    python benchmarks/methods.py --corpus dclaw
    python benchmarks/methods.py --corpus wikitext2
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, compared, machine, memory_of, model_and_tokenizer, report, timed
from nearest import Memory, evaluate, read_documents, read_text, tune
from nearest.build.cluster import KMeans, cluster_memory
from nearest.verbs.results import Result

MIN_KNNS = "1,2,5,20,100,inf"
GATED = "knn+buckets,knn+meta-k,knn+adaptret,knn+mixture,retomaton+mixture"
SKIPS = "0,0.25,0.5,0.75,0.9,1"


def clustered(path: Path, clusters: int) -> Path:
    """A copy of the memory, with clusters."""
    copy = path.with_name(f"{path.stem}-{clusters}-clusters.memory")
    if not copy.exists():
        shutil.copytree(path, copy)
        how = KMeans(clusters, sample=8 * clusters, iterations=5)
        seconds, _ = timed(lambda: cluster_memory(copy, how))
        memory = Memory.open(copy)
        files = [file for one in memory.segments for file in one.record.files.items()]
        suffixes = sum(file.size for name, file in files if name == "suffixes")
        of_clusters = sum(file.size for name, file in files if name.startswith("cluster"))
        report(
            built=copy.name,
            seconds=seconds,
            suffix_bytes_an_entry=suffixes / memory.entries,
            cluster_bytes_an_entry=of_clusters / memory.entries,
        )
    return copy


def main() -> None:
    options = arguments(
        __doc__,
        corpus="dclaw",
        min_knns=MIN_KNNS,
        clusters=20_000,
        clustered_min_knns="1,20",
        gated=GATED,
        skips=SKIPS,
        only="",  # these rows, divided by commas
        keys="int8",  # how keys are stored
    )
    model, tokenizer = model_and_tokenizer()
    path = memory_of(options, options.corpus, keys=options.keys)
    bare = memory_of(options, options.corpus, "-bare", keys="none")
    with_clusters = clustered(path, options.clusters) if options.clustered_min_knns else path
    read = {
        split: read_text(
            model,
            Memory.open(path),
            read_documents([options.corpora / options.corpus / f"{split}.jsonl"]),
            tokenizer=tokenizer,
        )
        for split in ("valid", "test")
    }

    rows: dict[str, Result] = {}

    def row(name: str, method: str, where: Path = path, tuned: Any = None, **settings: Any) -> Any:
        """Tune with these settings fixed, unless None, and score; returns what was tuned."""
        if options.only and name not in options.only.split(","):
            return None
        found = None
        if tuned is not None:
            memory = Memory.open(where)
            seconds, found = timed(
                lambda: tune(model, memory, read["valid"], method=method, **tuned)
            )
            values = {key: str(value) for key, value in found.to_dict().items()}
            report(tuned=name, seconds=seconds, ppl=float(np.exp(found.nll)), **values)
        rows[name] = evaluate(model, Memory.open(where), read["test"], method, **settings)
        against = {
            f"vs_{other}": compared(rows[name], rows[other])
            for other in ("base", "best_retomaton")
            if other in rows
        }
        report(
            benchmark="methods", corpus=options.corpus, row=name, **against, **rows[name].to_dict()
        )
        return found

    report(**machine())
    row("base", "base")
    row("knn", "knn", tuned={})
    best, least, best_min_knns = "", np.inf, 0.0
    for kind, where, values in (
        ("retomaton", path, options.min_knns),
        ("retomaton with clusters", with_clusters, options.clustered_min_knns),
    ):
        for min_knns in map(float, filter(None, values.split(","))):
            name = f"{kind} {min_knns:g}"
            found = row(name, "retomaton", where, tuned={"min_knns": min_knns})
            if found is not None and found.nll < least:
                best, least, best_min_knns = name, found.nll, min_knns
    if best:
        report(best_retomaton_on_valid=best)
        rows["best_retomaton"] = rows[best]
    row("suffix", "suffix", tuned={})
    row("suffix 1024 matches", "suffix", tuned={"suffix_k": 1024})
    row("suffix counts", "suffix", bare, tuned={})
    row("suffix+mixture", "suffix+mixture", tuned={})
    for method in filter(None, options.gated.split(",")):
        fixed = {"min_knns": best_min_knns} if method.startswith("retomaton") else {}
        row(method, method, tuned=fixed)
    for number, skip in enumerate(map(float, options.skips.split(","))):
        row(f"hybrid {skip:g}", "hybrid", tuned=None if number else {}, skip=skip)
    row("hybrid without guard", "hybrid", skip=0.0, guard=False)


if __name__ == "__main__":
    main()
