"""Generation at batch 1 with drafts of memory and text, without them, and by the base model alone.

The memory is made of law. Greedy, in turns: law that is not in the memory (its own domain),
WikiText-2 (another domain) and random tokens. Equal says how many texts are the same with drafts.

    python benchmarks/drafting.py
    python benchmarks/drafting.py --model path/to/SmolLM2-135M-Instruct
"""

import statistics
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from common import MODEL, arguments, first_documents, is_built, machine, report
from nearest import Memory, attach, read_documents
from nearest.encode.identity import start_token
from nearest.encode.loading import load_model_and_tokenizer

METHODS: dict[str, dict[str, Any]] = {"suffix": {}, "retomaton": {"min_knns": 1}, "knn": {}}
SIDES = ("base model", "attached", "with drafts")


def prompts(options: Any, tokenizer: Any, corpus: str) -> list[torch.Tensor]:
    start, length = start_token(tokenizer), options.prompt
    if corpus == "random":
        drawn = np.random.default_rng(0).integers(5, len(tokenizer), (options.prompts, length))
        return [torch.tensor([[start, *row]]) for row in drawn.tolist()]
    texts = read_documents([options.corpora / corpus / "test.jsonl"])
    rows = (tokenizer(one.text, verbose=False)["input_ids"] for one in texts)
    long = [row for row in rows if len(row) > length][: options.prompts]
    return [torch.tensor([[start, *row[:length]]]) for row in long]


def main() -> None:
    options = arguments(
        __doc__,
        model=str(MODEL),
        memory_tokens=400_000,
        prompts=12,
        prompt=48,
        new_tokens=128,
        methods="suffix,retomaton",
    )
    model, tokenizer = load_model_and_tokenizer(options.model, "float32", "cpu")
    path = options.work / f"drafting-{len(tokenizer)}-{options.memory_tokens}.memory"
    if not is_built(path):
        law = options.corpora / "dclaw" / "train-2m.jsonl"
        Memory.build(model, tokenizer, first_documents(law, tokenizer, options.memory_tokens), path)
    memory = Memory.open(path)
    report(**machine(), entries=memory.entries)
    passes = [0]
    model.get_input_embeddings().register_forward_hook(
        lambda *_: passes.__setitem__(0, passes[0] + 1)
    )

    def written(ids: torch.Tensor) -> tuple[list[int], float, int]:
        started, before = time.perf_counter(), passes[0]
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            do_sample=False,
            pad_token_id=start_token(tokenizer),
        )
        return text[0].tolist(), time.perf_counter() - started, passes[0] - before

    for method in options.methods.split(","):
        for corpus in ("dclaw", "wikitext2", "random"):
            found: dict[str, list[Any]] = {side: [] for side in SIDES}
            for number, ids in enumerate(prompts(options, tokenizer, corpus)):
                for side in SIDES:
                    here: Any = nullcontext()
                    if side != "base model":
                        drafts = side == "with drafts"
                        here = attach(model, memory, method, draft=drafts, **METHODS[method])
                    with here:
                        if not number:
                            written(ids)  # what is compiled once
                        found[side].append(written(ids))
            rates = {
                side: statistics.median(options.new_tokens / seconds for _, seconds, _ in rows)
                for side, rows in found.items()
            }
            plain, drafted = found["attached"], found["with drafts"]
            report(
                method=method,
                text=corpus,
                tokens_a_second=rates,
                drafts_of_attached=rates["with drafts"] / rates["attached"],
                drafts_of_base=rates["with drafts"] / rates["base model"],
                tokens_a_pass=options.new_tokens * len(drafted) / sum(row[2] for row in drafted),
                equal=sum(a[0] == b[0] for a, b in zip(plain, drafted, strict=True)),
                texts=len(drafted),
            )


if __name__ == "__main__":
    main()
