"""Our gate: a small network mixes several components from cheap features.

Components are made of dense, pointed and matched candidates, each weighed at several temperatures
and length powers; the language model is one more. A second network guesses, before the dense
search, what it would gain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from nearest.retrieval.candidates import KINDS
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.features import features
from nearest.retrieval.gates.gate import LEFT_TO_LM, View
from nearest.retrieval.gates.network import Network
from nearest.retrieval.gates.quantiles import worth_searching

# One kind's candidates, or neighbouring ones' together, in some ways of weighing them:
# (multiple of the distances' unit as temperature, length power).
_GROUPS: Mapping[tuple[str, ...], Sequence[tuple[float, float]]] = {
    ("dense",): ((0.3, 0.0), (1.2, 5.0)),
    ("dense", "pointers"): ((0.3, 0.0), (0.6, 2.0), (1.2, 5.0)),
    ("suffix",): ((0.6, 0.0), (1.2, 4.0), (2.4, 6.0), (1e4, 8.0)),
    ("dense", "pointers", "suffix"): ((1.2, 5.0), (2.4, 6.0)),
}
_VOTED = 1.2  # the gate looks at the votes of components with this multiple, but the last group's


def components_for(kinds: Sequence[str], unit: float) -> tuple[Component, ...]:
    """The components that a mixture over these kinds weighs.

    `unit`: how much farther an ordinary candidate is than the nearest, on average.
    """
    return tuple(
        Component(group, multiple * unit, power)
        for group, ways in _GROUPS.items()
        if set(group) <= set(kinds)
        for multiple, power in ways
    )


def voted_among(components: Sequence[Component], unit: float) -> tuple[int, ...]:
    """The numbers of the components whose votes tell most of what the memory knows."""
    return tuple(
        number
        for number, one in enumerate(components)
        if one.temperature == _VOTED * unit and len(one.kinds) < len(KINDS)
    )


@dataclass(frozen=True)
class SearchGuess:
    """Guesses what a dense search gains, in nats, and where the guesses lay on the tuning text."""

    network: Network
    quantiles: Float[np.ndarray, " quantiles"]  # at even steps from 0 to 1


@dataclass(frozen=True)
class MixtureGate:
    """Networks with what they look at and what they weigh.

    Attributes:
        kinds: of the method it was trained for.
        components: that are weighed.
        voted: the numbers of those whose votes it looks at.
        mix: features → logits of the language model and of each component.
        search: None for a method that does not ask whether to search.
    """

    kinds: tuple[str, ...]
    components: tuple[Component, ...]
    voted: tuple[int, ...]
    mix: Network
    search: SearchGuess | None = None

    @property
    def needs_lm(self) -> bool:
        """It sees the model's entropy and largest probability."""
        return True

    def features(self, view: View) -> Float[np.ndarray, "q features"]:
        """What the mixing network looks at."""
        return features(view, self.kinds, [self.components[i] for i in self.voted])

    def features_before(self, view: View) -> Float[np.ndarray, "q features"]:
        """What the searching network looks at: nothing that depends on earlier searches."""
        free = [kind for kind in self.kinds if kind == "suffix"]
        voted = [self.components[i] for i in self.voted]
        return features(view, free, [one for one in voted if set(one.kinds) <= set(free)])

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Softmax over the model and the components that have candidates, a rest for the model."""
        logits = self.mix(self.features(view)).astype(np.float64)
        logits[:, 1:][~available(view, self.components)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        shares: Float[np.ndarray, "q components"] = (1 - LEFT_TO_LM) * weights[:, 1:]
        return shares

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Where the guessed gain reaches the quantile that saves as many searches."""
        if self.search is None:
            return np.ones(len(before.candidates.ids), dtype=bool)
        network = self.search.network
        return worth_searching(
            before,
            lambda view: network(self.features_before(view))[:, 0],
            self.search.quantiles,
            skip,
        )

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Components and kinds as JSON, the networks as arrays."""
        config: dict[str, Any] = {
            "sources": list(self.kinds),
            "components": [
                [list(one.kinds), one.temperature, one.length_power] for one in self.components
            ],
            "voted": list(self.voted),
        }
        arrays = self.mix.arrays("mix")
        if self.search is not None:
            arrays |= self.search.network.arrays("search")
            arrays["quantiles"] = self.search.quantiles
        return config, arrays

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "MixtureGate":
        """The gate that was stored."""
        components = tuple(
            Component(tuple(kinds), float(temperature), float(power))
            for kinds, temperature, power in config["components"]
        )
        search = None
        if "quantiles" in arrays:
            search = SearchGuess(Network.of(arrays, "search"), arrays["quantiles"])
        gate = cls(
            tuple(config["sources"]),
            components,
            tuple(int(number) for number in config["voted"]),
            Network.of(arrays, "mix"),
            search,
        )
        if gate.mix.outputs != len(components) + 1:
            raise ValueError("the network's outputs are not the components")
        return gate


def available(view: View, components: Sequence[Component]) -> Bool[np.ndarray, "q components"]:
    """Whether each component has a candidate."""
    has = {kind: view.candidates.has(kind) for kind in KINDS}
    found = [np.any([has[kind] for kind in one.kinds], axis=0) for one in components]
    stacked: Bool[np.ndarray, "q components"] = np.stack(found, axis=1)
    return stacked
