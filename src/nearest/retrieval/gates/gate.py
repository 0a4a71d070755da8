"""What a gate is, what it sees, and the gate that needs no training: a fixed λ.

A gate weighs components, which are distributions made of the candidates, after these are found;
some gates also decide, before the dense search, whether it is made at all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearest.memory import Memory
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import Component
from nearest.retrieval.queries import Queries

# Fraction of every trained gate's memory weight that is handed back to the language model, so that
# a token that the memory lacks never gets probability 0.
LEFT_TO_LM = 1e-3
_STEPS = 100  # of quantiles, from 0 to 1


class View(NamedTuple):
    """A gate's input; before a dense search the candidates hold none of its entries.

    `memory` is there for gates that look into its corpus.
    """

    queries: Queries
    candidates: Candidates
    memory: Memory | None = None


class Examples(NamedTuple):
    """What gates are trained on: n predictions of a text, and the tokens that came.

    `rows` numbers them in the text; the same text looked up in another way has the same numbers.
    """

    rows: Int[np.ndarray, " n"]
    view: View
    targets: Int[np.ndarray, " n"]
    lm_log_probs: Float[np.ndarray, " n"]  # of the targets, in nats
    documents: Int[np.ndarray, " n"]


@runtime_checkable
class Gate(Protocol):
    """Weighs components; what they leave of 1 is the language model's."""

    @property
    def components(self) -> tuple[Component, ...]:
        """The distributions that are weighed."""

    @property
    def needs_lm(self) -> bool:
        """Whether the queries must say what the language model predicts (`Queries.lm`)."""

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """λ of each component; those without candidates must get none."""


@runtime_checkable
class SearchGate(Protocol):
    """Decides which queries are worth a dense search.

    It goes by the query, the model's view of it and suffix matches, never by pointers, which are
    known only when the token before has come: so searches of many positions are made together.
    """

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Whether to search, such that about `skip` of the tuning text's searches are saved."""


class StoredGate(nn.Module, ABC):
    """A trained gate, which a memory keeps: tensors and a checked configuration.

    The constructor of each kind takes both, and raises KeyError or ValueError where they do not
    make a gate.
    """

    Config: ClassVar[type[msgspec.Struct]]
    config: Any  # a `Config`
    needs_lm: bool

    def __init__(self, config: Any, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def components(self) -> tuple[Component, ...]: ...

    @abstractmethod
    def shares(self, view: View) -> Float[np.ndarray, "q components"]: ...


@dataclass(frozen=True)
class FixedGate:
    """One component with the same λ at every token."""

    component: Component
    lam: float

    @property
    def components(self) -> tuple[Component, ...]:
        return (self.component,)

    @property
    def needs_lm(self) -> bool:
        return False

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        return np.full((len(view.candidates.ids), 1), self.lam, dtype=np.float64)


def quantiles_of(figures: Float[np.ndarray, " n"]) -> Float[Tensor, " quantiles"]:
    """Quantiles of a text's figures at even steps from 0 to 1 (float32)."""
    quantiles = np.quantile(figures, np.linspace(0, 1, _STEPS + 1))
    return torch.from_numpy(quantiles.astype(np.float32))


def checked_quantiles(quantiles: Tensor) -> Float[Tensor, " quantiles"]:
    """Check that `quantiles_of` can have made these quantiles (ValueError)."""
    known = quantiles.shape == (_STEPS + 1,) and quantiles.dtype == torch.float32
    if not known or not quantiles.isfinite().all() or not (quantiles.diff() >= 0).all():
        raise ValueError(f"quantiles must be {_STEPS + 1} finite float32 that do not fall")
    return quantiles


def reaching(
    figures: Float[np.ndarray, " q"], quantiles: Float[Tensor, " quantiles"], skip: float
) -> Bool[np.ndarray, " q"]:
    """Which figures reach the quantile `skip` of the tuning text; equal ones reach it together."""
    threshold = np.interp(skip, np.linspace(0, 1, len(quantiles)), quantiles.numpy())
    reached: Bool[np.ndarray, " q"] = figures >= threshold
    return reached


def worth_searching(
    view: View,
    figures: Callable[[View], Float[np.ndarray, " q"]],
    quantiles: Float[Tensor, " quantiles"],
    skip: float,
) -> Bool[np.ndarray, " q"]:
    """Which queries' figures reach the quantile `skip`; at 0 all, at 1 none."""
    if skip <= 0 or skip >= 1:  # then nothing need be computed
        return np.full(len(view.candidates.ids), skip <= 0)
    return reaching(figures(view), quantiles, skip)
