"""What the benchmarks share: the corpora, the model, the machine, and how a record is printed."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nearest import Document, Memory, read_documents
from nearest.encode.encoder import Encoder
from nearest.encode.layers import find_key_layer
from nearest.encode.loading import load_model_and_tokenizer
from nearest.metrics import bootstrap_interval
from nearest.store.manifest import MANIFEST
from nearest.verbs.results import Result

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "src" / "nearest" / "demo" / "general-gpt2-7m"
TRAIN = {"dclaw": "train-2m.jsonl", "wikitext2": "train.jsonl"}
T = TypeVar("T")


def arguments(description: str, **more: Any) -> argparse.Namespace:
    """`--corpora`, `--work`, and what a benchmark adds: name=default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "corpora")
    parser.add_argument("--work", type=Path, default=Path("/tmp/nearest-benchmarks"))
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    return chosen


def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model_and_tokenizer(str(MODEL), "float32", "cpu")


def first_documents(path: Path, tokenizer: Any, tokens: int) -> Iterator[Document]:
    """Documents from the start of a corpus until they hold so many tokens, BOS included."""
    held = 0
    for document in read_documents([path]):
        yield document
        held += 1 + len(tokenizer(document.text, verbose=False)["input_ids"])
        if held >= tokens:
            return


def is_built(path: Path) -> bool:
    """Whether a memory is there from an earlier run; an interrupted build is gone on with."""
    return (path / MANIFEST).exists()


BUILD = {"keys": "fp16"}  # that documented figures are of, unless a benchmark says otherwise


def memory_of(options: Any, corpus: str, suffix: str = "", **build: Any) -> Path:
    """Of a corpus's training text; built unless it is there from an earlier run."""
    path: Path = options.work / f"{corpus}{suffix}.memory"
    if not is_built(path):
        model, tokenizer = model_and_tokenizer()
        documents = read_documents([options.corpora / corpus / TRAIN[corpus]])
        seconds, memory = timed(
            lambda: Memory.build(model, tokenizer, documents, path, **BUILD | build)
        )
        report(built=path.name, entries=memory.entries, seconds=seconds)
    return path


def memory_of_tokens(options: Any, name: str, **build: Any) -> Path:
    """Of law's first documents, `options.memory_tokens` of them; built unless it is there."""
    path: Path = options.work / f"{name}-{options.memory_tokens}.memory"
    if not is_built(path):
        model, tokenizer = model_and_tokenizer()
        law = options.corpora / "dclaw" / TRAIN["dclaw"]
        train = first_documents(law, tokenizer, options.memory_tokens)
        Memory.build(model, tokenizer, train, path, **BUILD | build)
    return path


def query_keys(options: Any, count: int) -> np.ndarray:
    """Keys [count, dim] of law's test text, from all over it."""
    model, tokenizer = model_and_tokenizer()
    tokens = (
        np.array([tokenizer.bos_token_id, *tokenizer(item.text, verbose=False)["input_ids"]])
        for item in read_documents([options.corpora / "dclaw" / "test.jsonl"])
    )
    encoder = Encoder.of(model, find_key_layer(model, "last_ffn_input"))
    keys = np.concatenate([made.numpy() for _, made in encoder.keys(tokens)])
    return keys[np.random.default_rng(0).permutation(len(keys))[:count]]


def compared(row: Result, to: Result) -> dict[str, float | None]:
    """The paired 95 % interval of the difference in nll a token."""
    difference = row.document_nll - to.document_nll
    low, high = bootstrap_interval(difference, row.document_tokens)
    mean = float(difference.sum() / row.document_tokens.sum())
    return {"delta_nll": mean, "delta_low": low, "delta_high": high}


def stream_of_windows(documents: Iterator[Document], tokenizer: Any, window: int) -> list[Any]:
    """The documents as one stream, cut into arrays of exactly `window` tokens."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer(document.text, verbose=False)["input_ids"]]
    whole = len(ids) // window * window
    return list(np.array(ids[:whole]).reshape(-1, window))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def interleaved(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Each side once a round, in turn, so that a slow spell of the machine hits them all."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side())
            report(round_of=name, seconds=seconds[name][-1])
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(**record: Any) -> None:
    """One JSON object a line."""
    print(json.dumps(record, default=float), flush=True)


def machine() -> dict[str, Any]:
    return {
        "cpu_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
