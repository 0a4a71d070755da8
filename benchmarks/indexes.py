"""What kinds of index cost and find: bytes, recall, perplexity and time of kNN-LM over law.

Each index is built over a copy of one memory; λ and temperature are tuned with it on valid.

    python benchmarks/indexes.py
"""

import shutil
from itertools import islice

from common import arguments, machine, memory_of, model_and_tokenizer, report, timed
from nearest import Memory, evaluate, read_documents, read_text, tune
from nearest.build.index import rebuild_index
from nearest.store.parts.index import IndexChoice

SPECS = "IVF1024,SQ8;auto;IVF1024,PQ128x4fs;IVF2048,PQ64x4fs"


def main() -> None:
    options = arguments(__doc__, specs=SPECS, valid_documents=40, test_documents=60, k=1024)
    model, tokenizer = model_and_tokenizer()
    original = memory_of(options, "dclaw")
    report(**machine(), entries=Memory.open(original).entries)
    read = {
        split: read_text(
            model,
            Memory.open(original),
            islice(read_documents([options.corpora / f"dclaw/{split}.jsonl"]), documents),
            tokenizer=tokenizer,
        )
        for split, documents in (
            ("valid", options.valid_documents),
            ("test", options.test_documents),
        )
    }
    for spec in options.specs.split(";"):
        path = options.work / "indexed.memory"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(original, path)
        seconds, _ = timed(lambda path=path, spec=spec: rebuild_index(path, IndexChoice(spec)))
        memory = Memory.open(path)
        tuned = tune(model, memory, read["valid"], method="knn", k=options.k)
        memory = Memory.open(path)
        record = memory.segments[0].record.index
        result = evaluate(model, memory, read["test"], "knn")
        report(
            benchmark="indexes",
            asked=spec,
            index=record.spec,
            seconds=seconds,
            bytes_an_entry=record.file.size / memory.entries,
            nprobe=record.nprobe,
            margin=record.margin,
            recall=record.recall,
            ppl=result.ppl,
            added_ms=result.added_ms,
            lam=tuned.settings.lam,
            temperature=tuned.settings.temperature,
        )


if __name__ == "__main__":
    main()
