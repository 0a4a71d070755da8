"""What compiled kernels compute, in numpy and lists, a query at a time where that is plainer."""

import numpy as np
from jaxtyping import Float, Int, Int8

from nearest.index.clusters import Clusters
from nearest.index.neighbours import Metric
from nearest.retrieval.votes import VOTES


def _distances(
    rows: Float[np.ndarray, "q k dim"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
) -> Float[np.ndarray, "q k"]:
    """The distances that every kernel computes, of decoded keys in float64."""
    wide, queries = rows.astype(np.float64), queries[:, None].astype(np.float64)
    distances = ((wide - queries) ** 2).sum(-1) if metric == "l2" else -(wide * queries).sum(-1)
    return np.where(ids < 0, np.inf, distances).astype(np.float32)


def plain_key_distances(
    keys: Float[np.ndarray, "n dim"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
) -> Float[np.ndarray, "q k"]:
    """`key_distances` in numpy."""
    return _distances(keys[ids], queries, ids, metric)


def plain_scaled_key_distances(
    codes: Int8[np.ndarray, "n dim"],
    scales: Float[np.ndarray, " n"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
) -> Float[np.ndarray, "q k"]:
    """`scaled_key_distances` in numpy."""
    rows = codes[ids] * scales[ids].astype(np.float64)[..., None]
    return _distances(rows, queries, ids, metric)


def plain_extend(
    pointers: Int[np.ndarray, "q p"], clusters: Clusters | None, most: int
) -> list[list[int]]:
    """`extend` in plain Python: lists without padding."""
    rows = []
    for row in pointers.tolist():
        kept = [pointer for pointer in row if pointer >= 0][:most]
        if clusters is not None and len(kept) < most:
            own = [int(clusters.labels[pointer]) for pointer in kept]
            for cluster in sorted({c for c in own if c >= 0}, key=lambda c: (-own.count(c), c)):
                a, b = clusters.offsets[cluster : cluster + 2]
                kept += clusters.members[a:b].tolist()
        rows.append(kept[:most])
    return rows


def plain_component_weights(
    distances: Float[np.ndarray, "q c"],
    lengths: Int[np.ndarray, "q c"],
    temperature: float,
    length_power: float,
) -> Float[np.ndarray, "q c"]:
    """(1 + m)^b · exp(−d/T), normalised in each row, in numpy; rows without candidates are 0."""
    scores = length_power * np.log1p(lengths.astype(float)) - distances / temperature
    best = scores.max(axis=1, initial=-np.inf, keepdims=True)
    found = np.isfinite(best)
    weights = np.where(found, np.exp(scores - np.where(found, best, 0.0)), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    normalised: Float[np.ndarray, "q c"] = weights / np.where(total > 0, total, 1.0)
    return normalised


def plain_votes(
    weights: Float[np.ndarray, "q c"], values: Int[np.ndarray, "q c"]
) -> Float[np.ndarray, "q 3"]:
    """VOTES of each row's distribution over tokens (entropy in nats); 0 without candidates."""
    found = np.zeros((len(weights), len(VOTES)))
    for row, (own, tokens) in enumerate(zip(weights.tolist(), values.tolist(), strict=True)):
        totals: dict[int, float] = {}
        for weight, token in zip(own, tokens, strict=True):
            if token >= 0 and weight > 0:
                totals[token] = totals.get(token, 0.0) + weight
        if totals:
            probs = np.array(list(totals.values()))
            found[row] = probs.max(), -(probs * np.log(probs)).sum(), np.log1p(len(totals))
    return found
