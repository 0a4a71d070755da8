"""Perplexity and time beside knn-transformers, with one FAISS file and the same windows.

Needs the public code: `git clone https://github.com/neulab/knn-transformers` and pass its folder.
Both sides see the same 512-token documents, the same model and the same index (IVF4096,PQ64, nprobe
32, k 1024), and sum the nll of every token but the first of each document. The other side runs as
its own tool does: a window at a time, loss from the model's output. Time is of the whole pass.
Beside them, nearest with the index that it chooses itself: with the same settings, and as tuned.

    python benchmarks/knn_transformers.py --code path/to/knn-transformers
"""

import contextlib
import io
import shutil
from itertools import islice
from pathlib import Path

import faiss
import numpy as np

from common import (
    arguments,
    first_documents,
    interleaved,
    is_built,
    machine,
    medians,
    memory_of_tokens,
    model_and_tokenizer,
    report,
    stream_of_windows,
    timed,
)
from nearest import Memory, evaluate, read_documents, tune
from nearest.build.index import rebuild_index
from nearest.store.parts.index import IndexChoice
from public_knn import LAM, NPROBE, SPEC, TEMPERATURE, K, their_nll, wrapper_over


def main() -> None:
    options = arguments(
        __doc__,
        code=Path("knn-transformers"),
        memory_tokens=1_000_000,
        test_tokens=20_480,
        valid_documents=60,
    )
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = memory_of_tokens(options, "knn-transformers", index=SPEC, nprobe=NPROBE)
    memory = Memory.open(path)
    test = first_documents(law / "test.jsonl", tokenizer, options.test_tokens)
    documents = stream_of_windows(test, tokenizer, 512)[: options.test_tokens // 512]
    tokens = sum(len(document) - 1 for document in documents)
    settings = {"lam": LAM, "temperature": TEMPERATURE, "k": K}
    nll: dict[str, float] = {}

    with contextlib.redirect_stderr(io.StringIO()):
        wrapper = wrapper_over(options.code, memory)

    def theirs() -> float:
        wrapper.break_into(model)
        seconds, total = timed(lambda: their_nll(model, documents))
        wrapper.break_out()
        nll["knn_transformers"] = total / tokens
        return seconds

    def ours(distances: str) -> float:
        seconds, result = timed(
            lambda: evaluate(
                model, memory, documents, window=511, stride=510, distances=distances, **settings
            )
        )
        nll[f"nearest_{distances}"] = result.nll
        return seconds

    def by_default(**given: float) -> float:
        """With the index that is chosen by itself; settings not given are those that were tuned."""
        seconds, result = timed(
            lambda: evaluate(model, default, documents, window=511, stride=510, **given)
        )
        nll["default" if given else "tuned"] = result.nll
        return seconds

    def base() -> float:
        seconds, total = timed(lambda: their_nll(model, documents))
        nll["base"] = total / tokens
        return seconds

    def raw_search() -> float:
        """The index's own part of the work: all queries at once, nothing else."""
        return timed(lambda: index.search(queries, K))[0]

    index = faiss.read_index(str(path / memory.segments[0].record.index.file.path))
    index.nprobe = NPROBE
    queries = memory.keys.rows(np.arange(tokens))
    ours("index")  # reads the index and compiles before anything is timed
    ours("keys")
    chosen = path.with_name(f"{path.stem}-auto.memory")
    if not is_built(chosen):
        shutil.copytree(path, chosen)
        rebuild_index(chosen, IndexChoice())
        valid = islice(read_documents([law / "valid.jsonl"]), options.valid_documents)
        tune(model, Memory.open(chosen), valid, tokenizer=tokenizer)
    default = Memory.open(chosen)
    by_default(**settings)
    by_default()
    seconds = interleaved(
        3,
        base=base,
        knn_transformers=theirs,
        nearest_index=lambda: ours("index"),
        nearest_keys=lambda: ours("keys"),
        default=lambda: by_default(**settings),
        tuned=by_default,
        raw_search=raw_search,
    )
    middle = medians(seconds)
    added = {name: value - middle["base"] for name, value in middle.items()}
    record = default.segments[0].record.index
    report(
        benchmark="knn_transformers",
        index=f"{SPEC} nprobe {NPROBE} k {K}",
        entries=memory.entries,
        tokens=tokens,
        seconds=seconds,
        medians=middle,
        ratio_index=middle["nearest_index"] / middle["knn_transformers"],
        ratio_keys=middle["nearest_keys"] / middle["knn_transformers"],
        added_by_default=added["default"] / added["knn_transformers"],
        added_as_tuned=added["tuned"] / added["knn_transformers"],
        default_index={"spec": record.spec, "nprobe": record.nprobe, "recall": record.recall},
        tuned=default.settings("knn"),
        ppl={name: float(np.exp(value)) for name, value in nll.items()},
        ppl_ratio=float(np.exp(nll["nearest_index"] - nll["knn_transformers"])),
        recall=memory.segments[0].record.index.recall,
        **machine(),
    )


if __name__ == "__main__":
    main()
