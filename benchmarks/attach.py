"""What an attached memory adds to a token that is generated alone (batch 1), by kind of index.

One memory of law with each index in turn, and with int8 keys, kNN-LM with default settings;
greedy, from a prompt of the test text. While one text is written the memory is put off and on again
every few tokens, so that a slow spell of the machine hits both sides; medians are of single tokens.
With `--memory`, of a memory that is there, for several methods in place of indexes.

    python benchmarks/attach.py
    python benchmarks/attach.py --memory law.memory --methods suffix,hybrid
    python benchmarks/attach.py --model path/to/SmolLM2-135M-Instruct --memory law.memory
"""

import contextlib
import shutil
import statistics
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from common import MODEL, arguments, is_built, machine, memory_of_tokens, report
from nearest import Memory, attach, read_documents
from nearest.build.compress import Compression, compress_memory
from nearest.build.index import rebuild_index
from nearest.encode.identity import start_token
from nearest.encode.loading import load_model_and_tokenizer
from nearest.models.attach import Session
from nearest.store.parts.index import IndexChoice


class Turns:
    """A streamer that notes when each token comes, and puts the memory off and on in turns."""

    def __init__(self, session: Session, tokens: int) -> None:
        self._session, self._tokens = session, tokens
        self._off = contextlib.ExitStack()
        self._times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """The prompt, then each token."""
        self._times.append(time.perf_counter())
        if (len(self._times) - 1) % (2 * self._tokens) == 0:
            self._off.enter_context(self._session.disabled())
        elif (len(self._times) - 1) % self._tokens == 0:
            self._off.close()

    def end(self) -> None:
        """The text is written."""
        self._off.close()

    def milliseconds(self) -> tuple[list[float], list[float]]:
        """From each token to the next, without and with the memory, but for each turn's first."""
        sides: tuple[list[float], list[float]] = [], []
        for number, (before, after) in enumerate(pairwise(self._times)):
            turn, place = divmod(number, self._tokens)
            if place and turn:
                sides[turn % 2].append(1000 * (after - before))
        return sides


def prompt_of(tokens: Any, model: Any, new: int = 401) -> dict[str, Any]:
    """The beginning of a text, of which so many tokens are to be written on."""
    ids = torch.tensor(tokens[:64], device=model.device)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new,
        "min_new_tokens": new,
        "pad_token_id": 0,
    }


def token_times(
    model: Any, session: Session, prompt: dict[str, Any], rounds: int, turn: int = 10
) -> tuple[float, float]:
    """Median milliseconds of a token without and with the memory."""
    sides: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        turns = Turns(session, turn)
        model.generate(**prompt, streamer=turns)
        if number:  # the first round opens files and compiles kernels
            for times, more in zip(sides, turns.milliseconds(), strict=True):
                times += more
    return statistics.median(sides[0]), statistics.median(sides[1])


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """The prompt, then each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The text is written."""


def of_methods(options: Any, model: Any, prompt: dict[str, Any]) -> None:
    """What each method adds in one memory, of texts in turns; hybrid also without any search.

    Methods that look at the text cannot be put off and on while one is written.
    """

    def milliseconds() -> float:
        clock = Clock()
        model.generate(**prompt, streamer=clock)
        return statistics.median(1000 * (b - a) for a, b in pairwise(clock.times[2:]))

    memory = Memory.open(Path(options.memory))
    report(**machine(), entries=memory.entries)
    for method in options.methods.split(","):
        for settings in ({}, {"skip": 1.0}) if method == "hybrid" else ({},):
            base, added = [], []
            with attach(model, memory, method, **settings) as session:
                for number in range(options.rounds + 1):
                    attached_ms = milliseconds()
                    with session.disabled():
                        base_ms = milliseconds()
                    if number:  # the first round opens files and compiles kernels
                        base.append(base_ms)
                        added.append(attached_ms - base_ms)
            medians = {"base_ms": statistics.median(base), "added_ms": statistics.median(added)}
            report(benchmark="attach", method=method, **settings, **medians)


def main() -> None:
    options = arguments(
        __doc__,
        memory_tokens=1_000_000,
        new=401,
        rounds=5,
        variants="auto,auto int8,exact,HNSW32",
        model=str(MODEL),
        memory="",
        methods="suffix,hybrid",
    )
    model, tokenizer = load_model_and_tokenizer(options.model, "float32", "cpu")
    law = options.corpora / "dclaw"
    (document,) = islice(read_documents([law / "test.jsonl"]), 1)
    tokens = [start_token(tokenizer), *tokenizer(document.text)["input_ids"]]
    prompt = prompt_of(tokens, model, options.new)
    if options.memory:
        of_methods(options, model, prompt)
        return
    original = memory_of_tokens(options, "law")
    report(**machine(), entries=Memory.open(original).entries)
    for variant in options.variants.split(","):
        path = original.with_name(f"{original.stem}-{variant.replace(' ', '-')}.memory")
        spec, _, keys = variant.partition(" ")
        if variant == "auto":
            path = original
        elif not is_built(path):
            shutil.copytree(original, path)
            if keys:
                compress_memory(path, Compression(keys=keys))
            if spec != "auto":
                rebuild_index(path, IndexChoice(spec))
        memory = Memory.open(path)
        with attach(model, memory, "knn") as session:
            base_ms, attached_ms = token_times(model, session, prompt, options.rounds)
        record = memory.segments[0].record.index
        report(
            benchmark="attach",
            index=record.spec,
            keys=memory.keys_record.format,
            nprobe=record.nprobe,
            recall=record.recall,
            base_ms=base_ms,
            added_ms=attached_ms - base_ms,
        )


if __name__ == "__main__":
    main()
