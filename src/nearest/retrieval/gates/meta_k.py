"""How many neighbours to trust, by a network (Zheng et al., arXiv:2105.13022).

The paper's K is at most 32. With a larger one the network still looks at 32 neighbours, and weighs
the nearest 64, 128, … K by them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.errors import SettingError
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.fitting import (
    FLOOR,
    TEMPERATURES,
    best_shares,
    mixed_nll,
    observe,
    temperature_of,
)
from nearest.retrieval.gates.gate import LEFT_TO_LM, View
from nearest.retrieval.gates.network import Network
from nearest.retrieval.gates.seen import Seen
from nearest.retrieval.gates.training import check_enough, held_out_documents, train_network

MOST = 1024
_LOOKED_AT = 32
_HIDDEN = 32  # as in the paper


@dataclass(frozen=True)
class MetaKGate:
    """A network's softmax over k ∈ {0, 1, 2, 4, … K}; 0 is the language model.

    Attributes:
        temperature: of every component.
        most: K.
        network: `meta_k_inputs` → logits of the model and of each k.
    """

    temperature: float
    most: int
    network: Network

    @property
    def components(self) -> tuple[Component, ...]:
        """The nearest 1, 2, 4, … K."""
        return meta_k_components(self.temperature, self.most)

    @property
    def needs_lm(self) -> bool:
        """It sees neighbours alone."""
        return False

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Softmax over all k; 0 without a dense candidate."""
        logits = self.network(meta_k_inputs(view.candidates, _looked_at(self.most))).astype(
            np.float64
        )
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = weights[:, 1:] / weights.sum(axis=1, keepdims=True)
        return np.where(view.candidates.has("dense")[:, None], (1 - LEFT_TO_LM) * shares, 0.0)

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Temperature and K as JSON, the network as arrays."""
        return {"temperature": self.temperature, "most": self.most}, self.network.arrays("mix")

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "MetaKGate":
        """The gate that was stored."""
        most = int(config["most"])
        network = Network.of(arrays, "mix")
        network.check(2 * _looked_at(most), 1 + most.bit_length())
        return cls(temperature_of(config), most, network)


def fit_meta_k(
    seen: Iterable[Seen],
    most: int = MOST,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> MetaKGate:
    """Fit the network, and the temperature with which the best constant shares do best.

    Args:
        seen: the text, searched.
        most: K, a power of two.
        temperatures: that are tried.
        seed: of training.

    Raises:
        SettingError: the text is too short, or `most` is no power of two.
    """
    if most < 1 or most & (most - 1):
        raise SettingError(f"most must be a power of two, got {most}: k is 1, 2, 4, … most")
    components = [c for t in temperatures for c in meta_k_components(t, most)]
    data = observe(seen, lambda view: meta_k_inputs(view.candidates, _looked_at(most)), components)
    check_enough(len(data.inputs))
    choices = [
        np.concatenate([data.lm_probs[:, None], probs], axis=1)
        for probs in np.split(data.probs, len(temperatures), axis=1)
    ]
    shares = [best_shares(probs) for probs in choices]
    losses = [mixed_nll(probs, best) for probs, best in zip(choices, shares, strict=True)]
    best = int(np.argmin(losses))
    probs = torch.from_numpy(choices[best])

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        return -(logits.softmax(-1) * probs[rows]).sum(-1).clamp(min=FLOOR).log().mean()

    network = train_network(
        data.inputs,
        loss,
        len(shares[best]),
        hidden=_HIDDEN,
        layers=1,
        seed=seed,
        start=np.log(np.maximum(shares[best], 1e-4)),
        held_out=held_out_documents(data.documents, seed=seed),
    )
    return MetaKGate(temperatures[best], most, network)


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
