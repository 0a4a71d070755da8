"""Our gate: a small network mixes several components from cheap features.

Components are made of dense, pointed and matched candidates, each weighed at several temperatures
and length powers, and of the text's own earlier places; the language model is one more. A second
network estimates, before the dense search, what it would gain.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, no_type_check

import msgspec
import numba
import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from nearest.machine import code_can_be_cached
from nearest.retrieval.candidates import KINDS, MEMORY_KINDS
from nearest.retrieval.distribution import Component, are_found, component_votes
from nearest.retrieval.gates.fitting import Temperature
from nearest.retrieval.gates.gate import (
    LEFT_TO_LM,
    StoredGate,
    View,
    checked_quantiles,
    worth_searching,
)
from nearest.retrieval.gates.network import Network
from nearest.retrieval.votes import VOTES, kind_figures

# One kind's candidates, or neighbouring ones' together, in some ways of weighing them:
# (multiple of the distances' unit as temperature, length power). The sharpest of each is about as
# sharp as kNN-LM's temperature is for a strong model: without it a gate is worse than a fixed λ.
_GROUPS: Mapping[tuple[str, ...], Sequence[tuple[float, float]]] = {
    ("dense",): ((0.15, 0.0), (0.3, 0.0), (1.2, 5.0)),
    ("dense", "pointers"): ((0.15, 0.0), (0.3, 0.0), (0.6, 2.0), (1.2, 5.0)),
    ("suffix",): ((0.15, 0.0), (0.6, 0.0), (1.2, 4.0), (2.4, 6.0), (1e4, 8.0)),
    MEMORY_KINDS: ((0.15, 0.0), (1.2, 5.0), (2.4, 6.0)),
    ("text",): ((1.0, 2.0), (1.2, 4.0), (1.0, 8.0)),  # at distances of 0
}
_FREE = ("suffix", "text")  # known before a search, and whatever was searched before
_VOTED = 1.2  # the gate looks at the votes of components with this multiple, but not of all kinds'
_OF_LM, _OF_KIND = 2, 3  # features

_Kind = Literal["dense", "pointers", "suffix", "text"]


class MixtureConfig(msgspec.Struct, frozen=True, rename={"kinds": "sources"}):
    """What a mixture looks at and weighs.

    Attributes:
        kinds: of candidates, in the order of KINDS.
        components: that are weighed: kinds, temperature, length power.
        voted: the numbers of those whose votes it looks at.
        unit: by which it divides distances, so that they mean the same in other memories and with
            other models.
    """

    kinds: tuple[_Kind, ...]
    components: tuple[
        tuple[tuple[_Kind, ...], Temperature, Annotated[float, msgspec.Meta(ge=0, le=1e6)]], ...
    ]
    voted: tuple[int, ...]
    unit: Temperature = 1.0

    def __post_init__(self) -> None:
        for kinds, _, _ in self.components:
            if kinds not in _GROUPS or not set(kinds) <= set(self.kinds):
                raise ValueError(f"a component of {kinds}, where kinds are {self.kinds}")
        if not self.components or list(self.kinds) != [s for s in KINDS if s in self.kinds]:
            raise ValueError(f"{len(self.components)} components of kinds {self.kinds}")
        if not all(0 <= number < len(self.components) for number in self.voted):
            raise ValueError(f"votes of components {self.voted} of {len(self.components)}")

    @classmethod
    def over(cls, kinds: Sequence[str], unit: float) -> "MixtureConfig":
        """That of a mixture over some kinds.

        `unit`: how much farther an ordinary candidate is than the nearest, on average.
        """
        components = [
            (group, multiple * unit, power)
            for group, ways in _GROUPS.items()
            if set(group) <= set(kinds)
            for multiple, power in ways
        ]
        voted = [
            number
            for number, (group, temperature, _) in enumerate(components)
            if temperature == _VOTED * unit and group != MEMORY_KINDS
        ]
        return cls(tuple(kinds), tuple(components), tuple(voted), unit)  # type: ignore[arg-type]

    def alike(self, other: "MixtureConfig") -> bool:
        """Whether both look at and weigh the same, but for the unit of distances."""
        return MixtureConfig.over(self.kinds, 1.0) == MixtureConfig.over(other.kinds, 1.0) and all(
            MixtureConfig.over(one.kinds, one.unit) == one for one in (self, other)
        )

    @property
    def weighed(self) -> tuple[Component, ...]:
        """The components as such."""
        return tuple(Component(*component) for component in self.components)

    def features(self, view: View) -> Float[np.ndarray, "q features"]:
        """Inputs of the mixing network."""
        return self.inputs.of(view)

    def features_before(self, view: View) -> Float[np.ndarray, "q features"]:
        """Inputs of the search network: nothing that depends on earlier searches."""
        return self.inputs_before.of(view)

    @property
    def inputs(self) -> "_Inputs":
        """What the mixing network looks at."""
        return _Inputs(self.kinds, self._voted, self.unit)

    @property
    def inputs_before(self) -> "_Inputs":
        """What the search network looks at."""
        return _Inputs(self._free_kinds, self._free_voted, self.unit)

    @property
    def sizes(self) -> tuple[int, int]:
        """How many features there are, and how many before the search."""
        return self.inputs.size, self.inputs_before.size

    @property
    def _free_kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.kinds if kind in _FREE)

    @property
    def _voted(self) -> tuple[Component, ...]:
        return tuple(Component(*self.components[number]) for number in self.voted)

    @property
    def _free_voted(self) -> tuple[Component, ...]:
        return tuple(one for one in self._voted if set(one.kinds) <= set(_FREE))


class _Inputs(NamedTuple):
    """What a network looks at: kinds of candidates, votes of components, distances in units."""

    kinds: tuple[str, ...]
    voted: tuple[Component, ...]
    unit: float

    @property
    def size(self) -> int:
        """How many features there are."""
        return _OF_LM + _OF_KIND * len(self.kinds) + len(VOTES) * len(self.voted)

    def of(self, view: View) -> Float[np.ndarray, "q features"]:
        """Figures of the model, of each kind, and of the votes of some components, float32.

        The model's entropy and largest log-probability; of each kind the log of the number of its
        candidates, of the nearest's distance in units and of the longest match (logs of 1 + x, 0
        where it has nothing); of each voted component as in `votes.VOTES`.
        """
        lm = view.queries.lm
        if lm is None:
            raise ValueError("this gate needs the language model's view of the queries")
        figures = kind_figures(view.candidates, self.kinds)
        counted = component_votes(view.candidates, self.voted)
        features = np.empty((len(figures), self.size), dtype=np.float32)
        _put_together(lm.entropy, lm.max_log_prob, figures, counted, self.unit, features)
        return features


class MixtureGate(StoredGate):
    """Mixes the language model and several components.

    Its state: the network `mix`, features → logits of the language model and of each component;
    and, for a method that asks whether to search, the network `search`, features before the search
    → what it gains in nats, with the `quantiles` of this on the tuning text.
    """

    Config = MixtureConfig
    needs_lm = True
    quantiles: Tensor

    def __init__(self, config: MixtureConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        self._components = config.weighed
        self._inputs, self._inputs_before = config.inputs, config.inputs_before
        inputs, before = config.sizes
        self.mix = Network.of(state, "mix", inputs, 1 + len(config.components))
        self.search = None
        if "quantiles" in state:
            self.search = Network.of(state, "search", before, 1)
            self.register_buffer("quantiles", checked_quantiles(state["quantiles"]))

    @property
    def components(self) -> tuple[Component, ...]:
        return self._components

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Softmax over the model and the components that have candidates, a rest for the model."""
        logits, found = self.mix(self._inputs.of(view)), are_found(view.candidates, self.components)
        shares = np.empty(found.shape)
        _softmax(logits, found, shares)
        return np.multiply(shares, 1 - LEFT_TO_LM, out=shares)

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Where the estimated gain reaches the quantile that saves as many searches."""
        search = self.search
        if search is None:
            return np.ones(len(before.candidates.ids), dtype=bool)
        return worth_searching(
            before,
            lambda view: search(self._inputs_before.of(view))[:, 0],
            self.quantiles,
            skip,
        )


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _put_together(
    entropy: Any, max_log_prob: Any, figures: Any, counted: Any, unit: Any, features: Any
) -> None:
    for i in range(len(features)):
        features[i, 0], features[i, 1] = entropy[i], max_log_prob[i]
        at = 2
        for kind in range(figures.shape[1]):
            for j in range(figures.shape[2]):
                one = figures[i, kind, j]
                if j == 1:
                    one = np.float32(one / np.float32(unit))
                # An inner product, negated as a distance, may be below 0.
                log = np.log1p(abs(one))
                features[i, at] = log if one >= 0 else -log
                at += 1
        for component in range(counted.shape[1]):
            for j in range(counted.shape[2]):
                features[i, at] = counted[i, component, j]
                at += 1


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _softmax(logits: Any, found: Any, shares: Any) -> None:
    """Of the model, which comes first, and the components that are found; of these their parts."""
    for i in range(len(shares)):
        most = np.float64(logits[i, 0])
        for j in range(shares.shape[1]):
            if found[i, j]:
                most = max(most, np.float64(logits[i, 1 + j]))
        total = np.exp(np.float64(logits[i, 0]) - most)
        for j in range(shares.shape[1]):
            shares[i, j] = np.exp(np.float64(logits[i, 1 + j]) - most) if found[i, j] else 0.0
            total += shares[i, j]
        for j in range(shares.shape[1]):
            shares[i, j] /= total
# fmt: on
