"""How many neighbours to trust, by a network (Zheng et al., arXiv:2105.13022).

The paper's K is at most 32. With a larger one the network still looks at 32 neighbours, and weighs
the nearest 64, 128, … K by them.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.errors import SettingError
from nearest.progress import Progress, no_progress
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.fitting import (
    COARSE_TEMPERATURES,
    FLOOR,
    Temperature,
    best_shares,
    mixed_nll,
    observe,
)
from nearest.retrieval.gates.gate import LEFT_TO_LM, Examples, StoredGate, View
from nearest.retrieval.gates.network import Network, check_enough, folds_of, train_network

MOST = 1024
_LOOKED_AT = 32
_HIDDEN = (32,)  # as in the paper
_ROUNDS = 50  # of expectation maximisation, for each temperature


class MetaKGate(StoredGate):
    """A network's softmax over k ∈ {0, 1, 2, 4, … K}; 0 is the language model.

    Its state is the network `mix`, `meta_k_inputs` → logits of the model and of each k.
    """

    class Config(msgspec.Struct, frozen=True):
        """The temperature of every component, and K, a power of two."""

        temperature: Temperature
        most: Annotated[int, msgspec.Meta(gt=0, le=1 << 30)]

    needs_lm = False

    def __init__(self, config: Config, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        if config.most & (config.most - 1):
            raise ValueError(f"a largest k of {config.most}, which is no power of two")
        looked_at = _looked_at(config.most)
        self.mix = Network.of(state, "mix", 2 * looked_at, 1 + config.most.bit_length())

    @property
    def components(self) -> tuple[Component, ...]:
        """The nearest 1, 2, 4, … K."""
        return meta_k_components(self.config.temperature, self.config.most)

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Softmax over all k; 0 without a dense candidate."""
        inputs = meta_k_inputs(view.candidates, _looked_at(self.config.most))
        logits = self.mix(inputs).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = weights[:, 1:] / weights.sum(axis=1, keepdims=True)
        return np.where(view.candidates.has("dense")[:, None], (1 - LEFT_TO_LM) * shares, 0.0)


def fit_meta_k(
    examples: Iterable[Examples],
    most: int = MOST,
    progress: Progress = no_progress,
) -> MetaKGate:
    """Fit the network, and the temperature with which the best constant shares do best.

    Args:
        examples: the text, looked up with every search made.
        most: K, a power of two.
        progress: told how training goes on.

    Raises:
        SettingError: the text is too short, or `most` is no power of two.
    """
    if most < 1 or most & (most - 1):
        raise SettingError(f"most must be a power of two, got {most}: k is 1, 2, 4, … most")
    components = [c for t in COARSE_TEMPERATURES for c in meta_k_components(t, most)]
    data = observe(
        examples, lambda view: meta_k_inputs(view.candidates, _looked_at(most)), components
    )
    check_enough(len(data.inputs))
    choices = [
        np.concatenate([data.lm_probs[:, None], probs], axis=1)
        for probs in np.split(data.probs, len(COARSE_TEMPERATURES), axis=1)
    ]
    shares = [best_shares(probs, _ROUNDS) for probs in choices]
    losses = [mixed_nll(probs, best) for probs, best in zip(choices, shares, strict=True)]
    best = int(np.argmin(losses))
    probs = torch.from_numpy(choices[best])

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        return -(logits.softmax(-1) * probs[rows]).sum(-1).clamp(min=FLOOR).log().mean(-1)

    network = train_network(
        data.inputs,
        loss,
        np.log(np.maximum(shares[best], 1e-4)),
        folds_of(data.documents),
        hidden=_HIDDEN,
        progress=progress,
    )
    config = MetaKGate.Config(COARSE_TEMPERATURES[best], most)
    return MetaKGate(config, network.state_dict(prefix="mix."))


def meta_k_components(temperature: float, most: int) -> tuple[Component, ...]:
    """The nearest 1, 2, 4, … `most` neighbours."""
    return tuple(Component(("dense",), temperature, first=2**i) for i in range(most.bit_length()))


def meta_k_inputs(candidates: Candidates, most: int) -> Float[np.ndarray, "q inputs"]:
    """Distances of the nearest `most`, then the number of distinct values among the first 1 … most.

    Where there are fewer neighbours, the last one's distance stands for those that lack.
    """
    dense = candidates.of("dense")
    columns = slice(dense.start, min(dense.stop, dense.start + most))
    distances, values = candidates.distances[:, columns], candidates.values[:, columns]
    lacking = ((0, 0), (0, most - distances.shape[1]))
    distances = np.pad(distances, lacking, constant_values=np.inf)
    values = np.pad(values, lacking, constant_values=-1)
    farthest = np.where(np.isfinite(distances), distances, -np.inf).max(axis=1, keepdims=True)
    known = np.where(np.isfinite(farthest), farthest, 0)
    distances = np.where(np.isfinite(distances), distances, known)
    return np.concatenate([distances, _distinct(values)], axis=1).astype(np.float32)


def _distinct(values: Int[np.ndarray, "q most"]) -> Int[np.ndarray, "q most"]:
    """Number of distinct values among the first 1, 2, … of each row; −1 is none."""
    same = values[:, :, None] == values[:, None, :]
    earlier = np.tril(np.ones(same.shape[1:], dtype=bool), -1)
    new = ~(same & earlier).any(axis=2) & (values >= 0)
    distinct: Int[np.ndarray, "q most"] = new.cumsum(axis=1)
    return distinct


def _looked_at(most: int) -> int:
    return min(most, _LOOKED_AT)
