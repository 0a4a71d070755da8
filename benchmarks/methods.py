"""Every method in one table: perplexity, saved searches and time, on law or on WikiText-2.

The memory is the corpus's training text, everything is tuned on its valid text and scored on the
whole of its test text. RetoMaton is tuned for each `min_knns`; of these the lowest on valid is the
one that others are compared to. "suffix counts" is a memory without keys (`--keys none`).

    python benchmarks/methods.py --corpus dclaw
    python benchmarks/methods.py --corpus wikitext2
"""

from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, machine, model_and_tokenizer, report, timed
from nearest import Memory, evaluate, read_documents, read_text, tune
from nearest.metrics import bootstrap_interval
from nearest.verbs.results import Result

TRAIN = {"dclaw": "train-2m.jsonl", "wikitext2": "train.jsonl"}
MIN_KNNS = "1,2,5,20,100,inf"
GATED = "knn+buckets,knn+meta-k,knn+adaptret,knn+mixture,retomaton+mixture"
SKIPS = "0,0.25,0.5,0.75,0.9,1"


def memory_of(corpus: Path, name: str, path: Path, **options: Any) -> Path:
    if not path.exists():
        model, tokenizer = model_and_tokenizer()
        documents = read_documents([corpus / TRAIN[name]])
        seconds, memory = timed(lambda: Memory.build(model, tokenizer, documents, path, **options))
        report(built=str(path.name), entries=memory.entries, seconds=seconds)
    return path


def compared(row: Result, to: Result) -> dict[str, float | None]:
    """The paired interval of the difference in nll a token."""
    difference = row.document_nll - to.document_nll
    low, high = bootstrap_interval(difference, row.document_tokens)
    mean = float(difference.sum() / row.document_tokens.sum())
    return {"delta_nll": mean, "delta_low": low, "delta_high": high}


def main() -> None:
    options = arguments(__doc__, corpus="dclaw", min_knns=MIN_KNNS, gated=GATED, skips=SKIPS)
    model, tokenizer = model_and_tokenizer()
    corpus = options.corpora / options.corpus
    path = memory_of(corpus, options.corpus, options.work / f"{options.corpus}.memory")
    bare = memory_of(
        corpus, options.corpus, options.work / f"{options.corpus}-bare.memory", keys="none"
    )
    read = {
        split: read_text(
            model,
            Memory.open(path),
            read_documents([corpus / f"{split}.jsonl"]),
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
    by_min_knns = {}
    for min_knns in map(float, options.min_knns.split(",")):
        found = tuned("retomaton", min_knns=min_knns)
        by_min_knns[min_knns] = found.nll
        scored(f"retomaton min_knns {min_knns:g}", "retomaton")
    best = min(by_min_knns, key=lambda min_knns: by_min_knns[min_knns])
    rows["best retomaton"] = rows[f"retomaton min_knns {best:g}"]
    tuned("suffix")
    scored("suffix", "suffix")
    tuned("suffix", matches=1024)
    scored("suffix 1024 matches", "suffix")
    tuned("suffix", bare)
    scored("suffix counts", "suffix", bare)
    tuned("suffix+mixture")
    scored("suffix+mixture", "suffix+mixture")
    for method in filter(None, options.gated.split(",")):
        fixed = {"min_knns": best} if method.startswith("retomaton") else {}
        tuned(method, **fixed)
        scored(method, method)
    tuned("hybrid")
    for skip in map(float, options.skips.split(",")):
        scored(f"hybrid skip {skip:g}", "hybrid", skip=skip)
    scored("hybrid without guard", "hybrid", skip=0.0, guard=False)


if __name__ == "__main__":
    main()
