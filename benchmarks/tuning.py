"""How long tuning takes, and what a memory predicts that nobody tuned.

A gate for hybrid is trained on law's valid text with a memory of 2,000 documents, and on its first
10,000 tokens; the hybrid's perplexity on test follows. Then kNN-LM with the paper's settings, with
those that the memory found on its own text at building, and with those found on valid.

    OMP_NUM_THREADS=2 taskset -c 0,1 python benchmarks/tuning.py
"""

import itertools
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from common import arguments, first_documents, is_built, machine, model_and_tokenizer, report, timed
from nearest import Memory, evaluate, read_documents, tune
from nearest.verbs.self_tune import self_tune


def built(path: Path, corpus: Path, documents: int, model: Any, tokenizer: Any) -> None:
    """Without self-tuning, which is timed apart."""
    if not is_built(path):
        train = itertools.islice(read_documents([corpus / "train-2m.jsonl"]), documents)
        seconds, memory = timed(lambda: Memory.build(model, tokenizer, train, path, tune=False))
        report(built=path.name, entries=memory.entries, seconds=seconds)


def main() -> None:
    options = arguments(__doc__, documents=2_000, few=10_000, only="hybrid,self")
    model, tokenizer = model_and_tokenizer()
    corpus = options.corpora / "dclaw"
    path = options.work / f"tuning-{options.documents}.memory"
    built(path, corpus, options.documents, model, tokenizer)
    valid, test = (list(read_documents([corpus / f"{name}.jsonl"])) for name in ("valid", "test"))
    few = list(first_documents(corpus / "valid.jsonl", tokenizer, options.few))
    report(**machine())
    for name, text in (("all", valid), ("few", few)) if "hybrid" in options.only else ():
        memory = copied(path, f"hybrid-{name}")
        work = partial(tune, model, memory, text, method="hybrid", tokenizer=tokenizer)
        seconds, tuned = timed(work)
        report(tuned="hybrid", text=name, tokens=tuned.tokens, seconds=seconds, nll=tuned.nll)
        for skip in (0.0, 0.5) if name == "all" else ():
            result = evaluate(model, memory, test, "hybrid", tokenizer=tokenizer, skip=skip)
            report(text="test", skip=skip, **result.to_dict())
    if "self" not in options.only:
        return
    memories = {name: copied(path, name) for name in ("paper", "self-tuned", "tuned")}
    seconds, _ = timed(lambda: self_tune(model, memories["self-tuned"], tokenizer))
    report(self_tuned=path.name, seconds=seconds)
    for method in ("knn", "suffix"):
        tune(model, memories["tuned"], valid, method=method, tokenizer=tokenizer)
        for name, memory in memories.items():
            result = evaluate(model, memory, test, method, tokenizer=tokenizer)
            report(settings=name, text="test", **result.to_dict())


def copied(path: Path, name: str) -> Memory:
    """A copy to be tuned, so that the memory stays as it was built."""
    copy = path.with_name(f"{path.stem}-{name}.memory")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    return Memory.open(copy)


if __name__ == "__main__":
    main()
