"""Domain adaptation on law: memory train-2m, tuned on valid, the whole of test.

The memory is that of methods.py.

    python benchmarks/domain_adaptation.py
"""

from common import arguments, machine, memory_of, model_and_tokenizer, report, timed
from nearest import Memory, evaluate, read_documents, tune


def main() -> None:
    options = arguments(__doc__)
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    path = memory_of(options, "dclaw")
    memory = Memory.open(path)
    tune_seconds, tuned = timed(
        lambda: tune(model, memory, read_documents([law / "valid.jsonl"]), tokenizer=tokenizer)
    )
    report(
        benchmark="domain_adaptation",
        entries=memory.entries,
        index=memory.segments[0].record.index.spec,
        recall=memory.segments[0].record.index.recall,
        tune_seconds=tune_seconds,
        **tuned.to_dict(),
        **machine(),
    )
    memory = Memory.open(path)
    test = list(read_documents([law / "test.jsonl"]))
    for result in evaluate(model, memory, test, ["base", "knn"], tokenizer=tokenizer):
        report(benchmark="domain_adaptation", **result.to_dict())


if __name__ == "__main__":
    main()
