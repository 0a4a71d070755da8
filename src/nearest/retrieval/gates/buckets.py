"""Adaptive λ by the distance of the nearest neighbour (Drozdov et al., arXiv:2210.15859)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nearest.errors import SettingError
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.fitting import (
    TEMPERATURES,
    best_lams,
    nearest_distance,
    nll,
    observe,
    temperature_of,
)
from nearest.retrieval.gates.gate import View
from nearest.retrieval.gates.seen import Seen

BUCKETS = 64  # as in the paper's code
KS = (16, 64, 256, 1024)
_LEAST_IN_BUCKET = 32


@dataclass(frozen=True)
class BucketsGate:
    """One component, and a λ for each range of distances of the nearest neighbour.

    Attributes:
        component: of dense candidates.
        edges: ascending; bucket i holds distances from edges[i − 1] on and below edges[i].
        lams: of each bucket, one more than edges.
    """

    component: Component
    edges: Float[np.ndarray, " edges"]  # float32
    lams: Float[np.ndarray, " buckets"]  # float32

    @property
    def components(self) -> tuple[Component, ...]:
        """The one."""
        return (self.component,)

    @property
    def needs_lm(self) -> bool:
        """It sees distances alone."""
        return False

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """λ of the query's bucket; 0 without a dense candidate."""
        nearest = nearest_distance(view)
        lams = self.lams[bucket_of(nearest, self.edges)]
        return np.where(np.isfinite(nearest), lams, np.float32(0))[:, None]

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The component as JSON, edges and λ as arrays."""
        config = {"temperature": self.component.temperature, "first": self.component.first}
        return config, {"edges": self.edges, "lams": self.lams}

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "BucketsGate":
        """The gate that was stored."""
        edges, lams = arrays["edges"], arrays["lams"]
        if edges.ndim != 1 or lams.shape != (len(edges) + 1,):
            raise ValueError(f"{lams.shape} buckets between {edges.shape} edges")
        if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
            raise ValueError("the edges of buckets do not ascend")
        if not ((lams >= 0) & (lams <= 1)).all():
            raise ValueError("λ outside [0, 1]")
        return cls(_component(temperature_of(config), int(config["first"])), edges, lams)


def fit_buckets(
    seen: Iterable[Seen],
    buckets: int = BUCKETS,
    temperatures: Sequence[float] = TEMPERATURES,
    ks: Sequence[int] = KS,
) -> BucketsGate:
    """Fit λ of each bucket, the temperature, and the number of neighbours that are weighed.

    Args:
        seen: the text, searched.
        buckets: how many with equally many tokens; fewer when a bucket would have less than 32.
        temperatures, ks: that are tried.

    Raises:
        SettingError: there is nothing to fit, or `buckets` is below 1.
    """
    if buckets < 1:
        raise SettingError(f"buckets must be at least 1, got {buckets}")
    components = [_component(temperature, k) for k in ks for temperature in temperatures]
    data = observe(seen, lambda view: nearest_distance(view)[:, None], components)
    nearest = data.inputs[:, 0]
    edges = _edges(nearest, min(buckets, max(1, len(nearest) // _LEAST_IN_BUCKET)))
    bucket = bucket_of(nearest, edges)
    lams = np.empty((len(edges) + 1, len(components)))
    losses = np.zeros(len(components))
    for i in range(len(lams)):
        inside = bucket == i
        lams[i] = best_lams(data.lm_probs[inside], data.probs[inside])
        losses += nll(data.lm_probs[inside], data.probs[inside], lams[i])
    best = int(losses.argmin())
    return BucketsGate(components[best], edges, lams[:, best].astype(np.float32))


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
