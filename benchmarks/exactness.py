"""nll with the exact index against an independent brute force on real text.

The other side shares no code with nearest and reads none of its files: it tokenises the same
documents, runs the model on one window at a time for keys and queries alike, and compares every
query with every key in one matrix product (float32; the k nearest are measured again in float64).

    python benchmarks/exactness.py            # a quarter of an hour on 2 cores
"""

import math
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from common import arguments, first_documents, model_and_tokenizer, report, timed
from nearest import Document, Memory, evaluate

LAM, TEMPERATURE, K = 0.8, 10.0, 1024


def token_ids(documents: list[Document], tokenizer: Any) -> list[np.ndarray]:
    return [
        np.array([tokenizer.bos_token_id, *tokenizer(d.text, verbose=False)["input_ids"]])
        for d in documents
    ]


def read(
    model: Any, document: np.ndarray, window: int, stride: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(keys, logits, targets) of the new positions of each window: each token once."""
    seen: list[torch.Tensor] = []
    module = model.transformer.h[-1].mlp.c_fc
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    inputs, done = document[:-1], 0
    for start in range(0, len(inputs), stride):
        part = torch.from_numpy(inputs[start : start + window])
        if start + len(part) <= done:
            break
        seen.clear()
        logits = model(input_ids=part[None]).logits[0]
        new = slice(done - start, None)
        targets = torch.from_numpy(document[done + 1 : start + len(part) + 1])
        yield seen[0][new], logits[new], targets
        done = start + len(part)
    handle.remove()


def brute_force_nll(
    model: Any, memory: list[np.ndarray], text: list[np.ndarray], window: int, stride: int
) -> float:
    """Mean nll in nats."""
    pairs = [
        (keys.half(), targets)
        for document in memory
        for keys, _, targets in read(model, document, window, stride)
    ]
    keys = torch.cat([part for part, _ in pairs])
    values = torch.cat([part for _, part in pairs])
    norms = (keys.float() ** 2).sum(1)
    total, count = 0.0, 0
    for document in text:
        for queries, logits, targets in read(model, document, window, stride):
            lm = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0].exp()
            rough = norms - 2 * (queries @ keys.float().T)
            nearest = rough.topk(K, largest=False).indices
            gaps = keys[nearest].double() - queries[:, None].double()
            weights = torch.softmax(-(gaps**2).sum(-1) / TEMPERATURE, -1)
            knn = (weights * (values[nearest] == targets[:, None])).sum(-1)
            total -= (LAM * knn + (1 - LAM) * lm).log().sum().item()
            count += len(targets)
    return total / count


def main() -> None:
    options = arguments(__doc__, memory_tokens=500_000, test_tokens=20_000)
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = options.work / "exactness.memory"
    shutil.rmtree(path, ignore_errors=True)
    train = list(first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens))
    memory = Memory.build(model, tokenizer, train, path, keys="fp16", index="exact")
    test = list(first_documents(law / "test.jsonl", tokenizer, options.test_tokens))
    seconds, ours = timed(
        lambda: evaluate(
            model, memory, test, tokenizer=tokenizer, lam=LAM, temperature=TEMPERATURE, k=K
        )
    )
    keys = memory.manifest.keys
    with torch.inference_mode():
        expected = brute_force_nll(
            model,
            token_ids(train, tokenizer),
            token_ids(test, tokenizer),
            keys.window,
            keys.stride,
        )
    report(
        benchmark="exactness",
        entries=memory.entries,
        tokens=ours.tokens,
        nll=ours.nll,
        brute_force_nll=expected,
        relative_difference=abs(ours.nll - expected) / expected,
        ppl=ours.ppl,
        brute_force_ppl=math.exp(expected),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
