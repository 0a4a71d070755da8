"""Several memories at once: their predictions, mixed with fixed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearest.errors import SettingError
from nearest.index.suffix import MAX_MATCH
from nearest.memory import Memory
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.present import REACH
from nearest.retrieval.settings import Settings, resolve_settings
from nearest.retrieval.tuned import warn_of_settings
from nearest.store.tuned import SettingsFrom

_ROUNDING = 1e-6  # of weights that are to sum to 1
_LEAST_FIRST: tuple[SettingsFrom, ...] = ("defaults", "self-tuned", "tuned")

Memories = Memory | Sequence[Memory]


def memories_of(memory: Memories | None) -> list[Memory]:
    """One memory, several or none as a list.

    Raises:
        SettingError: something given is no memory.
    """
    if memory is None:
        return []
    several = memory if isinstance(memory, list | tuple) else [memory]
    for one in several:
        if not isinstance(one, Memory):
            raise SettingError(
                f"a memory is needed, and this is a {type(one).__name__}: open it (Memory.open)"
            )
    return list(several)


@dataclass(frozen=True)
class Ensemble:
    """Lookups of one method in several memories: Σ w_m·p_m + (1 − Σ w_m)·p_LM.

    p_m is what the model predicts with memory m alone, by that memory's own settings, gate and
    guard. A memory of weight 0 is not looked up.

    Attributes:
        settings_from: where settings come from that were not given singly: "tuned", "self-tuned" or
            "defaults" (of several memories the least of these), or all were "given".

    Raises:
        SettingError: the weights are not one for each memory, negative, or sum to more than 1.
    """

    lookups: tuple[Lookup, ...]
    weights: tuple[float, ...]
    settings_from: SettingsFrom = "given"

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.lookups):
            raise SettingError(
                f"{len(self.weights)} weights for {len(self.lookups)} memories: give one for each"
            )
        for weight in self.weights:
            if not 0 <= weight < float("inf"):
                raise SettingError(f"a memory's weight must be a number from 0 to 1, got {weight}")
        if sum(self.weights) > 1 + _ROUNDING:
            raise SettingError(
                f"the memories' weights sum to {sum(self.weights):g}: they must not exceed 1 (what "
                "is left is the model's alone)"
            )

    @classmethod
    def of(
        cls,
        memories: Memories,
        method: str,
        weights: Sequence[float] | None = None,
        settings: Settings | None = None,
        **given: Any,
    ) -> "Ensemble":
        """One method in each memory, with settings as given, else as each was tuned.

        Weights are equal ones when not given.

        Raises:
            SettingError: there is no memory, or a setting, weight or gate is missing or wrong.
        """
        memories = memories_of(memories)
        if not memories:
            raise SettingError("there is no memory to look up: give at least one")
        for memory in memories if settings is None else ():
            warn_of_settings(memory, method, [n for n, v in given.items() if v is not None])
        lookups = tuple(
            Lookup.of(memory, method, resolve_settings(method, memory, settings, **given))
            for memory in memories
        )
        equal = (1 / len(lookups),) * len(lookups)
        found = [memory.settings_from(method) for memory in memories]
        return cls(
            lookups,
            equal if weights is None else tuple(weights),
            min(found, key=_LEAST_FIRST.index) if settings is None else "given",
        )

    @classmethod
    def with_settings(
        cls,
        memories: Sequence[Memory],
        method: str,
        weights: Sequence[float],
        settings: Sequence[Settings],
    ) -> "Ensemble":
        """One method in each memory, with settings of its own that are known already."""
        pairs = zip(memories, settings, strict=True)
        return cls(tuple(Lookup.of(one, method, chosen) for one, chosen in pairs), tuple(weights))

    @cached_property
    def used(self) -> list[tuple[Lookup, float]]:
        """The lookups whose weight is above 0, with their weights."""
        pairs = zip(self.lookups, self.weights, strict=True)
        return [(lookup, weight) for lookup, weight in pairs if weight]

    @cached_property
    def needs_lm(self) -> bool:
        """Whether queries must say what the language model predicts."""
        return any(lookup.needs_lm for lookup, _ in self.used)

    @cached_property
    def needs_context(self) -> bool:
        """Whether predictions depend on the tokens before, and not on hidden states alone."""
        return any(lookup.needs_context for lookup, _ in self.used)

    @cached_property
    def reach(self) -> int:
        """How many tokens back a method looks, at most."""
        reads_text = any(lookup.reads_text for lookup, _ in self.used)
        return REACH + 1 if reads_text else MAX_MATCH + 1

    @cached_property
    def keeps_state(self) -> bool:
        """Whether a prediction depends on those before it, and not on its context alone."""
        return any(lookup.keeps_state or lookup.settings.guard for lookup, _ in self.used)

    @cached_property
    def guards(self) -> bool:
        """Whether what was predicted before is weighed."""
        return any(lookup.settings.guard for lookup, _ in self.used)

    def mixed(
        self,
        predicted: Sequence[Float[Tensor, "*shape"]],
        lm_log_probs: Float[Tensor, "*shape"],
    ) -> Float[Tensor, "*shape"]:
        """The mixture of what the model predicts with each of the memories that are used."""
        weights = [weight for _, weight in self.used]
        parts = [
            log_probs if weight == 1 else log_probs + log(weight)
            for log_probs, weight in zip(predicted, weights, strict=True)
        ]
        rest = 1 - sum(weights)
        if rest > _ROUNDING:
            parts.append(lm_log_probs + log(rest))
        return parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)
