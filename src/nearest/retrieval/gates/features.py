"""What gates see of a prediction: a few cheap figures of the model and of each kind."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nearest.retrieval.candidates import KINDS
from nearest.retrieval.distribution import Component, candidate_weights
from nearest.retrieval.gates.gate import View
from nearest.retrieval.votes import votes


def features(
    view: View, kinds: Sequence[str], voted: Sequence[Component]
) -> Float[np.ndarray, "q features"]:
    """Figures of the model, of each kind, and of the votes of some components, float32.

    The model's entropy and largest log-probability; of each kind the log of the number of its
    candidates, of the nearest's distance and of the longest match (logs of 1 + x, 0 where it has
    nothing); of each voted component as in `votes.VOTES`.
    """
    lm = view.queries.lm
    if lm is None:
        raise ValueError("this gate needs the language model's view of the queries")
    columns = [lm.entropy, lm.max_log_prob]
    for kind in KINDS:
        if kind in kinds:
            columns += _of_kind(view, kind)
    for component in voted:
        everything = np.ones((len(lm.entropy), 1))
        weights = candidate_weights(view.candidates, [component], everything).candidates
        own = view.candidates.of(*component.kinds)
        columns += list(votes(weights[:, own], view.candidates.values[:, own]).T)
    return np.stack(columns, axis=1).astype(np.float32)


def _of_kind(view: View, kind: str) -> list[Float[np.ndarray, " q"]]:
    columns = view.candidates.of(kind)
    distances = view.candidates.distances[:, columns]
    count = np.isfinite(distances).sum(axis=1)
    nearest = np.where(count > 0, distances.min(axis=1, initial=np.inf), 0)
    longest = view.candidates.lengths[:, columns].max(axis=1, initial=0)
    return [
        np.log1p(count),
        # An inner product, negated as a distance, may be below 0.
        np.sign(nearest) * np.log1p(np.abs(nearest)),
        np.log1p(longest),
    ]
