"""One test text by all: the base, RETROfit, fine-tuned models, and token memories on each.

    python examples/retrofit_law/table.py --model MODEL --work WORK --corpus FOLDER

WORK is the recipe's folder once it is through; models that `finetune.py` left there are rows too.
The memories hold the training text; the one of RETROfit has keys that have seen neighbours, never
of the document itself. Both are tuned on WORK/valid.jsonl. Windows of 512 tokens, 448 of them new.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nearest import Memory, evaluate, read_documents, tune
from nearest.metrics import bootstrap_interval
from nearest.retro.evaluation.evaluate import evaluate_retro
from nearest.retro.lookup import looking_up
from nearest.retro.opening import NeighbouredText, open_retro, open_text

WINDOWS = {"window": 512, "stride": 448}
METHODS = ("knn", "suffix", "hybrid")
READ = {"neighbours": 2, "continuation": 1}


class TableNeighbours:
    """What tables say of the chunks of their texts; other chunks have no neighbours."""

    def __init__(self, texts: list[NeighbouredText]) -> None:
        self._rows: dict[tuple[int, ...], np.ndarray] = {}
        for text in texts:
            chunks, own = text.searched.chunks, text.own.chunks
            ids = text.table.first(READ["neighbours"])
            for start in range(0, len(ids), 4096):
                part = np.arange(start, min(start + 4096, len(ids)))
                asked = own.rows(part)
                found = chunks.rows(ids[part], READ["continuation"])
                for tokens, row in zip(asked.tolist(), found, strict=True):
                    self._rows.setdefault(tuple(tokens), row)
        self._none = np.full_like(found[0], -1)

    def __call__(self, chunks: torch.Tensor) -> torch.Tensor:
        """(n, m) token ids → (n, neighbours, length)."""
        rows = [self._rows.get(tuple(chunk), self._none) for chunk in chunks.tolist()]
        return torch.from_numpy(np.stack(rows)).to(chunks.device)


def memory_of(model: Any, tokenizer: Any, settings: argparse.Namespace, name: str) -> Memory:
    """Of the training text, tuned."""
    path = settings.work / f"{name}.memory"
    valid = list(read_documents([settings.work / "valid.jsonl"]))
    if not path.exists():
        Memory.build(model, tokenizer, read_documents([settings.train]), path, tune=False)
    memory = Memory.open(path)
    for method in METHODS:
        tune(model, memory, valid, method=method, tokenizer=tokenizer, **WINDOWS)
    return memory


def rows(settings: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, summed nll of each test document and its predicted tokens; the base first."""
    test = list(read_documents([settings.corpus / "test.jsonl"]))[: settings.documents]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    options = {"tokenizer": tokenizer, **WINDOWS}
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    memory = memory_of(base, tokenizer, settings, "base")
    for result in evaluate(base, memory, test, ["base", *METHODS], **options):
        yield result.method, result.document_nll, result.document_tokens
    for folder in sorted(settings.work.glob("finetuned-*")):
        tuned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        result = evaluate(tuned, None, test, "base", **options)
        yield folder.name, result.document_nll, result.document_tokens

    fitted, _ = open_retro(settings.work / "run")
    database = str(settings.work / "train.retro")
    texts = [open_text([database])]
    texts += [open_text([database], settings.work / f"{n}.neighbours") for n in ("valid", "test")]
    readings = ["on", "off", "base", "shuffled", "no-continuation"]
    data = texts[-1].dataset(subset=range(len(test)))
    for result in evaluate_retro(fitted, data, texts[-1].table, readings, **READ, **WINDOWS):
        yield f"RETROfit, {result.reading}", result.document_nll, result.document_tokens
    with looking_up(fitted, TableNeighbours(texts)) if settings.together else nullcontext():
        if settings.together:
            memory = memory_of(fitted, tokenizer, settings, "retrofit")
            for result in evaluate(fitted, memory, test, ["base", *METHODS], **options):
                name = f"RETROfit + {result.method}"
                yield name, result.document_nll, result.document_tokens


def main() -> None:
    """Print the table, each row beside the base with a paired interval by document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="in place of FOLDER/train.jsonl")
    parser.add_argument(
        "--documents", type=int, help="of the test text, the first; all if not given"
    )
    parser.add_argument("--together", action="store_true", help="RETROfit with memories, too")
    settings = parser.parse_args()
    settings.train = settings.train or settings.corpus / "train.jsonl"
    base = None
    for name, nll, tokens in rows(settings):
        read = tokens > 0
        base = nll[read] if base is None else base
        count = tokens[read].sum()
        delta = bootstrap_interval(nll[read] - base, tokens[read])
        line = {
            "row": name,
            "tokens": int(count),
            "ppl": float(np.exp(nll.sum() / count)),
            "delta_nll": float((nll[read] - base).sum() / count),
            "low": delta.low,
            "high": delta.high,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
