"""How an approximate index is searched: the cheapest way that finds what exact search finds."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from nearest.index.approximate import ApproximateIndex, inverted_lists
from nearest.index.keys import Keys
from nearest.index.neighbours import Neighbours, VectorIndex
from nearest.index.search import Searched, Searcher

RECALL_QUERIES = 256
RECALL_AT = 1024  # neighbours: what kNN-LM asks for
_MARGINS = (0, 256, 512, 1024, 2048, 3072)


@dataclass(frozen=True)
class SearchParameters:
    """How an approximate index is searched, and the recall measured so.

    `margin` is the number of entries that are fetched beyond k and re-ranked by the stored keys.
    """

    nprobe: int | None = None
    margin: int = 0
    recall: float | None = None


def tune_search(
    index: Any,
    keys: Keys,
    ids: Int[np.ndarray, " m"],
    exact: VectorIndex,
    target: float,
    rng: np.random.Generator,
    nprobe: int | None = None,
) -> SearchParameters:
    """Find quick search parameters whose recall@1024 after re-ranking reaches `target`.

    Queries are a sample of the memory's own keys; each query's own entry is left out. nprobe is
    doubled or the margin widened, whichever gains more, until the target is reached or neither
    gains. The measured recall is returned either way. With `nprobe` given, it is only measured.
    """
    if len(ids) < 2:
        return SearchParameters(recall=1.0)
    sample = _recall_sample(ids, rng)
    truth = _others_found(exact, keys, ids, sample)
    ivf = inverted_lists(index)
    nlist = None if ivf is None else int(ivf.nlist)

    def measured(parameters: SearchParameters) -> SearchParameters:
        backend = ApproximateIndex(index, keys.metric, parameters.nprobe)
        searcher = Searcher([Searched(backend, len(ids), parameters.margin)], keys)
        found = _others_found(searcher, keys, ids, sample)
        return replace(parameters, recall=recall(found, truth))

    if nprobe is not None and nlist is not None:
        return measured(SearchParameters(nprobe=min(nprobe, nlist)))
    best = measured(SearchParameters(nprobe=None if nlist is None else min(4, nlist)))
    while (best.recall or 0) < target:
        trials = []
        if nlist is not None and best.nprobe is not None and best.nprobe < nlist:
            trials.append(measured(replace(best, nprobe=min(2 * best.nprobe, nlist))))
        wider = _MARGINS[_MARGINS.index(best.margin) + 1 :]
        if wider and _wanted(len(ids)) + best.margin < len(ids):
            trials.append(measured(replace(best, margin=wider[0])))
        better = [trial for trial in trials if (trial.recall or 0) > (best.recall or 0) + 1e-3]
        if not better:
            break
        best = max(better, key=lambda trial: trial.recall or 0)
    return best


def measured_recall(
    searcher: VectorIndex,
    keys: Keys,
    ids: Int[np.ndarray, " m"],
    exact: VectorIndex,
    rng: np.random.Generator,
) -> float:
    """Recall@1024 of a searcher, on a sample of the memory's own keys."""
    if len(ids) < 2:
        return 1.0
    sample = _recall_sample(ids, rng)
    found, truth = (_others_found(one, keys, ids, sample) for one in (searcher, exact))
    return recall(found, truth)


def _wanted(entries: int) -> int:
    """Neighbours to find: 1,024, or a tenth of few entries, of which finding all proves nothing."""
    return max(1, min(RECALL_AT, entries // 10))


def _recall_sample(ids: Int[np.ndarray, " m"], rng: np.random.Generator) -> Int[np.ndarray, " s"]:
    return np.sort(rng.choice(ids, size=min(RECALL_QUERIES, len(ids)), replace=False))


def _others_found(
    index: VectorIndex, keys: Keys, ids: Int[np.ndarray, " m"], sample: Int[np.ndarray, " s"]
) -> Int[np.ndarray, "s at"]:
    """The neighbours of entries, without the entries themselves."""
    at = _wanted(len(ids))
    return _without_self(index.search(keys.rows(sample), at + 1), sample, at)


def recall(found: Int[np.ndarray, "q k"], truth: Int[np.ndarray, "q k"]) -> float:
    """Fraction of the true neighbours that were found, averaged over queries."""
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
    return float(np.mean(hits) / truth.shape[1])


def _without_self(
    found: Neighbours, own: Int[np.ndarray, " q"], at: int
) -> Int[np.ndarray, "q at"]:
    """The first `at` ids of each query but its own."""
    order = np.argsort(found.ids == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(found.ids, order, 1)[:, :at]
