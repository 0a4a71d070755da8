"""What each method adds to a token that is scored, in turns, in one run.

The memories are those of methods.py, or one that `--memory` names, of the model that `--model`
names. Scored are the first documents of the test text; a time is the median of the rounds. Run it
where nothing else runs.

    python benchmarks/added.py --corpus dclaw --work FOLDER --documents 10
    python benchmarks/added.py --memory FOLDER --model path/to/SmolLM2-135M-Instruct
"""

import statistics
from typing import Any

from common import MODEL, arguments, machine, report
from nearest import Memory, evaluate, read_documents, read_text
from nearest.encode.loading import load_model_and_tokenizer

Row = tuple[Memory, str, dict[str, Any]]


def rows_of(options: Any) -> dict[str, Row]:
    """Memory, method and settings by name."""
    path = options.memory or options.work / f"{options.corpus}.memory"
    whole = clustered = Memory.open(path)
    rows: dict[str, Row] = {"knn": (whole, "knn", {}), "suffix": (whole, "suffix", {})}
    if not options.memory:
        bare = Memory.open(options.work / f"{options.corpus}-bare.memory")
        rows["suffix counts"] = (bare, "suffix", {})
        name = f"{options.corpus}-{options.clusters}-clusters.memory"
        clustered = Memory.open(options.work / name)
    rows["retomaton"] = (clustered, "retomaton", {})
    for skip in (1.0, 0.5, 0.0):
        rows[f"hybrid {skip:g}"] = (whole, "hybrid", {"skip": skip})
    return rows


def main() -> None:
    options = arguments(
        __doc__,
        corpus="dclaw",
        clusters=20_000,
        documents=10,
        rounds=5,
        memory="",
        model=str(MODEL),
    )
    model, tokenizer = load_model_and_tokenizer(options.model, "float32", "cpu")
    rows = rows_of(options)
    whole = rows["knn"][0]
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
