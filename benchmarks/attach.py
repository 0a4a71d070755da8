"""What an attached memory adds to a token that is generated alone (batch 1), by kind of index.

One memory of law with each index in turn, kNN-LM with default settings; greedy, from a prompt of
the test text. While one text is written the memory is put off and on again every few tokens, so
that a slow spell of the machine hits both sides; medians are of single tokens.

    python benchmarks/attach.py
"""

import contextlib
import shutil
import statistics
import time
from itertools import islice, pairwise
from typing import Any

import torch

from common import (
    arguments,
    is_built,
    machine,
    memory_of_tokens,
    model_and_tokenizer,
    report,
)
from nearest import Memory, attach, read_documents
from nearest.memory.index_files import IndexChoice
from nearest.memory.writer import rebuild_index
from nearest.models.attach import Session


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


def main() -> None:
    options = arguments(
        __doc__, memory_tokens=1_000_000, new=401, turn=10, rounds=5, indexes="auto,exact,HNSW32"
    )
    model, tokenizer = model_and_tokenizer()
    law = options.corpora / "dclaw"
    original = memory_of_tokens(options, "law")
    (document,) = islice(read_documents([law / "test.jsonl"]), 1)
    ids = [tokenizer.bos_token_id, *tokenizer(document.text)["input_ids"]][:64]
    prompt: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "max_new_tokens": options.new,
        "min_new_tokens": options.new,
        "pad_token_id": tokenizer.bos_token_id,
    }
    report(**machine(), entries=Memory.open(original).entries)
    for spec in options.indexes.split(","):
        path = original
        if spec != "auto":
            path = original.with_name(f"{original.stem}-{spec}.memory")
            if not is_built(path):
                shutil.copytree(original, path)
                rebuild_index(path, IndexChoice(spec))
        memory = Memory.open(path)

        base_ms, attached_ms = [], []
        with attach(model, memory, "knn") as session:
            for number in range(options.rounds + 1):
                turns = Turns(session, options.turn)
                model.generate(**prompt, streamer=turns)
                if number:  # the first round opens files and compiles kernels
                    for times, more in zip(
                        (base_ms, attached_ms), turns.milliseconds(), strict=True
                    ):
                        times += more
        middle = statistics.median(base_ms)
        record = memory.segments[0].record.index
        report(
            benchmark="attach",
            index=record.spec,
            nprobe=record.nprobe,
            recall=record.recall,
            base_ms=middle,
            added_ms=statistics.median(attached_ms) - middle,
        )


if __name__ == "__main__":
    main()
