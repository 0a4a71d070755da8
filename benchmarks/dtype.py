"""Forward passes in bfloat16 against float32, of a GPT-2 of 124M random weights.

Seconds are the processor's, of all threads: what else the machine does then counts for little.

python benchmarks/dtype.py
"""

import time

import torch
from transformers import GPT2Config, GPT2Model

from common import arguments, interleaved, machine, medians, report
from nearest.encode.dtype import fast_on_cpu


def main() -> None:
    options = arguments(__doc__, rounds=3, tokens=2_048)
    torch.manual_seed(0)
    models = {
        "float32": GPT2Model(GPT2Config()).eval(),
        "bfloat16": GPT2Model(GPT2Config()).eval().bfloat16(),
    }
    inputs = torch.randint(50_257, (options.tokens // 512, 512))

    @torch.inference_mode()
    def seconds(name: str) -> float:
        started = time.process_time()
        models[name](input_ids=inputs, use_cache=False)
        return time.process_time() - started

    for name in models:
        seconds(name)  # the first pass lays weights out
    middle = medians(
        interleaved(
            options.rounds,
            float32=lambda: seconds("float32"),
            bfloat16=lambda: seconds("bfloat16"),
        )
    )
    report(
        benchmark="dtype",
        tokens=options.tokens,
        medians=middle,
        bfloat16_is_fast_here=fast_on_cpu(torch.bfloat16),
        times_as_fast=middle["float32"] / middle["bfloat16"],
        **machine(),
    )


if __name__ == "__main__":
    main()
