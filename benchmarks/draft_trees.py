"""What trees of drafts could bring, and how often drafted tokens of each class are accepted.

Texts are written as in `drafting.py`, with drafts. Then, with nothing timed, each is gone through
once more as if a draft were made at every pass and all of it verified: where a draft is wrong, was
the second or the third continuation of the matches right, and how far would it have gone on? A tree
that had held it would have saved so many tokens' passes; `saved` is that share of all passes, an
upper bound, since a tree is a wider pass at every draft. Beside it, what passes take by their
width, in turns, as a multiple of one token's.

    python benchmarks/draft_trees.py --tuned MEMORY --methods suffix,hybrid
"""

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from common import MODEL, arguments, machine, report
from drafting import METHODS, TEXTS, greedy, prompts
from nearest import Memory, attach
from nearest.encode.loading import load_model_and_tokenizer
from nearest.retrieval.drafts import CLASSES, LONGEST, continuations_of, draft

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 33)


def pass_times(model: Any, rounds: int) -> dict[int, float]:
    """Of passes after 100 tokens by their width, as multiples of one token's."""
    ids = torch.randint(5, 5000, (1, 100), generator=torch.Generator().manual_seed(0))
    seconds: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        model(ids, past_key_values=cache, use_cache=True)
        for _ in range(rounds + 1):
            for width, found in seconds.items():
                started = time.perf_counter()
                model(ids[:, :width], past_key_values=cache, use_cache=True)
                found.append(time.perf_counter() - started)
                cache.crop(-width)
    medians = {width: statistics.median(found[1:]) for width, found in seconds.items()}
    return {width: median / medians[1] for width, median in medians.items()}


def agreed(tokens: np.ndarray, truth: np.ndarray) -> int:
    """How many of the first tokens are right."""
    length = min(len(tokens), len(truth))
    wrong = np.flatnonzero(tokens[:length] != truth[:length])
    return int(wrong[0]) if len(wrong) else length


def gone_through(memory: Memory, text: np.ndarray, begin: int, counts: Counter[Any]) -> None:
    """Count what a draft at every pass would have met in a text that was written from `begin`."""
    at = begin
    while at < len(text):
        counts["passes"] += 1
        context, truth = text[:at], text[at : at + LONGEST]
        found = draft([memory], context, LONGEST)
        right = agreed(found.tokens, truth)
        for place, one in enumerate(found.classes[: right + 1].tolist()):
            counts["tried", one] += 1
            counts["accepted", one] += place < right
        if right == len(found.tokens):
            counts["without a draft"] += not len(found.tokens)
        elif at + right < len(text):
            counts["rejected"] += 1
            continuations, lengths = continuations_of([memory], context, LONGEST)
            alive = (continuations[:, :right] == truth[:right]).all(axis=1)
            votes: Counter[int] = Counter()
            for token, length in zip(continuations[alive, right], lengths[alive], strict=True):
                votes[int(token)] += (1 + int(length)) ** 3
            others = [token for token, _ in votes.most_common() if token != found.tokens[right]]
            for rank, name in enumerate(("second right", "third right")):
                if others[rank : rank + 1] == [truth[right]]:
                    counts[name] += 1
                    longer = draft([memory], text[: at + right + 1], LONGEST).tokens
                    counts["branch"] += 1 + agreed(longer, text[at + right + 1 :])
        at += right + 1
    counts["tokens"] += len(text) - begin


def main() -> None:
    options = arguments(
        __doc__,
        model=str(MODEL),
        tuned="",
        prompts=8,
        prompt=48,
        new_tokens=128,
        rounds=15,
        methods="suffix,hybrid",
        texts=TEXTS,
    )
    model, tokenizer = load_model_and_tokenizer(options.model, "float32", "cpu")
    memory = Memory.open(Path(options.tuned))
    report(**machine(), entries=memory.entries)
    report(width=pass_times(model, options.rounds))
    for method in options.methods.split(","):
        whole: Counter[Any] = Counter()
        for kind in options.texts.split(","):
            counts: Counter[Any] = Counter()
            with attach(model, memory, method, draft=True, **METHODS.get(method, {})):
                for ids in prompts(options, tokenizer, kind):
                    text = greedy(model, tokenizer, ids, options.new_tokens)
                    gone_through(memory, text[0].numpy(), ids.shape[1], counts)
            a_pass = counts["tokens"] / counts["passes"]
            shown = {name: count for name, count in counts.items() if isinstance(name, str)}
            saved = counts["branch"] / a_pass / counts["passes"]
            report(method=method, text=kind, tokens_a_pass=a_pass, saved=saved, **shown)
            whole += counts
        rates = {
            one: [whole["accepted", one] / whole["tried", one], whole["tried", one]]
            for one in range(CLASSES)
            if whole["tried", one]
        }
        report(method=method, accepted_and_tried=rates)


if __name__ == "__main__":
    main()
