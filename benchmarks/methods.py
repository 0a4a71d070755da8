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
from nearest.memory.clustering import KMeans, cluster_memory
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
        suffixes = sum(one.record.files["suffixes"].size for one in memory.segments)
        record = memory.manifest.clusters
        of_clusters = sum(file.size for file in record.files.values()) if record else 0
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
    )
    model, tokenizer = model_and_tokenizer()
    path = memory_of(options, options.corpus)
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

    def tuned(method: str, where: Path = path, **fixed: Any) -> Any:
        seconds, found = timed(
            lambda: tune(model, Memory.open(where), read["valid"], method=method, **fixed)
        )
        values = {name: str(value) for name, value in found.as_json().items()}
        report(tuned=method, seconds=seconds, ppl=float(np.exp(found.nll)), **values)
        return found

    def scored(name: str, method: str, where: Path = path, **settings: Any) -> Result:
        result = evaluate(model, Memory.open(where), read["test"], method, **settings)
        rows[name] = result
        against = {"vs_base": compared(result, rows["base"])}
        if "best retomaton" in rows:
            against["vs_best_retomaton"] = compared(result, rows["best retomaton"])
        report(benchmark="methods", corpus=options.corpus, row=name, **against, **result.as_json())
        return result

    rows: dict[str, Result] = {}
    report(**machine())
    scored("base", "base")
    tuned("knn")
    scored("knn", "knn")
    variants = {}
    for kind, where, values in (
        ("retomaton", path, options.min_knns),
        ("retomaton with clusters", with_clusters, options.clustered_min_knns),
    ):
        for min_knns in map(float, filter(None, values.split(","))):
            found = tuned("retomaton", where, min_knns=min_knns)
            name = f"{kind}, min_knns {min_knns:g}"
            scored(name, "retomaton", where)
            variants[name] = (found.nll, min_knns)
    best = min(variants, key=lambda name: variants[name])
    report(best_retomaton_on_valid=best)
    rows["best retomaton"] = rows[best]
    tuned("suffix")
    scored("suffix", "suffix")
    tuned("suffix", matches=1024)
    scored("suffix 1024 matches", "suffix")
    tuned("suffix", bare)
    scored("suffix counts", "suffix", bare)
    tuned("suffix+mixture")
    scored("suffix+mixture", "suffix+mixture")
    for method in filter(None, options.gated.split(",")):
        fixed = {"min_knns": variants[best][1]} if method.startswith("retomaton") else {}
        tuned(method, **fixed)
        scored(method, method)
    tuned("hybrid")
    for skip in map(float, options.skips.split(",")):
        scored(f"hybrid skip {skip:g}", "hybrid", skip=skip)
    scored("hybrid without guard", "hybrid", skip=0.0, guard=False)


if __name__ == "__main__":
    main()
