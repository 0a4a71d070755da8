"""Whether data loading holds training up: tokens a second of each, on law with a RETROfit.

The first documents of the corpus are cut into chunks of 64 and get neighbours by BM25; passages of
512 tokens with two neighbours of 128 for each chunk are then read by themselves, in batches of 4,
and trained on (the shipped model of 7M weights, new layers after its third and sixth). CPU time of
this process counts, so that other work on the machine matters less.

    python benchmarks/retro_training.py [--tokens 200000] [--steps 6]
"""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.utils.data import DataLoader

from common import arguments, first_documents, machine, model_and_tokenizer, report
from nearest.retro import NeighbourTable, RetroDataset, retrofit
from nearest.retro.data.stages import Ends, TableOptions, chunk_documents
from nearest.retro.evaluation.scoring import collate_of
from nearest.retro.passages import Course, PassageCollate, Passages
from nearest.retro.training import TrainingSettings, train

CHUNK, WINDOW, BATCH = 64, 512, 4


def passages_of(options: object, tokenizer: object, folder: Path) -> Passages:
    path = options.corpora / "dclaw" / "train-2m.jsonl"
    documents = first_documents(path, tokenizer, options.tokens)
    ends = Ends(tokenizer.bos_token_id, tokenizer.eos_token_id)
    made = chunk_documents(documents, tokenizer, folder / "db", CHUNK, ends)
    table = NeighbourTable.build(made, None, folder / "table", options=TableOptions(2, "bm25"))
    data = RetroDataset(made.chunks, made.chunks, table, neighbours=2)
    return Passages(data, WINDOW, least=CHUNK + 1)


def batches(loader: DataLoader) -> Iterator[int]:
    for batch in loader:
        yield int(batch["attention_mask"].sum())


def main() -> None:
    options = arguments(__doc__, tokens=200_000, steps=6)
    model, tokenizer = model_and_tokenizer()
    with TemporaryDirectory() as folder:
        passages = passages_of(options, tokenizer, Path(folder))
        fitted = retrofit(model, [2, 5], chunk_size=CHUNK)
        collate = PassageCollate(collate_of(fitted, CHUNK))
        began = time.process_time()
        read = sum(batches(DataLoader(Course(passages, 0, 400), BATCH, collate_fn=collate)))
        loading = read / (time.process_time() - began)
        settings = TrainingSettings(max_steps=options.steps, batch_size=BATCH, save_every=None)
        told, began = [], time.process_time()
        train(fitted, passages, Path(folder) / "run", settings, report=told.append)
        training = sum(step.tokens for step in told) / (time.process_time() - began)
    report(
        loading_tokens_a_second=loading,
        training_tokens_a_second=training,
        ratio=loading / training,
        machine=machine(),
    )


if __name__ == "__main__":
    main()
