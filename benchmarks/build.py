"""Build against the forward passes alone, at a million tokens.

The forward passes: the same number of input tokens as full packed windows without padding, no
LM head (the model's body only), the same batch size. Two yardsticks are printed: every corpus token
once (`packed`), and as many window tokens as the build's own windows hold (`windows`: with a stride
of half the window, long documents are read about twice).

    python benchmarks/build.py                          # window 512, stride 256
    python benchmarks/build.py --stride 448
"""

import shutil

import numpy as np
import torch

from common import (
    arguments,
    first_documents,
    interleaved,
    machine,
    medians,
    model_and_tokenizer,
    report,
    timed,
)
from nearest import Memory
from nearest.corpus.tokens import tokenise
from nearest.corpus.windows import windows
from nearest.encode.identity import token_rules


def main() -> None:
    options = arguments(__doc__, tokens=1_000_000, window=512, stride=256, rounds=3, batch_size=4)
    model, tokenizer = model_and_tokenizer()
    path = options.work / "build.memory"
    corpus = options.corpora / "dclaw" / "train-2m.jsonl"
    documents = list(first_documents(corpus, tokenizer, options.tokens))

    def build() -> float:
        shutil.rmtree(path, ignore_errors=True)
        return timed(
            lambda: Memory.build(
                model,
                tokenizer,
                documents,
                path,
                window=options.window,
                stride=options.stride,
                batch_size=options.batch_size,
            )
        )[0]

    tokens = [d.tokens for d in tokenise(documents, tokenizer, token_rules(model, tokenizer))]
    stored = np.concatenate(tokens)
    whole = len(stored) // options.window * options.window
    packed = torch.from_numpy(stored[:whole]).view(-1, options.window)
    read = sum(
        part.length
        for document in tokens
        for part in windows(len(document), options.window, options.stride)
    )

    @torch.inference_mode()
    def forward() -> float:
        def passes() -> None:
            for rows in packed.split(options.batch_size):
                model.base_model(input_ids=rows, use_cache=False)

        return timed(passes)[0]

    middle = medians(interleaved(options.rounds, forward=forward, build=build))
    memory = Memory.open(path)
    per_token = middle["forward"] / whole
    report(
        benchmark="build",
        window=options.window,
        stride=options.stride,
        batch_size=options.batch_size,
        tokens=memory.tokens,
        window_tokens=read,
        index=memory.segments[0].record.index.spec,
        recall=memory.segments[0].record.index.recall,
        medians=middle,
        ratio_to_packed=middle["build"] / (per_token * memory.tokens),
        ratio_to_windows=middle["build"] / (per_token * read),
        **machine(),
    )


if __name__ == "__main__":
    main()
