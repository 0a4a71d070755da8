"""What each method adds to a token that is scored: memories of methods.py, in turns, in one run.

The first documents of the test text; a time is the median of the rounds. Run it where nothing else
runs.

    python benchmarks/added.py --corpus dclaw --work FOLDER --documents 10
"""

import statistics

from common import arguments, machine, model_and_tokenizer, report
from nearest import Memory, evaluate, read_documents, read_text


def main() -> None:
    options = arguments(__doc__, corpus="dclaw", clusters=20_000, documents=10, rounds=5)
    model, tokenizer = model_and_tokenizer()
    whole = Memory.open(options.work / f"{options.corpus}.memory")
    bare = Memory.open(options.work / f"{options.corpus}-bare.memory")
    clustered = Memory.open(options.work / f"{options.corpus}-{options.clusters}-clusters.memory")
    rows = {
        "knn": (whole, "knn", {}),
        "retomaton with clusters": (clustered, "retomaton", {}),
        "suffix": (whole, "suffix", {}),
        "suffix counts": (bare, "suffix", {}),
        **{f"hybrid {skip:g}": (whole, "hybrid", {"skip": skip}) for skip in (1.0, 0.5, 0.0)},
    }
    documents = list(read_documents([options.corpora / options.corpus / "test.jsonl"]))
    read = read_text(model, whole, documents[: options.documents], tokenizer=tokenizer)
    report(**machine())
    added: dict[str, list[float]] = {name: [] for name in rows}
    found = {}
    for number in range(options.rounds + 1):  # the first warms up
        for name, (memory, method, settings) in rows.items():
            found[name] = evaluate(model, memory, read, method, **settings)
            if number:
                added[name].append(found[name].added_ms)
    for name, result in found.items():
        times = added[name]
        report(
            benchmark="added",
            row=name,
            tokens=result.tokens,
            ppl=result.ppl,
            foss=result.foss,
            added_ms=statistics.median(times),
            least=min(times),
            most=max(times),
            model_ms=1e3 / result.tok_s - result.added_ms,
        )


if __name__ == "__main__":
    main()
