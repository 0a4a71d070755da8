"""Predictions of a text as mixture gates are trained on them: at states that any may lead to."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from nearest.memory import Memory
from nearest.models.scoring import ScoredBlock
from nearest.progress import Progress, no_progress
from nearest.retrieval import automaton
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.gates.fit_mixture import SearchEverywhere, distance_unit
from nearest.retrieval.gates.gate import Examples, Gate
from nearest.retrieval.gates.mixture import MixtureConfig
from nearest.retrieval.lookup import Ahead, Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.settings import Settings, method_named
from nearest.verbs.settings_search import looked_up

_FOR_UNIT = 4  # batches of which the distances' unit is taken


def mixture_examples(
    memory: Memory,
    method: str,
    settings: Settings,
    blocks: Sequence[ScoredBlock],
    progress: Progress = no_progress,
    left: Callable[[Examples], Examples] = lambda one: one,
) -> tuple[float, Iterator[tuple[Examples, ...]]]:
    """What a mixture gate is trained on: the distances' unit, and a text's predictions.

    Each is looked up in every way that the gate may meet: with and without the dense search where
    the gate decides about searches, else in one.

    Args:
        memory, method, settings: what is looked up, and how.
        blocks: the text, as the model reads it.
        progress: told (stage, done, total).
        left: takes what was found of a batch, and returns what training may see of it.
    """
    chosen = method_named(method)
    total = sum(len(block.targets) for block in blocks)
    # What is found does not depend on the unit; what the gate makes of it does.
    everywhere = SearchEverywhere(MixtureConfig.over(chosen.weighed, 1.0))
    lookup = (_EitherWay if chosen.asks else Lookup)(
        memory, method, replace(settings, guard=False), everywhere
    )
    rest = map(left, looked_up(lookup, blocks, progress, f"tune {method}", total))
    some = list(itertools.islice(rest, _FOR_UNIT))
    found = itertools.chain(some, rest)
    if chosen.asks:
        return distance_unit(some), (_ways(one, settings) for one in found)
    return distance_unit(some), ((one,) for one in found)


class _EitherWay(Lookup):
    """Searches for every query, but lets pointers go on from what is found only now and then.

    Both ways are then seen at states of which a gate may lead to any. `Candidates.searched` says
    whether pointers go on; how often they do changes every 256 tokens, from never to always.
    """

    def __init__(self, memory: Memory, method: str, settings: Settings, gate: Gate) -> None:
        super().__init__(memory, method, replace(settings, dedup=False, skip=0.0), gate)
        self._dedup = settings.dedup

    def candidates(
        self,
        queries: Queries,
        pointers: Int[np.ndarray, "q p"] | None = None,
        ahead: Ahead | None = None,
    ) -> Candidates:
        found = super().candidates(queries, pointers, ahead)
        often = np.round(_uniform(queries.ends // 256) * 4) / 4
        return found._replace(searched=_uniform(queries.ends) < often)

    def follow(
        self, candidates: Candidates, tokens: Int[np.ndarray, " q"]
    ) -> Int[np.ndarray, "q p"]:
        passed = np.zeros(candidates.ids.shape, dtype=bool)
        passed[:, candidates.of("dense")] = ~candidates.searched[:, None]
        going_on = candidates.without(passed)
        return super().follow(_without_repeated(going_on) if self._dedup else going_on, tokens)


def _uniform(numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A fixed number inside [0, 1) for each number, evenly spread."""
    return np.modf(numbers * 0.6180339887498949)[0]


def _ways(one: Examples, settings: Settings) -> tuple[Examples, Examples]:
    """A prediction as after the dense search, and as without it."""
    found = one.view.candidates
    dense = found.columns[0]
    without = Candidates(
        found.ids[:, dense:],
        found.values[:, dense:],
        found.distances[:, dense:],
        found.lengths[:, dense:],
        (0, *found.columns[1:]),
        np.zeros_like(found.searched),
        None if found.log_counts is None else found.log_counts[:, dense:],
    )
    if settings.dedup:
        found, without = _without_repeated(found), _without_repeated(without)
    searched = found._replace(searched=np.ones_like(found.searched))
    view = one.view
    return (
        one._replace(view=view._replace(candidates=searched)),
        one._replace(view=view._replace(candidates=without)),
    )


def _without_repeated(candidates: Candidates) -> Candidates:
    """Without pointers that are neighbours too."""
    pointed = candidates.of("pointers")
    of_pointers = candidates.ids[:, pointed]
    kept = automaton.without_repeated(of_pointers, candidates.ids[:, candidates.of("dense")])
    gone = np.zeros(candidates.ids.shape, dtype=bool)
    gone[:, pointed] = kept < 0
    return candidates.without(gone)
