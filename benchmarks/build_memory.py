"""What a build with keys takes of the machine's memory beside the model: full segments.

A model of one layer with random weights and the demo's dimensions reads law and WikiText-2, so that
keys, index and suffix array are as large as with any model of that width, and made sooner. What is
counted is the process's own memory (RssAnon), above what it is when model and corpus are ready.

    python benchmarks/build_memory.py
"""

import shutil
import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from common import arguments, first_documents, machine, model_and_tokenizer, report
from nearest import Memory


def own_bytes() -> int:
    """The process's own memory now."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    return 1024 * int(line.split()[1])


class Peak(threading.Thread):
    """The largest of what is seen every 20 ms, by the stage that was told last."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stage, self.by_stage = "begin", dict[str, int]()
        self.running = True

    def run(self) -> None:
        """Look, until told to stop."""
        while self.running:
            self.by_stage[self.stage] = max(self.by_stage.get(self.stage, 0), own_bytes())
            time.sleep(0.02)

    def progress(self, stage: str, *_: Any) -> None:
        """What a build tells."""
        self.stage = stage


def main() -> None:
    options = arguments(__doc__, tokens=10_000_000, keys="fp16")
    trained, tokenizer = model_and_tokenizer()
    config = GPT2Config(**trained.config.to_dict() | {"n_layer": 1})
    del trained
    model = GPT2LMHeadModel(config).eval()
    path = options.work / "build-memory.memory"
    shutil.rmtree(path, ignore_errors=True)
    law = first_documents(options.corpora / "dclaw" / "train.jsonl", tokenizer, options.tokens)
    wiki = options.corpora / "wikitext2" / "train.jsonl"
    documents = chain(law, first_documents(wiki, tokenizer, options.tokens))
    before, peak = own_bytes(), Peak()
    peak.start()
    started = time.perf_counter()
    memory = Memory.build(
        model, tokenizer, documents, path, keys=options.keys, progress=peak.progress
    )
    peak.running = False
    report(
        **machine(),
        benchmark="build_memory",
        entries=memory.entries,
        segments=[segment.entry_count for segment in memory.segments],
        index=memory.segments[0].record.index.spec,
        seconds=time.perf_counter() - started,
        above_the_model={
            stage: seen - before for stage, seen in peak.by_stage.items() if seen > before
        },
        peak_above_the_model=max(peak.by_stage.values()) - before,
    )


if __name__ == "__main__":
    main()
