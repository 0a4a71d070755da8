"""Forward passes over the same 512-token windows in batches of different sizes.

python benchmarks/batch_size.py
"""

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
    stream_of_windows,
    timed,
)


def main() -> None:
    options = arguments(__doc__, tokens=16_384)
    model, tokenizer = model_and_tokenizer()
    text = first_documents(options.corpora / "dclaw" / "test.jsonl", tokenizer, options.tokens)
    windows = stream_of_windows(text, tokenizer, 512)[: options.tokens // 512]
    rows = torch.from_numpy(np.stack(windows))

    @torch.inference_mode()
    def passes(batch: int) -> float:
        def work() -> None:
            for part in rows.split(batch):
                model.base_model(input_ids=part, use_cache=False)

        return timed(work)[0]

    passes(4)
    sides = {f"batch_{size}": lambda size=size: passes(size) for size in (1, 2, 4, 8, 16, 32)}
    middle = medians(interleaved(3, **sides))
    report(benchmark="batch_size", tokens=rows.numel(), medians=middle, **machine())


if __name__ == "__main__":
    main()
