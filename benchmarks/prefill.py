"""What an attached memory adds to the reading of a long prompt (batch 1).

The first token of a text of `--tokens` tokens, law's test documents one after another: by the model
alone and with each method, in turns; medians, and what the method adds in proportion.

    python benchmarks/prefill.py --memory MEMORY --model path/to/SmolLM2-135M-Instruct
"""

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from common import MODEL, arguments, machine, report
from nearest import Memory, attach, read_documents
from nearest.encode.identity import start_token
from nearest.encode.loading import load_model_and_tokenizer


def main() -> None:
    options = arguments(
        __doc__,
        model=str(MODEL),
        memory="",
        methods="suffix,hybrid",
        tokens=4_000,
        rounds=5,
    )
    model, tokenizer = load_model_and_tokenizer(options.model, "float32", "cpu")
    memory = Memory.open(Path(options.memory))
    report(**machine(), entries=memory.entries)
    ids = [start_token(tokenizer)]
    for document in read_documents([options.corpora / "dclaw" / "test.jsonl"]):
        ids += tokenizer(document.text, verbose=False)["input_ids"]
    prompt = torch.tensor([ids[: options.tokens]])

    def seconds(method: str) -> float:
        here: Any = attach(model, memory, method) if method != "base" else nullcontext()
        with here:
            started = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=start_token(tokenizer),
            )
            return time.perf_counter() - started

    sides = ["base", *options.methods.split(",")]
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side in sides:
            taken = seconds(side)
            if number:  # the first round opens files and compiles kernels
                found[side].append(taken)
    medians = {side: statistics.median(taken) for side, taken in found.items()}
    ratios = {
        side: statistics.median(a / b for a, b in zip(found[side], found["base"], strict=True))
        for side in sides[1:]
    }
    report(benchmark="prefill", tokens=options.tokens, seconds=medians, of_base=ratios)


if __name__ == "__main__":
    main()
