"""A GPU beside the CPU: building, searching, scoring and writing, with the same memory.

Needs a GPU that torch finds and, for inverted lists there, a FAISS that does (the extra `[gpu]`).
The memory is of law's first documents, built on the GPU in float32, with the index that `auto`
chooses: on a GPU all its keys are scanned.

    python benchmarks/gpu.py
"""

import shutil
import statistics
from itertools import islice
from typing import Any

import faiss
import numpy as np
import torch

from attach import prompt_of, token_times
from common import (
    MODEL,
    arguments,
    first_documents,
    is_built,
    machine,
    report,
    timed,
)
from nearest import Memory, attach, evaluate, read_documents, read_text
from nearest.build.index import rebuild_index
from nearest.encode.encoder import Encoder
from nearest.encode.layers import find_key_layer
from nearest.encode.loading import load_model_and_tokenizer
from nearest.index.tuning import recall
from nearest.store.parts.index import IndexChoice

SETTINGS = {"lam": 0.8, "temperature": 10.0, "k": 1024}


def main() -> None:
    options = arguments(__doc__, memory_tokens=1_000_000, documents=60, indexes="IVF1024,Flat")
    report(**machine(), gpu=torch.cuda.get_device_name(), faiss=faiss.__version__)
    law = options.corpora / "dclaw"
    models = {}
    for device, dtype in (("cuda", "float32"), ("cuda", "bfloat16"), ("cpu", "float32")):
        models[device, dtype], tokenizer = load_model_and_tokenizer(str(MODEL), dtype, device)
    there, here = models["cuda", "float32"], models["cpu", "float32"]

    tokens = [
        np.array([tokenizer.bos_token_id, *tokenizer(item.text, verbose=False)["input_ids"]])
        for item in islice(read_documents([law / "test.jsonl"]), options.documents)
    ]
    for (device, dtype), model in models.items():
        encoder = Encoder.of(model, find_key_layer(model, "last_ffn_input"))
        seconds = []
        for _ in range(3):
            spent, made = timed(lambda encoder=encoder: [keys for _, keys in encoder.keys(tokens)])
            seconds.append(spent)
        count = sum(map(len, made))
        report(keys_on=device, dtype=dtype, tokens_a_second=count / statistics.median(seconds))
    queries = np.concatenate([keys.numpy() for keys in made])[:2048]

    path = options.work / f"law-{options.memory_tokens}.memory"
    if not is_built(path):
        train = first_documents(law / "train-2m.jsonl", tokenizer, options.memory_tokens)
        spent, _ = timed(lambda: Memory.build(there, tokenizer, train, path, keys="fp16"))
        report(built_on="cuda", seconds=spent)
    paths = {"auto": path}
    for spec in filter(None, options.indexes.split(";")):
        paths[spec] = path.with_name(f"law-{spec}.memory")
        if not is_built(paths[spec]):
            shutil.copytree(path, paths[spec])
            rebuild_index(paths[spec], IndexChoice(spec))
    exact = Memory.open(path, search_on="gpu").search(queries[:256], 1024).ids

    text = read_text(there, Memory.open(path), tokens)
    sides = [("auto", "cpu"), *((spec, "gpu") for spec in paths)]
    for spec, search_on in sides:
        memory = Memory.open(paths[spec], search_on=search_on)
        found = memory.search(queries, 1024)
        at_once = [timed(lambda m=memory: m.search(queries, 1024))[0] for _ in range(5)]
        alone = [timed(lambda q=q, m=memory: m.search(q[None], 1024))[0] for q in queries[:200]]
        scored = [evaluate(there, memory, text, "knn", **SETTINGS) for _ in range(3)]
        added: dict[str, Any] = {}
        for name, model in (("cuda", there), ("cpu", here)):
            with attach(model, memory, "knn") as session:
                base, attached = token_times(model, session, prompt_of(tokens[0], model, 201), 2)
            added |= {f"base_ms_{name}": base, f"added_ms_{name}": attached - base}
        report(
            index=spec,
            search_on=search_on,
            recall=recall(found.ids[:256], exact),
            ms_a_query_of_2048=1000 * statistics.median(at_once) / len(queries),
            ms_a_query_alone=1000 * statistics.median(alone),
            ppl=scored[0].ppl,
            added_ms=statistics.median(row.added_ms for row in scored),
            **added,
        )


if __name__ == "__main__":
    main()
