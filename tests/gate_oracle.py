"""Methods with a trained gate, a query at a time: nothing is batched, cached or kept by prefix.

What finds candidates and what a gate says of them is ours and tested elsewhere; how predictions
follow one another, are mixed and are guarded is written out here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from automaton_oracle import Prediction
from nearest import Memory
from nearest.encode.view import lm_view
from nearest.retrieval.gates.gate import View
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.settings import resolve_settings
from plain_kernels import plain_component_weights


@dataclass(frozen=True)
class GateOracle:
    """A method of a memory that has its gate."""

    memory: Memory
    method: str
    given: dict[str, object]

    def predict(
        self, keys: np.ndarray, lm_log_probs: np.ndarray, tokens: list[int], first: int = 0
    ) -> list[Prediction]:
        """Predictions at the positions from `first` on, where nothing is known yet."""
        settings = resolve_settings(self.method, self.memory, **self.given)
        lookup = Lookup.of(self.memory, self.method, settings)
        pointers, gained, found = None, 0.0, []
        for position in range(first, len(keys)):
            lm = lm_log_probs[position]
            query = Queries(
                keys[position][None].astype(np.float32),
                np.array(tokens[: position + 1]),
                np.array([position]),
                lm_view(torch.from_numpy(lm[None].astype(np.float32))),
            )
            candidates = lookup.candidates(query, pointers)
            shares = lookup.gate.shares(View(query, candidates, self.memory))[0]
            weights: list[tuple[int, float]] = []  # of entries
            left, probs = 1.0, np.zeros(len(lm))
            for component, share in zip(lookup.gate.components, shares.tolist(), strict=True):
                columns = candidates.of(*component.kinds)
                of_component = plain_component_weights(
                    candidates.distances[:, columns],
                    candidates.lengths[:, columns],
                    component.temperature,
                    component.length_power,
                )[0]
                ids, values = (
                    array[0, columns].tolist() for array in (candidates.ids, candidates.values)
                )
                for entry, value, weight in zip(ids, values, of_component, strict=True):
                    if weight:
                        probs[value] += share * weight
                        left -= share * weight
                    if weight and entry >= 0:  # the text's own places are none
                        assert value == int(self.memory.values(np.array([entry]))[0])
                        weights.append((entry, share * weight))
            probs += max(0.0, left) * np.exp(lm)  # rounding may exceed 1
            mixed = probs
            if settings.guard:
                trust = 1 / (1 + math.exp(-gained))
                weights = [(entry, trust * weight) for entry, weight in weights]
                mixed = trust * probs + (1 - trust) * np.exp(lm)
            with np.errstate(divide="ignore"):
                log_probs = np.log(mixed)
            found.append(Prediction(log_probs, weights, bool(candidates.searched[0]), True))
            if position + 1 < len(tokens):
                came = tokens[position + 1]
                gained += math.log(probs[came]) - lm[came]
                if lookup.keeps_state:
                    pointers = lookup.follow(candidates, np.array([came]))
        return found
