"""What gates see of a prediction: a few cheap figures of the model and of each source."""

import numpy as np
from jaxtyping import Float

from nearest.retrieval.candidates import SOURCES
from nearest.retrieval.gates.gate import View

LM_FEATURES = ("lm entropy", "lm log max probability")
_OF_SOURCE = ("log count", "log nearest distance", "log longest match")
FEATURES = (*LM_FEATURES, *(f"{source} {name}" for source in SOURCES for name in _OF_SOURCE))


def features(view: View, names: tuple[str, ...] = FEATURES) -> Float[np.ndarray, "q features"]:
    """The features of these names, float32; logs are of 1 + x, and 0 where a source has nothing."""
    lm = view.queries.lm
    if lm is None:
        raise ValueError("this gate needs the language model's view of the queries")
    columns = {LM_FEATURES[0]: lm.entropy, LM_FEATURES[1]: lm.max_log_prob}
    for source in SOURCES:
        if any(name.startswith(source) for name in names):
            columns |= _of_source(view, source)
    return np.stack([columns[name] for name in names], axis=1).astype(np.float32)


def _of_source(view: View, source: str) -> dict[str, Float[np.ndarray, " q"]]:
    columns = view.candidates.of(source)
    distances = view.candidates.distances[:, columns]
    count = np.isfinite(distances).sum(axis=1)
    nearest = np.where(count > 0, distances.min(axis=1, initial=np.inf), 0)
    longest = view.candidates.lengths[:, columns].max(axis=1, initial=0)
    # An inner product, negated as a distance, may be below 0.
    log_nearest = np.sign(nearest) * np.log1p(np.abs(nearest))
    return {
        f"{source} log count": np.log1p(count),
        f"{source} log nearest distance": log_nearest,
        f"{source} log longest match": np.log1p(longest),
    }
