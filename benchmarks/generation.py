"""Tokens a second of greedy generation at batch 1, with and without a memory, prefixes of 4,000.

The model has 100M random weights (Llama, 12 layers of 768, the demo model's tokenizer); the memory
is made of law. What is measured is what attaching costs a token, not what is written.

    python benchmarks/generation.py
"""

import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import (
    arguments,
    first_documents,
    interleaved,
    is_built,
    machine,
    model_and_tokenizer,
    report,
)
from nearest import Memory, attach, tune

METHODS: dict[str, dict[str, Any]] = {
    "suffix": {},
    "hybrid": {"skip": 1.0},
    "retomaton": {"min_knns": 1},
    "knn": {},
}


def large_model(vocab_size: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    options = arguments(
        __doc__, memory_tokens=60_000, prefix=4_000, new_tokens=48, rounds=11, keys="int8"
    )
    _, tokenizer = model_and_tokenizer()
    model = large_model(len(tokenizer))
    law = options.corpora / "dclaw"
    path = options.work / f"generation-{options.memory_tokens}-{options.keys}.memory"
    if not is_built(path):
        train = first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens)
        Memory.build(model, tokenizer, train, path, keys=options.keys)
        valid = list(first_documents(law / "valid.jsonl", tokenizer, 2_000))
        tune(model, Memory.open(path), valid, method="hybrid", tokenizer=tokenizer)
    memory = Memory.open(path)
    text = [document.text for document in first_documents(law / "test.jsonl", tokenizer, 8_000)]
    ids = tokenizer("\n".join(text), return_tensors="pt")["input_ids"][:, : options.prefix]

    def seconds_a_token() -> float:
        """Of the tokens after the first, so that reading the prefix does not count."""
        times: list[float] = []

        class Clock:
            def put(self, _: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=Clock(),
        )
        return statistics.median(np.diff(times[2:]))

    def with_method(method: str, settings: dict[str, Any]) -> float:
        with attach(model, memory, method, **settings):
            return seconds_a_token()

    sides = {"base": seconds_a_token}
    for name, settings in METHODS.items():
        sides[name] = lambda name=name, settings=settings: with_method(name, settings)
        with_method(name, settings)  # compiles before anything is timed
    seconds = interleaved(options.rounds, **sides)
    middle = {name: statistics.median(values) for name, values in seconds.items()}

    def of_base(name: str) -> float:
        """The median over rounds: the machine is the same within one, and not over all."""
        pairs = zip(seconds["base"], seconds[name], strict=True)
        return statistics.median(base / with_memory for base, with_memory in pairs)

    report(
        benchmark="generation",
        entries=memory.entries,
        parameters=sum(weight.numel() for weight in model.parameters()),
        prefix=ids.shape[1],
        tokens_a_second={name: 1 / value for name, value in middle.items()},
        of_base={name: of_base(name) for name in middle},
        added_ms={name: 1000 * (value - middle["base"]) for name, value in middle.items()},
        **machine(),
    )


if __name__ == "__main__":
    main()
