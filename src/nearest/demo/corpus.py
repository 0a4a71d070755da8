"""The demo's corpus: the language reference that every CPython carries, split by topic.

`pydoc` ships the reference as topics. Many repeat a part of a longer one ("for" stands in
"compound" too), so what repeats is left out: nothing that is scored may stand in the memory.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from nearest.corpus.documents import Document
from nearest.folder import write_atomically

_RUN = 8  # words; shared runs this long are copied, not chance
_REPEATED = 0.05  # of a topic's runs
_CHAPTER = 16_000  # characters; one chapter among the scored topics would outweigh all others


class Split(NamedTuple):
    """Documents to remember, to tune on and to score, and the names of the topics left out."""

    memory: list[Document]
    tuning: list[Document]
    test: list[Document]
    repeated: list[str]


def split_topics(topics: Mapping[str, str]) -> Split:
    """Split topics by rule alone: what repeats, then length, then name.

    Chapters go to the memory; a hash of the name sends a quarter of the others there, a quarter to
    tuning and half to the test.
    """
    distinct = _distinct(topics)
    split = Split([], [], [], sorted(set(topics) - set(distinct)))
    for name in sorted(distinct):
        text = topics[name]
        part = split.memory if len(text) > _CHAPTER else _part_of(name, split)
        title = text.strip().split("\n", 1)[0]
        part.append(Document(name, text, {"title": title}, f"pydoc topic {name!r}"))
    return split


def _part_of(name: str, split: Split) -> list[Document]:
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 100
    return split.memory if percent < 25 else split.tuning if percent < 50 else split.test


def _distinct(topics: Mapping[str, str]) -> list[str]:
    """Names of the topics that hardly repeat any longer one."""
    names: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        runs = word_runs(topics[name])
        if len(runs & seen) <= _REPEATED * len(runs):
            names.append(name)
            seen |= runs
    return names


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Every run of eight words; the whole text where it is shorter."""
    words = text.split()
    return {tuple(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))}


def repeated_share(texts: Iterable[str], others: Iterable[str]) -> float:
    """Share of the eight-word runs of some texts that stand in others too."""
    runs = set().union(*map(word_runs, texts))
    return len(runs & set().union(*map(word_runs, others))) / len(runs)


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as the command line reads them, one JSON object a line."""
    lines = (
        json.dumps({"id": item.id, "text": item.text, **item.metadata}, ensure_ascii=False)
        for item in documents
    )
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
