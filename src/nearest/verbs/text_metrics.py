"""How near written texts come to references: BLEU, chrF, ROUGE and exact match, with intervals.

Each metric is a function of sums over texts: of n-gram counts for BLEU and chrF (as sacreBLEU's,
arXiv:1804.08771), of one figure a text for ROUGE and exact match. So a resample of the texts costs
a sum, and two systems are compared by resampling the same texts for both (Koehn, W04-3250).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nearest.errors import SettingError, require

_EXTRA = "text-metrics"
_RESAMPLES = 1_000
_SEED = 0


@dataclass(frozen=True)
class Metric:
    """What is counted of each text, and the score (0 to 100) that summed counts give.

    Attributes:
        name: its key in results.
        counts: texts and references → counts (texts, c), float64.
        score: the sum of some texts' counts (c) → score.
    """

    name: str
    counts: Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "texts c"]]
    score: Callable[[Float[np.ndarray, " c"]], float]


class Score(NamedTuple):
    """A metric of a system's texts, 0 to 100.

    `low` and `high` are its 95 % interval by bootstrap over texts, `delta…` the difference to the
    first system and its interval on the same texts; None for a single text, or for the first.
    """

    value: float
    low: float | None
    high: float | None
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None


def metrics_named(names: Sequence[str]) -> list[Metric]:
    """Metrics: "bleu", "chrf", "rouge" (which is rouge1, rouge2 and rougeL) and "exact".

    Raises:
        NearestError: a name is unknown or repeated, or the package that counts is not installed.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise SettingError(f"metric {unknown[0]!r} is unknown: choose among {', '.join(METRICS)}")
    if not names or len(set(names)) != len(names):
        raise SettingError("name at least one metric, and each only once")
    return [metric for name in names for metric in _MAKERS[name]()]


def scores_of(
    metric: Metric, systems: Sequence[Sequence[str]], references: Sequence[str]
) -> list[Score]:
    """One metric of several systems' texts, each compared to the first system's.

    Args:
        metric: what is measured.
        systems: of each the texts, one for each reference.
        references: at least one.
    """
    count = len(references)
    counts = [metric.counts(texts, references) for texts in systems]
    values = [metric.score(one.sum(axis=0)) for one in counts]
    if count < 2:
        firsts = [None, *(value - values[0] for value in values[1:])]
        pairs = zip(values, firsts, strict=True)
        return [Score(value, None, None, delta) for value, delta in pairs]
    rng = np.random.default_rng(_SEED)
    drawn = np.stack(
        [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(_RESAMPLES)]
    )
    resampled = [np.array([metric.score(sums) for sums in drawn @ one]) for one in counts]
    scores = [Score(value, *_ends(some)) for value, some in zip(values, resampled, strict=True)]
    for n in range(1, len(scores)):
        low, high = _ends(resampled[n] - resampled[0])
        scores[n] = scores[n]._replace(delta=values[n] - values[0], delta_low=low, delta_high=high)
    return scores


def _ends(values: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high


def _sacrebleu(name: str, make: Callable[[Any], Any]) -> list[Metric]:
    """A metric of sacreBLEU, by the counts that its own significance tests resample."""
    require("sacrebleu", _EXTRA)
    import sacrebleu

    counter = make(sacrebleu)

    def counts(texts: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, "texts c"]:
        found = counter._extract_corpus_statistics(texts, [references])
        return np.array(found, dtype=np.float64)

    def score(sums: Float[np.ndarray, " c"]) -> float:
        return float(counter._compute_score_from_stats(sums.astype(np.int64).tolist()).score)

    return [Metric(name, counts, score)]


def _rouge() -> list[Metric]:
    require("rouge_score", _EXTRA, "rouge-score")
    from rouge_score.rouge_scorer import RougeScorer

    def metric(name: str) -> Metric:
        scorer = RougeScorer([name])

        def figure(text: str, reference: str) -> float:
            return float(scorer.score(reference, text)[name].fmeasure)

        return _mean(name, figure)

    return [metric(name) for name in ("rouge1", "rouge2", "rougeL")]


def _mean(name: str, figure: Callable[[str, str], float]) -> Metric:
    """The mean of a figure (0 to 1) of each text, as a percentage."""

    def counts(texts: Sequence[str], references: Sequence[str]) -> Float[np.ndarray, "texts c"]:
        pairs = zip(texts, references, strict=True)
        return np.array([[figure(*pair), 1.0] for pair in pairs])

    return Metric(name, counts, lambda sums: float(100 * sums[0] / sums[1]))


_MAKERS: dict[str, Callable[[], list[Metric]]] = {
    "bleu": lambda: _sacrebleu("bleu", lambda package: package.BLEU()),
    "chrf": lambda: _sacrebleu("chrf", lambda package: package.CHRF()),
    "rouge": _rouge,
    "exact": lambda: [_mean("exact", lambda text, other: float(text.strip() == other.strip()))],
}
METRICS = tuple(_MAKERS)
