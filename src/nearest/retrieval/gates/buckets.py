"""Adaptive λ by the distance of the nearest neighbour (Drozdov et al., arXiv:2210.15859)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.errors import SettingError
from nearest.progress import Progress, no_progress
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.fitting import (
    COARSE_TEMPERATURES,
    KS,
    Temperature,
    best_lams,
    nearest_distance,
    nll,
    observe,
)
from nearest.retrieval.gates.gate import Examples, StoredGate, View

BUCKETS = 64  # as in the paper's code
_LEAST_IN_BUCKET = 32


class BucketsGate(StoredGate):
    """One component, and a λ for each range of distances of the nearest neighbour.

    Its state, float32: ascending `edges`, bucket i holding distances from edges[i − 1] on and below
    edges[i]; and `lams` of each bucket, one more than edges.
    """

    class Config(msgspec.Struct, frozen=True):
        """How the nearest `first` neighbours are weighed."""

        temperature: Temperature
        first: Annotated[int, msgspec.Meta(gt=0)]

    needs_lm = False
    edges: Tensor
    lams: Tensor

    def __init__(self, config: Config, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        edges, lams = state["edges"], state["lams"]
        if edges.ndim != 1 or lams.shape != (len(edges) + 1,):
            raise ValueError(f"{list(lams.shape)} buckets between {list(edges.shape)} edges")
        if edges.dtype != torch.float32 or lams.dtype != torch.float32:
            raise ValueError("edges or λ that are not float32")
        if not (edges.isfinite().all() and (edges.diff() > 0).all()):
            raise ValueError("the edges of buckets do not ascend")
        if not ((lams >= 0) & (lams <= 1)).all():
            raise ValueError("λ outside [0, 1]")
        self.register_buffer("edges", edges)
        self.register_buffer("lams", lams)

    @property
    def components(self) -> tuple[Component, ...]:
        return (_component(self.config.temperature, self.config.first),)

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """λ of the query's bucket; 0 without a dense candidate."""
        nearest = nearest_distance(view)
        lams = self.lams.numpy()[bucket_of(nearest, self.edges.numpy())]
        return np.where(np.isfinite(nearest), lams, np.float32(0))[:, None]


def fit_buckets(
    examples: Iterable[Examples],
    buckets: int = BUCKETS,
    ks: Sequence[int] = KS,
    progress: Progress = no_progress,
) -> BucketsGate:
    """Fit λ of each bucket, the temperature, and the number of neighbours that are weighed.

    Args:
        examples: the text, looked up with every search made.
        buckets: how many with equally many tokens; fewer when a bucket would have less than 32.
        ks: numbers of neighbours that are tried.
        progress: not told; other fits are.

    Raises:
        SettingError: there is nothing to fit, or `buckets` is below 1.
    """
    if buckets < 1:
        raise SettingError(f"buckets must be at least 1, got {buckets}")
    ways = [(temperature, k) for k in ks for temperature in COARSE_TEMPERATURES]
    data = observe(
        examples, lambda view: nearest_distance(view)[:, None], [_component(*way) for way in ways]
    )
    nearest = data.inputs[:, 0]
    edges = _edges(nearest, min(buckets, max(1, len(nearest) // _LEAST_IN_BUCKET)))
    bucket = bucket_of(nearest, edges)
    lams = np.empty((len(edges) + 1, len(ways)), np.float32)
    losses = np.zeros(len(ways))
    for i in range(len(lams)):
        inside = bucket == i
        exact = best_lams(data.lm_probs[inside], data.probs[inside])
        losses += nll(data.lm_probs[inside], data.probs[inside], exact)
        lams[i] = exact
    best = int(losses.argmin())
    state = {"edges": torch.from_numpy(edges), "lams": torch.from_numpy(lams[:, best].copy())}
    return BucketsGate(BucketsGate.Config(*ways[best]), state)


def bucket_of(
    nearest: Float[np.ndarray, " q"], edges: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " q"]:
    """The number of each distance's bucket."""
    bucket: Int[np.ndarray, " q"] = np.searchsorted(edges, nearest, side="right")
    return bucket


def _edges(nearest: Float[np.ndarray, " n"], buckets: int) -> Float[np.ndarray, " edges"]:
    """Between equally many distances; equal distances stay together, so buckets may be fewer."""
    ordered = np.sort(nearest)
    edges: Float[np.ndarray, " edges"] = np.unique(
        ordered[np.arange(1, buckets) * len(ordered) // buckets]
    )
    above: Float[np.ndarray, " edges"] = edges[edges > ordered[0]]
    return above


def _component(temperature: float, first: int) -> Component:
    return Component(("dense",), temperature, first=first)
