"""What a search among like sources alone (`--encoder-texts`) costs beside the full search.

The model is the translation recipe's, trained first if `--translation` does not hold it; memories
are of more and more of that recipe's pairs. Both searches take turns, with the same settings, while
sentences are scored and while they are written.

    python benchmarks/encoder_texts.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, arguments, is_built, machine, medians, report, timed
from nearest import Document, Memory, evaluate, evaluate_generated, read_text
from nearest.encode.loading import load_model_and_tokenizer

RECIPE = ROOT / "examples/translation"
SETTINGS = {"lam": 0.7, "temperature": 10.0, "k": 16}


def documents_of(rows: list[dict[str, str]]) -> list[Document]:
    return [Document(row["id"], row["text"], encoder_text=row["source"]) for row in rows]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def memory_of_pairs(options: Any, model: Any, tokenizer: Any, count: int) -> Memory:
    """Of the recipe's pairs, but those whose sentences are tested on."""
    path = options.work / f"encoder-texts-{count}.memory"
    if not is_built(path):
        sys.path.insert(0, str(RECIPE))
        from task import pairs, statutes

        held_out = {row["source"] for row in rows_of(options.translation / "test.jsonl")}
        rows = [row for row in pairs(statutes, count, 1) if row["source"] not in held_out]
        Memory.build(model, tokenizer, documents_of(rows), path, tune=False)
    return Memory.open(path)


def main() -> None:
    options = arguments(
        __doc__,
        translation=Path("/tmp/nearest-benchmarks/translation"),
        pairs="2000,20000,80000",
        sentences=100,
        near=16,
        rounds=3,
    )
    if not (options.translation / "model").exists():
        sizes = ("--dim", "64", "--steps", "800", "--methods", "base,suffix")
        command = (sys.executable, RECIPE / "recipe.py", "--work", options.translation, *sizes)
        subprocess.run(list(map(str, command)), check=True)
    model, tokenizer = load_model_and_tokenizer(str(options.translation / "model"))
    texts = documents_of(rows_of(options.translation / "test.jsonl")[: options.sentences])
    searches: dict[str, dict[str, Any]] = {"full": {}, "near": {"encoder_texts": options.near}}
    report(**machine(), sentences=len(texts), near=options.near, **SETTINGS)
    for count in map(int, options.pairs.split(",")):
        memory = memory_of_pairs(options, model, tokenizer, count)
        read = read_text(model, memory, texts, tokenizer=tokenizer)
        first, _ = timed(lambda memory=memory: memory.encoder_texts.entries([[2, 3]], 1))
        added: dict[str, list[float]] = {name: [] for name in searches}
        written: dict[str, list[float]] = {name: [] for name in searches}
        quality: dict[str, dict[str, float]] = {name: {} for name in searches}
        base = evaluate_generated(
            model, None, texts, "base", tokenizer=tokenizer, max_new_tokens=60
        )[0]
        for turn in range(options.rounds + 1):
            for name, among in searches.items():
                scored = evaluate(model, memory, read, "knn", **SETTINGS, **among)
                (wrote,) = evaluate_generated(
                    model,
                    memory,
                    texts,
                    "knn",
                    tokenizer=tokenizer,
                    max_new_tokens=60,
                    **SETTINGS,
                    **among,
                )
                quality[name] = {"nll": scored.nll, "bleu": wrote.scores["bleu"].value}
                if turn:  # the first compiles, and reads files into memory
                    added[name].append(scored.added_ms)
                    written[name].append(wrote.tokens / wrote.seconds)
        report(
            benchmark="encoder_texts",
            pairs=memory.documents,
            entries=memory.entries,
            index=memory.segments[0].record.index.spec,
            tokens=read.text.predictions,
            first_s=first,
            added_ms=medians(added),
            tokens_a_second={"base": base.tokens / base.seconds, **medians(written)},
            full=quality["full"],
            near=quality["near"],
            base_bleu=base.scores["bleu"].value,
        )


if __name__ == "__main__":
    main()
