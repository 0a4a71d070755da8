"""What grows with a corpus or a prompt, and must stay small: time and RAM, each in its own process.

- ids: documents whose ids are checked for repeats, as every build and `add` does.
- positions: of a prompt, replayed by a method that keeps state, with a large vocabulary; beside a
  plain forward pass that gives all logits. The model is tiny and random, so that logits are nearly
  all there is.

    python benchmarks/limits.py [--ids 4000000] [--positions 4096] [--vocabulary 128000]
"""

import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common import arguments, machine, model_and_tokenizer, report, timed
from nearest import Document, Memory, attach
from nearest.corpus.report import CorpusReport
from nearest.corpus.settled import settled

SETTINGS = {"lam": 0.25, "temperature": 10.0, "k": 64, "guard": True}


def main() -> None:
    options = arguments(__doc__, ids=4_000_000, positions=4_096, vocabulary=128_000)
    report(**machine())
    seconds, added = alone(check_ids, options.ids)
    report(bar="ids", ids=options.ids, seconds=seconds, at_most_s=60, mb=added, at_most_mb=200)
    sides = options.positions, options.vocabulary
    seconds, plain = alone(plain_pass, *sides)
    report(side="plain forward pass", seconds=seconds, mb=plain)
    for method in ("retomaton", "knn"):
        seconds, attached = alone(replayed, method, *sides)
        report(bar="positions", method=method, seconds=seconds, mb=attached, above=attached - plain)


def alone(work: Callable[..., tuple[float, float]], *given: Any) -> tuple[float, float]:
    """Run in a new process, whose peak is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def peak_of(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the megabytes by which the process has grown at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, _ = timed(work)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def check_ids(count: int) -> tuple[float, float]:
    documents = (Document(f"doc-{number}", "text") for number in range(count))
    return peak_of(lambda: sum(1 for _ in settled(documents, CorpusReport())))


def model_and_prompt(positions: int, vocabulary: int) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions + 1, n_embd=32, n_layer=1, n_head=2
    )
    model = GPT2LMHeadModel(config).eval()
    prompt = torch.randint(2, 1_000, (1, positions))
    with torch.no_grad():
        model(input_ids=prompt[:, :8])  # what is loaded at the first pass is not counted
    return model, prompt


def plain_pass(positions: int, vocabulary: int) -> tuple[float, float]:
    model, prompt = model_and_prompt(positions, vocabulary)
    with torch.no_grad():
        return peak_of(lambda: model(input_ids=prompt))


def replayed(method: str, positions: int, vocabulary: int) -> tuple[float, float]:
    model, prompt = model_and_prompt(positions, vocabulary)
    _, tokenizer = model_and_tokenizer()
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    texts = [f"the court of case {number} held that it was so" for number in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory.build(model, tokenizer, texts, Path(folder) / "memory", tune=False)
        with attach(model, memory, method, replay="full", **SETTINGS):
            model.generate(prompt[:, :8], **how)
            return peak_of(lambda: model.generate(prompt, **how))


if __name__ == "__main__":
    main()
