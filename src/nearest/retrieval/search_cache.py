"""Dense searches that several methods share: each is made once, timed, and remembered."""

import time
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from nearest.index.neighbours import Neighbours
from nearest.memory import Memory


@runtime_checkable
class Search(Protocol):
    """The signature of `Memory.search`."""

    def __call__(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        distances: str,
        rerank: int,
        *,
        ordered: bool,
    ) -> Neighbours:
        """The k nearest entries of each query."""


@dataclass
class _Answers:
    """Results of one kind of search by the query's bytes, and the time that they took."""

    by_query: dict[bytes, Neighbours] = field(default_factory=dict)
    seconds: float = 0.0
    searched: int = 0


class SearchCache:
    """Searches a memory as `Memory.search` does, but for no query twice until `forget`.

    Searches are of one kind when they measure the same candidates by the same distances: the fewer
    neighbours asked for are then the first of the more. Each remembered query takes 12 bytes a
    candidate.

    Attributes:
        seconds: spent in answering, searches included.
    """

    def __init__(self, memory: Memory) -> None:
        self.seconds = 0.0
        self._memory = memory
        self._answers: dict[tuple[str, int], _Answers] = {}

    def __call__(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        distances: str,
        rerank: int,
        *,
        ordered: bool = True,
    ) -> Neighbours:
        """As `Memory.search`, always in order: fewer neighbours are the first of more."""
        started = time.perf_counter()
        wide = _fetched(k, distances, rerank)
        answers = self._answers.setdefault((distances, wide), _Answers())
        names = [row.tobytes() for row in queries]
        unseen = {name: row for row, name in enumerate(names) if name not in answers.by_query}
        if unseen:
            self._search(queries, unseen, wide, distances, answers)
        found = Neighbours(
            np.stack([answers.by_query[name].ids[0, :k] for name in names]),
            np.stack([answers.by_query[name].distances[0, :k] for name in names]),
        )
        self.seconds += time.perf_counter() - started
        return found

    def seconds_a_search(self, k: int, distances: str, rerank: int) -> float:
        """Mean time of a search of this kind since the clock was started; 0 where none was made."""
        answers = self._answers.get((distances, _fetched(k, distances, rerank)), _Answers())
        return answers.seconds / max(1, answers.searched)

    def restart_clock(self) -> None:
        """Leave what was searched so far out of the time of a search."""
        for answers in self._answers.values():
            answers.seconds, answers.searched = 0.0, 0

    def forget(self) -> None:
        """Forget the queries, but not what they cost."""
        for answers in self._answers.values():
            answers.by_query.clear()

    def _search(
        self,
        queries: Float[np.ndarray, "q dim"],
        unseen: dict[bytes, int],
        wide: int,
        distances: str,
        answers: _Answers,
    ) -> None:
        started = time.perf_counter()
        found = self._memory.search(queries[list(unseen.values())], wide, distances, wide)
        answers.seconds += time.perf_counter() - started
        answers.searched += len(unseen)
        for row, name in enumerate(unseen):
            answers.by_query[name] = Neighbours(*(array[row : row + 1] for array in found))


def _fetched(k: int, distances: str, rerank: int) -> int:
    """How many entries a search must look at; the index's own distances know no candidates."""
    return max(k, rerank) if distances == "keys" else k
