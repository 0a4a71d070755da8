"""Perplexity against saved searches and against time, for every method, in one pass of the model.

Each method is followed through the text once for every value of the setting that decides how often
it searches. They share the model's pass and the dense searches, of which each query has one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.corpus.text import Text
from nearest.encode.identity import AnyModel
from nearest.memory import Memory
from nearest.models.in_context import reader_of
from nearest.models.method_run import MethodRun
from nearest.models.scoring import ScoredBlock, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.search_cache import SearchCache
from nearest.retrieval.settings import BASE
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

_REMEMBERED = 1 << 15  # queries whose neighbours are remembered at a time, and a document more
_WARM_UP = 4  # predictions of each method before clocks start: files are opened, kernels compiled


@dataclass(frozen=True)
class Point:
    """A method's figures at one value of what is varied; no setting where nothing is.

    `result.added_ms` is the method's own time plus that of the searches it asks for, each at the
    mean cost of one in this sweep.
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
) -> Sweep:
    """Perplexity, FoSS and time of methods at every value of what decides how often they search.

    Methods with a search gate vary `skip`, others that follow pointers `min_knns`; the rest give
    one point each. kNN-LM is also given with searches skipped at random: its expected figures,
    which mix those of kNN-LM and of the base model. All other settings are what was tuned.

    Args:
        model, memory, documents, tokenizer, window, stride, score_eos, batch_size, force, progress:
            as in `evaluate`.
        methods: that use the memory; those it was tuned for when not given, or all that need no
            gate when it was tuned for none.
        min_knns: values to vary; MIN_KNNS when not given.
        skip: values to vary, also of random skipping; SKIPS when not given.

    Raises:
        NearestError: model, memory, text, methods or values cannot be used.
    """
    names = default_methods(memory) if methods is None else checked_methods(methods)
    min_knns = checked_values(names, "min_knns", min_knns, MIN_KNNS)
    skip = checked_values(names, "skip", skip, SKIPS)
    cache = SearchCache(memory)
    varied = variations(memory, names, min_knns, skip, cache)
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
    scorer = reader_of(prepared, [memory], None)
    text = prepared.text
    runs = [_Run(variation, len(text.documents)) for variation in varied]
    searching_most = sorted(runs, key=_searches_most)
    base, base_seconds = np.zeros(len(text.documents)), 0.0
    done, total = 0, text.predictions * len(runs)
    with_view = any(variation.lookup.needs_lm for variation in varied)
    for number, block in enumerate(scorer.blocks(progress, "read", with_view)):
        base_seconds += block.seconds
        np.add.at(base, block.documents, -block.lm_log_probs.double().numpy())
        if number == 0:
            _warm_up(runs, block, cache)
        for piece in _pieces(block):
            for run in searching_most:
                run.follow(piece, cache)
                done += len(piece.targets)
                progress("sweep", done, total)
            cache.forget()
    points = [Point(None, None, result_of(text, BASE, base, Cost(base_seconds), {}))]
    for run in runs:
        points += _points(run, text, base, base_seconds, cache, skip)
    return Sweep(
        points,
        {run.method: 1000 * run.seconds_a_search(cache) for run in runs if run.searches},
        [name for name in names if not memory.settings(name)],
    )


class _Run:
    """A variation on its way through the text, with its own time apart from that of searches."""

    def __init__(self, variation: Variation, documents: int) -> None:
        self.variation = variation
        self.nll = np.zeros(documents)
        self._run = MethodRun(variation.lookup)
        self._answered_in = 0.0

    @property
    def method(self) -> str:
        """Its name."""
        return self.variation.method

    @property
    def searches(self) -> int:
        """Number of searches that it asked for."""
        return self._run.searches

    def follow(self, block: ScoredBlock, cache: SearchCache) -> None:
        """Predict a block."""
        before = cache.seconds
        log_probs = self._run.log_probs(block)
        self._answered_in += cache.seconds - before
        np.add.at(self.nll, block.documents, -log_probs.double().numpy())

    def seconds_a_search(self, cache: SearchCache) -> float:
        """Mean seconds of a search of its kind."""
        settings = self.variation.lookup.settings
        return cache.seconds_a_search(settings.k, settings.distances, settings.rerank)

    def cost(self, base_seconds: float, cache: SearchCache) -> Cost:
        """Seconds as if it had made its searches itself."""
        own = self._run.seconds - self._answered_in
        searching = self.searches * self.seconds_a_search(cache)
        return Cost(base_seconds, own + searching, 1 - self.searches / self._run.tokens)


def _points(
    run: _Run,
    text: Text,
    base: Float[np.ndarray, " documents"],
    base_seconds: float,
    cache: SearchCache,
    skips: Sequence[float],
) -> list[Point]:
    """The run's own, and for kNN-LM those of skipping searches at random."""
    method, setting, value, lookup = run.variation
    settings, cost = lookup.settings.of(method), run.cost(base_seconds, cache)
    found = lookup.memory.settings_from(method)
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
    lookup = run.variation.lookup
    return lookup.keeps_state, lookup.settings.skip, -lookup.settings.min_knns


def _pieces(block: ScoredBlock) -> Iterator[ScoredBlock]:
    """Whole documents at a time, so that few neighbours need be remembered for all runs."""
    starts = np.flatnonzero(np.diff(block.documents, prepend=-1))
    first = 0
    for start in [*starts[1:], len(block.targets)]:
        if start - first >= _REMEMBERED or start == len(block.targets):
            yield block.rows(slice(first, start))
            first = start


def _warm_up(runs: Iterable[_Run], block: ScoredBlock, cache: SearchCache) -> None:
    """Let every method predict a little before the clocks start."""
    few = block.rows(slice(min(_WARM_UP, len(block.targets) // 2)))
    if not len(few.targets):
        return
    for run in runs:
        MethodRun(run.variation.lookup).log_probs(few)
    cache.restart_clock()
