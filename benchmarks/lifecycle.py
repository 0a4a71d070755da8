"""What it takes to remove and to update documents, by how many of them and of how many stored.

The documents are tiny and chosen by chance, and the memory has no keys, so that the model's work,
which comes to the same everywhere, is left out. Tokenising the new documents of an update is timed
apart. Every change is made of a fresh copy of one memory.

    python benchmarks/lifecycle.py [--stored 1000000] [--changed 100,10000] [--rounds 3]
"""

import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, is_built, machine, model_and_tokenizer, report, timed
from nearest import Document, Memory
from nearest.corpus.tokens import tokenise
from nearest.encode.identity import token_rules


def main() -> None:
    options = arguments(__doc__, stored=1_000_000, changed="100,10000", rounds=3)
    model, tokenizer = model_and_tokenizer()
    whole = options.work / f"lifecycle-{options.stored}.memory"
    if not is_built(whole):
        seconds, _ = timed(
            lambda: Memory.build(
                model, tokenizer, documents(range(options.stored)), whole, keys="none", tune=False
            )
        )
        report(built=whole.name, seconds=seconds)
    report(**machine(), stored=options.stored)
    path, rng, rows = whole.with_suffix(".copy"), np.random.default_rng(0), {}
    for count in map(int, options.changed.split(",")):
        spent: dict[str, list[float]] = {"remove": [], "update": [], "tokenise": []}
        for _ in range(options.rounds):
            chosen = rng.choice(options.stored, count, replace=False).tolist()
            new = list(documents(chosen, "another"))
            ids = [document.id for document in new]
            spent["tokenise"].append(timed(lambda new=new: tokenised(model, tokenizer, new))[0])
            changes = {
                "remove": lambda memory, ids=ids: memory.remove(ids),
                "update": lambda memory, new=new: memory.update(model, tokenizer, new),
            }
            for name, change in changes.items():
                copy(whole, path)
                memory = Memory.open(path)
                spent[name].append(timed(lambda m=memory, do=change: do(m))[0])
        rows[count] = {name: statistics.median(seconds) for name, seconds in spent.items()}
        report(benchmark="lifecycle", changed=count, **rows[count])
    shutil.rmtree(path, ignore_errors=True)
    few, many = rows[min(rows)], rows[max(rows)]
    for name, aside in (("remove", 0), ("update", 1)):  # apart from encoding
        sides = [row[name] - aside * row["tokenise"] for row in (few, many)]
        report(bar=name, few=sides[0], many=sides[1], ratio=sides[1] / sides[0], at_most=2)


def documents(numbers: Any, text: str = "a") -> Iterator[Document]:
    for number in numbers:
        yield Document(f"doc-{number}", f"{text} case {number}")


def tokenised(model: Any, tokenizer: Any, new: list[Document]) -> int:
    return sum(
        len(one.tokens) for one in tokenise(iter(new), tokenizer, token_rules(model, tokenizer))
    )


def copy(whole: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)


if __name__ == "__main__":
    main()
