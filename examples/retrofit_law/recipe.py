"""RETROfit of a small language model on law: from two JSONL files to a table and a page.

    python examples/retrofit_law/recipe.py --model MODEL --corpus FOLDER --work WORK --minutes 60

MODEL is a causal language model; FOLDER holds train.jsonl (to learn from, and to retrieve from),
valid.jsonl and test.jsonl. Every step is a command of `nearest`, which is printed before it runs;
one that is done already is not repeated, and training goes on where it was stopped. Neighbours are
found by words (BM25); with --embedder, by its vectors. Near-duplicates are struck out of them.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FILTERS = ("--longest-run", "32", "--ngram", "13", "--neighbours", "4")
VALIDATED = 40  # documents
READ = ("--neighbours", "2", "--continuations", "1")


def nearest(*words: str | Path) -> list[dict[str, Any]]:
    """Run a command; what it prints as JSON."""
    command = ["retro", *map(str, words), "--json"]
    print(f"\n$ nearest {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "nearest", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines[-1:]:
        print(line, flush=True)
    return [json.loads(line) for line in lines]


def prepare(settings: argparse.Namespace) -> None:
    """Chunks, and the neighbours of all three texts in the training text."""
    database, found = settings.work / "train.retro", ("--method", "bm25")
    source = (settings.train, "--out", database, "--tokenizer", settings.model)
    source += ("--start-token", "--no-end-token")  # as `nearest eval` reads documents
    if settings.embedder is None:
        nearest("chunks", *source)
        nearest("neighbours", database, *found, *FILTERS)
    else:
        found = ("--method", "dense")
        nearest("prepare", *source, "--embedder", settings.embedder, *found, *FILTERS)
    few = settings.work / "valid.jsonl"  # looked at often
    lines = (settings.corpus / "valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(lines[:VALIDATED]), encoding="utf-8")
    for text in (few, settings.corpus / "test.jsonl"):
        table = settings.work / f"{text.stem}.neighbours"
        if not (table / "table.json").exists():
            nearest("neighbours", database, "--queries", text, "--table", table, *found, *FILTERS)


def fit(settings: argparse.Namespace) -> None:
    """As many steps as the minutes hold, by the speed of the first few."""
    database = settings.work / "train.retro"
    words = (
        *("fit", settings.model, database, "--layers", settings.layers, *READ),
        *("--max-len", "512", "--batch-size", "4", "--lr", "3e-3", "--clip", "1"),
        *("--weight-decay", "0.01", "--set", "residual_dropout=0.0"),
        *("--set", "attention_dropout=0.0", "--neighbour-dropout", "0.1"),
    )
    plan = settings.work / "steps.json"
    if not plan.exists():
        speed = settings.work / "speed"
        shutil.rmtree(speed, ignore_errors=True)  # a run that ended tells of its steps no more
        tried = ("--out", speed, "--max-steps", "8", "--log-every", "1")
        steps = [line for line in nearest(*words, *tried) if "tokens_a_second" in line]
        tokens = sum(step["tokens"] for step in steps) / len(steps)
        seconds = tokens / steps[-1]["tokens_a_second"]
        plan.write_text(json.dumps(max(round(settings.minutes * 60 / seconds), 10)))
    count = json.loads(plan.read_text())
    every = str(max(count // 5, 1))
    nearest(
        *(*words, "--out", settings.work / "run", "--max-steps", str(count)),
        *("--schedule", "cosine", "--warmup", str(count // 20), "--save-every", every),
        *("--validation", settings.work / "valid.neighbours", "--validate-every", every),
    )


def report(settings: argparse.Namespace) -> None:
    """Whether neighbours help on the test text, and where."""
    run, database = settings.work / "run", settings.work / "train.retro"
    text = ("--text", settings.work / "test.neighbours", *READ, "--stride", "448")
    readings = "on,off,base,shuffled,no-continuation"
    results = nearest("eval", run, database, *text, "--readings", readings)
    (settings.work / "results.json").write_text(json.dumps(results, indent=1))
    for line in results:
        interval = (
            f"{line['delta_low']:+.4f} … {line['delta_high']:+.4f}" if line["delta_low"] else ""
        )
        print(f"{line['reading']:>16}  ppl {line['ppl']:8.3f}  bpb {line['bpb']:.4f}  {interval}")
    nearest("analyse", run, database, *text, "--out", settings.work / "report")


def main() -> None:
    """Run what is asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="in place of FOLDER/train.jsonl")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--embedder", help="a sentence-transformers model; without it, BM25")
    parser.add_argument("--layers", default="2,5", help="of the model, from 0")
    parser.add_argument("--only", choices=["prepare", "fit", "report"])
    settings = parser.parse_args()
    settings.train = settings.train or settings.corpus / "train.jsonl"
    settings.work.mkdir(parents=True, exist_ok=True)
    for step in (prepare, fit, report):
        if settings.only in (None, step.__name__):
            step(settings)


if __name__ == "__main__":
    main()
