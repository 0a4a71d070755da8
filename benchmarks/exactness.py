"""nll with the exact index against an independent brute force on real text.

The other side shares no code with nearest: it reads the arrays with numpy, runs the model on one
window at a time, and compares every query with every key in one matrix product (float32; the k
nearest are then measured again in float64).

    python benchmarks/exactness.py            # ten minutes on 2 cores
"""

import math
import shutil
from itertools import pairwise

import numpy as np
import torch

from common import arguments, first_documents, model_and_tokenizer, report, timed
from nearest import Memory, evaluate

LAM, TEMPERATURE, K = 0.8, 10.0, 1024


def brute_force_nll(folder, model, documents: list[np.ndarray], window: int, stride: int) -> float:
    """Mean nll in nats; windows by their definition: each token once, the earliest that can."""
    tokens, offsets = np.load(folder / "tokens.npy"), np.load(folder / "offsets.npy")
    ids = np.concatenate([np.arange(a, b - 1) for a, b in pairwise(offsets)])
    keys = torch.from_numpy(np.load(folder / "keys.npy")[ids])
    values = torch.from_numpy(tokens[ids + 1].astype(np.int64))
    norms = (keys.float() ** 2).sum(1)
    seen = []
    model.transformer.h[-1].mlp.c_fc.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    total, count = 0.0, 0
    for document in documents:
        inputs, done = document[:-1], 0
        for start in range(0, len(inputs), stride):
            part = torch.from_numpy(inputs[start : start + window])
            if start + len(part) <= done:
                break
            seen.clear()
            logits = model(input_ids=part[None]).logits[0].double()
            new = slice(done - start, None)
            queries, targets = seen[0][0][new], torch.from_numpy(document[done + 1 :][: len(part)])
            targets = targets[: len(queries)]
            lm = logits[new].log_softmax(-1).gather(-1, targets[:, None])[:, 0].exp()
            rough = norms - 2 * (queries @ keys.float().T)
            nearest = rough.topk(K, largest=False).indices
            gaps = keys[nearest].double() - queries[:, None].double()
            weights = torch.softmax(-(gaps**2).sum(-1) / TEMPERATURE, -1)
            knn = (weights * (values[nearest] == targets[:, None])).sum(-1)
            total -= (LAM * knn + (1 - LAM) * lm).log().sum().item()
            count += len(targets)
            done = start + len(part)
    return total / count


def main() -> None:
    options = arguments(__doc__, memory_tokens=500_000, test_tokens=20_000)
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = options.work / "exactness.memory"
    shutil.rmtree(path, ignore_errors=True)
    train = first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens)
    memory = Memory.build(model, tokenizer, train, path, index="exact")
    test = list(first_documents(law / "test.jsonl", tokenizer, options.test_tokens))
    seconds, ours = timed(
        lambda: evaluate(
            model, memory, test, tokenizer=tokenizer, lam=LAM, temperature=TEMPERATURE, k=K
        )
    )
    arrays = [
        np.array([tokenizer.bos_token_id, *tokenizer(d.text, verbose=False)["input_ids"]])
        for d in test
    ]
    keys = memory.manifest.keys
    with torch.inference_mode():
        expected = brute_force_nll(
            path / "segments" / "000001", model, arrays, keys.window, keys.stride
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
