"""Our gate: a small network mixes several components from cheap features.

Components are made of dense, pointed and matched candidates, each weighed at several temperatures
and length powers; the language model is one more. A second, smaller network guesses before the
dense search what it would gain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from nearest.retrieval.candidates import SOURCES
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.features import features
from nearest.retrieval.gates.gate import View
from nearest.retrieval.gates.network import Network


@dataclass(frozen=True)
class Search:
    """Guesses what a dense search gains, in nats, and where its guesses lay on the tuning text."""

    names: tuple[str, ...]
    network: Network
    quantiles: Float[np.ndarray, " quantiles"]  # of the guesses, at even steps from 0 to 1


@dataclass(frozen=True)
class MixtureGate:
    """Networks with what they look at and what they weigh."""

    components: tuple[Component, ...]
    names: tuple[str, ...]
    network: Network  # features → logits of the language model and of each component
    search: Search | None = None

    @property
    def needs_lm(self) -> bool:
        """It sees the model's entropy and largest probability."""
        return True

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Softmax over the model and the components that have candidates."""
        logits = self.network(features(view, self.names)).astype(np.float64)
        logits[:, 1:][~available(view, self.components)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: Float[np.ndarray, "q components"] = weights[:, 1:] / weights.sum(
            axis=1, keepdims=True
        )
        return shares

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Where the guessed gain lies above the quantile that saves as many searches."""
        count = len(before.candidates.ids)
        if self.search is None or skip <= 0:
            return np.ones(count, dtype=bool)
        if skip >= 1:
            return np.zeros(count, dtype=bool)
        quantiles = self.search.quantiles
        threshold = np.interp(skip, np.linspace(0, 1, len(quantiles)), quantiles)
        gains = self.search.network(features(before, self.search.names))[:, 0]
        worth: Bool[np.ndarray, " q"] = gains > threshold
        return worth

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Components and names of features as JSON, the networks as arrays."""
        config: dict[str, Any] = {
            "components": [
                [list(one.sources), one.temperature, one.length_power] for one in self.components
            ],
            "features": list(self.names),
        }
        arrays = self.network.arrays("mix")
        if self.search is not None:
            config["search_features"] = list(self.search.names)
            arrays |= self.search.network.arrays("search")
            arrays["quantiles"] = self.search.quantiles
        return config, arrays

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "MixtureGate":
        """The gate that was stored."""
        components = tuple(
            Component(tuple(sources), float(temperature), float(power))
            for sources, temperature, power in config["components"]
        )
        search = None
        if "search_features" in config:
            names = tuple(config["search_features"])
            search = Search(names, Network.of(arrays, "search"), arrays["quantiles"])
        return cls(components, tuple(config["features"]), Network.of(arrays, "mix"), search)


def available(view: View, components: tuple[Component, ...]) -> Bool[np.ndarray, "q components"]:
    """Whether each component has a candidate."""
    has = {
        source: np.isfinite(view.candidates.distances[:, view.candidates.of(source)]).any(axis=1)
        for source in SOURCES
    }
    found = [np.any([has[source] for source in one.sources], axis=0) for one in components]
    stacked: Bool[np.ndarray, "q components"] = np.stack(found, axis=1)
    return stacked
