"""Perplexity against saved searches and against time, for every method, in one pass of the model.

Each method is followed through the text once for every value of the setting that decides how often
it searches. They share the model's pass and the dense searches, of which each query has one. For
methods with passages before the text the model reads it again, once for each way to choose them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.corpus.text import Text
from nearest.encode.identity import AnyModel
from nearest.markup import number, table
from nearest.memory import Memory
from nearest.models.in_context import reader_of
from nearest.models.method_run import MethodRun
from nearest.models.scoring import ScoredBlock, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.search_cache import SearchCache
from nearest.retrieval.settings import BASE, Settings, method_named
from nearest.retrieval.tuned import warn_of_settings
from nearest.verbs.results import Cost, Result, data_frame, result_of
from nearest.verbs.variations import (
    KNN,
    MIN_KNNS,
    SKIPS,
    Variation,
    checked_methods,
    checked_values,
    default_methods,
    variations,
)

RANDOM_SKIP = "random_skip"  # kNN-LM whose searches are left out by lot, as a measure for the rest

_REMEMBERED = 1 << 15  # queries whose neighbours are remembered at a time
_WARM_UP = 4  # predictions of each method before clocks start: files are opened, kernels compiled


@dataclass(frozen=True)
class Point:
    """A method's figures at one value of what is varied; no setting where nothing is.

    `result.added_ms` is the method's own time plus that of the searches it asks for, each at the
    mean cost of one in this sweep; with passages also what the model reads longer.
    """

    setting: str | None
    value: float | None
    result: Result

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON keys of `eval`, and after the method what is varied ("inf" as text)."""
        value = "inf" if self.value == float("inf") else self.value
        figures = self.result.figures()
        return {
            "method": figures.pop("method"),
            "setting": self.setting,
            "value": value,
            **figures,
        }


@dataclass(frozen=True)
class Sweep:
    """A whole sweep.

    Attributes:
        points: the base model's, then each method's in the order of the methods asked for.
        search_ms: mean time of a dense search, by method.
        untuned: methods whose settings are defaults, because the memory was not tuned for them.
    """

    points: list[Point]
    search_ms: dict[str, float]
    untuned: list[str]

    def _repr_html_(self) -> str:
        """A row for each point, for notebooks."""
        rows = [
            (
                one.result.method,
                "" if one.setting is None else f"{one.setting} {number(one.value, 'g')}",
                number(one.result.ppl, ".2f"),
                number(one.result.foss, ".2f"),
                number(one.result.added_ms, ".3f"),
            )
            for one in self.points
        ]
        return table(("", "setting", "perplexity", "saved searches", "added ms a token"), rows)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each point, its columns as in `Point.to_dict`.

        Raises:
            NearestError: pandas is not installed.
        """
        return data_frame([point.to_dict() for point in self.points])


def sweep(
    model: AnyModel,
    memory: Memory,
    documents: ScoredInput,
    methods: Sequence[str] | None = None,
    *,
    min_knns: Sequence[float] | None = None,
    skip: Sequence[float] | None = None,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    score_eos: bool = False,
    batch_size: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    **passages: int | None,
) -> Sweep:
    """Perplexity, FoSS and time of methods at every value of what decides how often they search.

    Methods with a search gate vary `skip`, others that follow pointers `min_knns`; the rest give
    one point each. kNN-LM is also given with searches skipped at random: its expected figures,
    which mix those of kNN-LM and of the base model. All other settings are what was tuned.

    Args:
        model, memory, documents, tokenizer, window, stride, score_eos, batch_size, force, progress:
            as in `evaluate`.
        methods: that use the memory; those it was tuned for when not given, or all that need no
            gate when it was tuned for none. "in-context", alone or with another, only where named.
        min_knns: values to vary; MIN_KNNS when not given.
        skip: values to vary, also of random skipping; SKIPS when not given.
        **passages: settings of passages, by the names of `Settings`.

    Raises:
        NearestError: model, memory, text, methods or values cannot be used.
    """
    names = default_methods(memory) if methods is None else checked_methods(methods)
    min_knns = checked_values(names, "min_knns", min_knns, MIN_KNNS)
    skip = checked_values(names, "skip", skip, SKIPS)
    cache = SearchCache(memory)
    varied = variations(memory, names, min_knns, skip, cache, passages)
    prepared = Scorer.prepare(
        model,
        memory,
        documents,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        score_eos=score_eos,
        batch_size=batch_size,
        force=force,
    )
    for name in names:
        if method_named(name).kinds and memory.settings(name):  # untuned ones are told apart
            warn_of_settings(memory, name, ())
    text = prepared.text
    runs = [_Run(variation, len(text.documents)) for variation in varied]
    readings: dict[Settings | None, list[_Run]] = {None: []}
    for run in runs:
        readings.setdefault(run.variation.passages, []).append(run)
    readers = {way: reader_of(prepared, [memory], way) for way in readings}
    base = np.zeros(len(text.documents))
    seconds = dict.fromkeys(readings, 0.0)
    done, total = 0, text.predictions * len(runs)
    for way, several in readings.items():
        with_view = any(run.needs_lm for run in several)
        for turn, block in enumerate(readers[way].blocks(progress, "read", with_view)):
            seconds[way] += block.seconds
            if way is None:
                np.add.at(base, block.documents, -block.lm_log_probs.double().numpy())
            if turn == 0:
                _warm_up(several, block, cache)
            for piece in _pieces(block):
                for run in sorted(several, key=_searches_most):
                    run.follow(piece, cache)
                    done += len(piece.targets)
                    progress("sweep", done, total)
                cache.forget()
    base_seconds = seconds[None]
    for way, several in readings.items():
        for run in several:
            run.read_longer = seconds[way] - base_seconds
    points = [Point(None, None, result_of(text, BASE, base, Cost(base_seconds), {}))]
    for run in runs:
        points += _points(run, text, base, base_seconds, cache, skip)
    return Sweep(
        points,
        {run.method: 1000 * run.seconds_a_search(cache) for run in runs if run.searches},
        [name for name in names if method_named(name).kinds and not memory.settings(name)],
    )


class _Run:
    """A variation on its way through the text, with its own time apart from that of searches.

    `read_longer` are seconds that the model reads longer with passages than without.
    """

    def __init__(self, variation: Variation, documents: int) -> None:
        self.variation = variation
        self.nll = np.zeros(documents)
        self.read_longer = 0.0
        self._run = None if variation.lookup is None else MethodRun(variation.lookup)
        self._answered_in = 0.0

    @property
    def method(self) -> str:
        """The method's name, as in the command."""
        return self.variation.method

    @property
    def searches(self) -> int:
        """Number of searches that it asked for."""
        return 0 if self._run is None else self._run.searches

    @property
    def needs_lm(self) -> bool:
        """Whether its queries must say what the model predicts."""
        return self._run is not None and self._run.lookup.needs_lm

    def follow(self, block: ScoredBlock, cache: SearchCache) -> None:
        """Predict a block."""
        before, log_probs = cache.seconds, block.lm_log_probs
        if self._run is not None:
            log_probs = self._run.log_probs(block)
        self._answered_in += cache.seconds - before
        np.add.at(self.nll, block.documents, -log_probs.double().numpy())

    def seconds_a_search(self, cache: SearchCache) -> float:
        """Mean seconds of a search of its kind."""
        settings = self.variation.settings
        return cache.seconds_a_search(settings.k, settings.distances, settings.rerank)

    def cost(self, base_seconds: float, cache: SearchCache) -> Cost:
        """Seconds as if it had made its searches itself."""
        if self._run is None:
            return Cost(base_seconds, self.read_longer)
        own = self._run.seconds - self._answered_in
        searching = self.searches * self.seconds_a_search(cache)
        own += searching + self.read_longer
        return Cost(base_seconds, own, 1 - self.searches / self._run.tokens)


def _points(
    run: _Run,
    text: Text,
    base: Float[np.ndarray, " documents"],
    base_seconds: float,
    cache: SearchCache,
    skips: Sequence[float],
) -> list[Point]:
    """The run's own, and for kNN-LM those of skipping searches at random."""
    method, setting, value, chosen, lookup = run.variation
    settings, cost = chosen.of(method), run.cost(base_seconds, cache)
    found = None if lookup is None else lookup.memory.settings_from(method)
    own = result_of(text, method, run.nll, cost, settings, base, settings_from=found)
    points = [Point(setting, value, own)]
    for share in sorted(set(skips) - {0}) if method == KNN else ():
        nll = (1 - share) * run.nll + share * base
        cost_then = Cost(base_seconds, (1 - share) * cost.own, share)
        result = result_of(text, method, nll, cost_then, settings, base, settings_from=found)
        points.append(Point(RANDOM_SKIP, share, result))
    return points


def _searches_most(run: _Run) -> tuple[bool, float, float]:
    """Sorts those first whose searches are made in the largest batches, for others to share."""
    lookup, settings = run.variation.lookup, run.variation.settings
    return lookup is not None and lookup.keeps_state, settings.skip, -settings.min_knns


def _pieces(block: ScoredBlock) -> Iterator[ScoredBlock]:
    """Some predictions at a time, so that few neighbours need be remembered for all runs."""
    for first in range(0, len(block.targets), _REMEMBERED):
        yield block.rows(slice(first, first + _REMEMBERED))


def _warm_up(runs: Iterable[_Run], block: ScoredBlock, cache: SearchCache) -> None:
    """Let every method predict a little before the clocks start."""
    few = block.rows(slice(min(_WARM_UP, len(block.targets) // 2)))
    if not len(few.targets):
        return
    for run in runs:
        if run.variation.lookup is not None:
            MethodRun(run.variation.lookup).log_probs(few)
    cache.restart_clock()
