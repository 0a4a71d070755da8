"""What every gate is, and the one that needs no training: a fixed λ.

A gate weighs components, which are distributions made of the candidates, after they are found; some
gates also decide, before the dense search, whether it is made at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from nearest.memory import Memory
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import Component
from nearest.retrieval.queries import Queries

# Of what a trained gate gives the memory: a token that the memory lacks must not become impossible.
LEFT_TO_LM = 1e-3


class View(NamedTuple):
    """What a gate may look at; before a dense search the candidates have none of its entries.

    `memory` is there for gates that look into its corpus.
    """

    queries: Queries
    candidates: Candidates
    memory: Memory | None = None


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
    """Decides which queries are worth a dense search."""

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Whether to search, such that about `skip` of the tuning text's searches are saved."""


@runtime_checkable
class StoredGate(Gate, Protocol):
    """A gate that was trained and is kept in a memory."""

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What describes it as JSON, and its arrays by name."""

    @classmethod
    def restored(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "StoredGate":
        """The gate that `stored` gave; raises KeyError, TypeError or ValueError when it is none."""


@dataclass(frozen=True)
class FixedGate:
    """One component with the same λ at every token."""

    component: Component
    lam: float

    @property
    def components(self) -> tuple[Component, ...]:
        """The one."""
        return (self.component,)

    @property
    def needs_lm(self) -> bool:
        """It looks at nothing."""
        return False

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """λ everywhere."""
        return np.full((len(view.candidates.ids), 1), self.lam)
