"""Summary statistics of the candidates' distribution over tokens, as inputs of gates."""

from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int

from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached

VOTES = ("top probability", "entropy", "log distinct tokens")


def votes(
    weights: Float[np.ndarray, "q c"], values: Int[np.ndarray, "q c"]
) -> Float[np.ndarray, "q 3"]:
    """VOTES of each row's distribution over tokens (entropy in nats); 0 without candidates."""
    found = np.zeros((len(weights), len(VOTES)), dtype=np.float32)

    def work(part: slice) -> None:
        _count(weights[part], values[part], found[part])

    in_threads(work, len(weights))
    return found


def votes_reference(
    weights: Float[np.ndarray, "q c"], values: Int[np.ndarray, "q c"]
) -> Float[np.ndarray, "q 3"]:
    """`votes` in plain Python."""
    found = np.zeros((len(weights), len(VOTES)))
    for row, (own, tokens) in enumerate(zip(weights.tolist(), values.tolist(), strict=True)):
        totals: dict[int, float] = {}
        for weight, token in zip(own, tokens, strict=True):
            if token >= 0 and weight > 0:
                totals[token] = totals.get(token, 0.0) + weight
        if totals:
            probs = np.array(list(totals.values()))
            found[row] = probs.max(), -(probs * np.log(probs)).sum(), np.log1p(len(totals))
    return found


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, cache=code_can_be_cached())
def _count(weights: Any, values: Any, found: Any) -> None:
    size = 1
    while size < 2 * weights.shape[1]:
        size *= 2
    tokens = np.empty(size, dtype=np.int64)  # a hash table; a slot counts in the row it was taken
    totals = np.empty(size, dtype=np.float32)
    row_of = np.full(size, -1, dtype=np.int64)
    taken = np.empty(weights.shape[1], dtype=np.int64)
    for i in range(len(weights)):
        distinct = 0
        for j in range(weights.shape[1]):
            token, weight = values[i, j], weights[i, j]
            if token < 0 or not weight > 0:
                continue
            slot = (token * 2654435761) & (size - 1)
            while row_of[slot] == i and tokens[slot] != token:
                slot = (slot + 1) & (size - 1)
            if row_of[slot] != i:
                row_of[slot], tokens[slot], totals[slot] = i, token, 0
                taken[distinct] = slot
                distinct += 1
            totals[slot] += weight
        top = entropy = np.float32(0)
        for j in range(distinct):
            total = totals[taken[j]]
            top = max(top, total)
            entropy -= total * np.log(total)
        found[i, 0], found[i, 1], found[i, 2] = top, entropy, np.log(1 + distinct)
# fmt: on
