"""What a memory of unrelated text costs, and what guarding against it takes from a related one.

Each corpus's training text is a memory, the hybrid's gate is trained on the same corpus's valid
text and on nothing else, and both corpora's test texts are scored, with the guard and without.

    python benchmarks/no_harm.py
"""

from common import (
    arguments,
    compared,
    machine,
    memory_of,
    model_and_tokenizer,
    report,
)
from nearest import Memory, evaluate, read_documents, read_text, tune


def main() -> None:
    options = arguments(
        __doc__, skips="0,0.5,1", memories="dclaw,wikitext2", texts="dclaw,wikitext2"
    )
    model, tokenizer = model_and_tokenizer()
    report(**machine())

    def documents(corpus: str, split: str) -> list[object]:
        return list(read_documents([options.corpora / corpus / f"{split}.jsonl"]))

    for corpus in options.memories.split(","):
        path = memory_of(options, corpus)
        if "hybrid" not in Memory.open(path).manifest.gates:
            valid = documents(corpus, "valid")
            tune(model, Memory.open(path), valid, method="hybrid", tokenizer=tokenizer)
        memory = Memory.open(path)
        for text in options.texts.split(","):
            read = read_text(model, memory, documents(text, "test"), tokenizer=tokenizer)
            base = evaluate(model, memory, read, "base")
            for skip in map(float, options.skips.split(",")):
                free, guarded = (
                    evaluate(model, memory, read, "hybrid", skip=skip, guard=guard)
                    for guard in (False, True)
                )
                report(
                    benchmark="no_harm",
                    memory=corpus,
                    text=text,
                    skip=skip,
                    foss=guarded.foss,
                    base_ppl=base.ppl,
                    ppl=free.ppl,
                    guarded_ppl=guarded.ppl,
                    guarded_of_base=guarded.ppl / base.ppl,
                    # 1 when the guard costs nothing of what the memory gains (in nats)
                    gain_kept=(base.nll - guarded.nll) / (base.nll - free.nll),
                    vs_base=compared(guarded, base),
                )


if __name__ == "__main__":
    main()
