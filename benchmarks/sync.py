"""What `nearest sync` takes for a folder of which little has changed.

A folder of so many small text files is made and built into a memory; some of its files are then
changed. `all` is one `Memory.sync`, with keys, the model already loaded; `encoding` is what adding
the changed documents alone to a memory of nothing else takes of it (tokens, states, keys); `dry` is
`--dry-run`, which reads and compares but encodes nothing.

    python benchmarks/sync.py [--files 2000] [--changed 10] [--rounds 3]
"""

import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments, machine, model_and_tokenizer, report, timed
from nearest import Memory, read_documents
from nearest.corpus.batches import batch_windows
from nearest.corpus.tokens import tokenise
from nearest.encode.encoder import Encoder
from nearest.encode.identity import token_rules
from nearest.encode.layers import find_key_layer

WORDS = ["court", "shall", "grant", "permit", "person", "district", "keeps", "bees", "of", "a"]


def main() -> None:
    options = arguments(__doc__, files=2_000, changed=10, rounds=3)
    model, tokenizer = model_and_tokenizer()
    folder, whole = options.work / "sync", options.work / f"sync-{options.files}.memory"
    for path in (folder, whole):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(options.files):
        write(folder, number, rng)
    built, memory = timed(
        lambda: Memory.build(model, tokenizer, read_documents(folder), whole, tune=False)
    )
    report(**machine(), benchmark="sync", files=options.files, changed=options.changed, build=built)
    spent: dict[str, list[float]] = {"all": [], "encoding": [], "dry": []}
    for _ in range(options.rounds):
        changed = rng.choice(options.files, options.changed, replace=False).tolist()
        for number in changed:
            write(folder, number, rng)
        paths = [folder / f"{number}.txt" for number in changed]
        spent["encoding"].append(timed(lambda paths=paths: encode(model, tokenizer, paths))[0])
        corpus = read_documents(folder)
        dry, (_, counts) = timed(
            lambda m=memory, corpus=corpus: m.sync(None, None, corpus, dry_run=True)
        )
        spent["dry"].append(dry)
        one, (memory, counts) = timed(
            lambda m=memory, corpus=corpus: m.sync(model, tokenizer, corpus)
        )
        spent["all"].append(one)
        report(round=counts.to_dict(), **{name: seconds[-1] for name, seconds in spent.items()})
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    report(**medians, beside_encoding=medians["all"] - medians["encoding"])


def write(folder: Path, number: int, rng: np.random.Generator) -> None:
    words = rng.choice(WORDS, size=int(rng.integers(3, 12)))
    (folder / f"{number}.txt").write_text(f"{number}: {' '.join(words)}\n")


def encode(model: Any, tokenizer: Any, paths: list[Path]) -> int:
    rules = token_rules(model, tokenizer)
    tokens = [one.tokens for one in tokenise(read_documents(paths), tokenizer, rules)]
    encoder = Encoder.of(model, find_key_layer(model, "last_ffn_input"))
    windows = batch_windows(tokens, encoder.window, encoder.stride, encoder.batch_size)
    return sum(len(encoder.encode(batch)) for batch in windows)


if __name__ == "__main__":
    main()
