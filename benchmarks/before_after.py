"""What evaluation and attachment add, by two versions of this code in turns, with one memory.

Each round runs both, each in a process of its own. The memory must be one that both open, so let
the older version build it. A time is the median of the rounds.

    python benchmarks/before_after.py --before path/to/an/older/checkout --memory law.memory
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "src" / "nearest" / "demo" / "general-gpt2-7m"
METHODS = ("knn", "retomaton", "suffix")
PROMPT = 64  # tokens


def run_once(options: argparse.Namespace) -> None:
    """One version's figures, with the names that all versions have."""
    from nearest import Memory, attach, evaluate, read_documents

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    memory = Memory.open(options.memory)
    texts = [options.corpora / "dclaw" / "test.jsonl"]
    documents = list(islice(read_documents(texts), options.documents))
    start = tokenizer(documents[0].text, return_tensors="pt")["input_ids"][:, :PROMPT]

    def seconds() -> float:
        begun = time.perf_counter()
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=options.new,
            min_new_tokens=options.new,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - begun

    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        settings: dict[str, Any] = {"lam": 0.8, "temperature": 8.0}
        for warm in (False, True):  # the first opens files and compiles kernels
            scored = evaluate(model, memory, documents, method, tokenizer=tokenizer, **settings)
            with attach(model, memory, method, **settings):
                attached = min(seconds() for _ in range(3 if warm else 1))
            alone = min(seconds() for _ in range(3 if warm else 1))
        found[method] = {
            "ppl": scored.ppl,
            "evaluate_ms": scored.added_ms,
            "attach_ms": 1000 * (attached - alone) / options.new,
        }
    print(json.dumps(found))


def in_turns(options: argparse.Namespace) -> None:
    """Both versions, one after the other, so many times."""
    sides = {"before": options.before.resolve(), "after": ROOT}
    seen: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for side, checkout in sides.items():
            told = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--once"],
                env={**os.environ, "PYTHONPATH": str(checkout / "src")},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            for method, figures in json.loads(told.stdout.splitlines()[-1]).items():
                for name, figure in figures.items():
                    seen[method, name, side].append(figure)
    for method in METHODS:
        medians = {
            f"{name}_{side}": statistics.median(seen[method, name, side])
            for name in ("ppl", "evaluate_ms", "attach_ms")
            for side in sides
        }
        print(json.dumps({"benchmark": "before_after", "method": method, **medians}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of another version")
    parser.add_argument("--memory", type=Path, required=True, help="a folder that both can open")
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "corpora")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    (run_once if options.once else in_turns)(options)


if __name__ == "__main__":
    main()
