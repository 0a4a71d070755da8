"""RetoMaton beside knn-transformers' own: perplexity, saved searches and time, one FAISS file.

Needs the public code (see public_knn.py). The memory is one document (a stream of the corpus), the
evaluation documents are single windows, so that neither side's handling of document ends and long
documents shows; no clusters, distances of the index's own codes, IVF4096,PQ64, nprobe 32, k 1024.

Their own count of saved searches forgets those after the last search of each window; `foss` of
theirs is counted here by the searches they made, `foss_as_reported` is what they print.

Our time is compared with the searches alone: the same index searched raw, in batches of the very
sizes that our documents side by side asked for.

    python benchmarks/retomaton.py --code path/to/knn-transformers
"""

import contextlib
import io
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from common import (
    arguments,
    first_documents,
    is_built,
    machine,
    model_and_tokenizer,
    report,
    stream_of_windows,
    timed,
)
from nearest import Memory, evaluate
from public_knn import LAM, NPROBE, SPEC, TEMPERATURE, K, their_nll, wrapper_over

MIN_KNNS = (1, 20, float("inf"))


@contextlib.contextmanager
def recorded_searches(memory: Memory) -> Iterator[list[int]]:
    """The sizes of the batches that a memory is searched for."""
    sizes: list[int] = []
    search = memory.search

    def recording(queries: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(queries))
        return search(queries, *args, **kwargs)

    memory.search = recording  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        del memory.search  # type: ignore[method-assign]


def main() -> None:
    options = arguments(
        __doc__,
        code=Path("knn-transformers"),
        memory_tokens=1_000_000,
        windows=20,
        rounds=3,
        their_rounds=1,
    )
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = options.work / f"one-document-{options.memory_tokens}.memory"
    if not is_built(path):
        train = first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens)
        text = "\n".join(document.text for document in train)
        Memory.build(model, tokenizer, [text], path, keys="fp16", index=SPEC, nprobe=NPROBE)
    memory = Memory.open(path)
    test = first_documents(law / "test.jsonl", tokenizer, options.windows * 512)
    documents = stream_of_windows(test, tokenizer, 512)[: options.windows]
    tokens = sum(len(document) - 1 for document in documents)
    index = faiss.read_index(str(path / memory.segments[0].record.index.file.path))
    index.nprobe = NPROBE
    queries = memory.segments[0].keys.rows(np.arange(tokens))

    def raw(sizes: list[int]) -> float:
        seconds, start = 0.0, 0
        for size in sizes:
            part = queries[start : start + size]
            seconds += timed(lambda part=part: index.search(part, K))[0]
            start = (start + size) % (tokens - max(sizes))
        return seconds

    def ours(method: str, **settings: Any) -> Any:
        return evaluate(
            model,
            memory,
            documents,
            method,
            window=511,
            stride=510,
            lam=LAM,
            temperature=TEMPERATURE,
            k=K,
            **settings,
        )

    ours("retomaton", distances="index")  # reads the index and compiles before anything is timed
    base_seconds = statistics.median(
        timed(lambda: their_nll(model, documents))[0] for _ in range(options.rounds)
    )
    knn = statistics.median(ours("knn").added_ms * tokens / 1000 for _ in range(options.rounds))
    for min_knns in MIN_KNNS:
        with contextlib.redirect_stderr(io.StringIO()):
            wrapper = wrapper_over(options.code, memory, min_knns=min_knns)
            wrapper.break_into(model)
            their_seconds, total = timed(lambda: their_nll(model, documents))
            history = wrapper.no_lookup_counter_history
            reported = wrapper.get_metrics()["lookups_saved"]
            wrapper.break_out()
        parity = ours("retomaton", distances="index", min_knns=min_knns)
        added, searched, ratios = [], [], []
        for _ in range(options.rounds):
            with recorded_searches(memory) as sizes:
                result = ours("retomaton", min_knns=min_knns)
            added.append(result.added_ms * tokens / 1000)
            searched.append(raw(sizes))
            ratios.append(added[-1] / (1.3 * searched[-1] + 0.2e-3 * tokens))
        report(
            benchmark="retomaton",
            min_knns=str(min_knns),
            tokens=tokens,
            their_ppl=float(np.exp(total / tokens)),
            our_ppl=parity.ppl,
            ppl_ratio=parity.ppl / float(np.exp(total / tokens)),
            their_foss=1 - len(history) / tokens,
            their_foss_as_reported=float(reported),
            our_foss=parity.foss,
            our_ppl_by_keys=result.ppl,
            our_foss_by_keys=result.foss,
            their_added_seconds=their_seconds - base_seconds,
            our_added_seconds=statistics.median(added),
            searches_alone_seconds=statistics.median(searched),
            of_allowance=statistics.median(ratios),  # (1.3 × searches + 0.2 ms a token) is 1
            our_knn_added_seconds=knn,
            mean_batch=float(np.mean(sizes)),
            **machine(),
        )


if __name__ == "__main__":
    main()
