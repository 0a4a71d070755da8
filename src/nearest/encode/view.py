"""What a method may see of the language model's own prediction."""

from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearest.fast_exp import fast_exp
from nearest.machine import code_can_be_cached


class LmView(NamedTuple):
    """How sure the model is, in nats."""

    entropy: Float[np.ndarray, " q"]
    max_log_prob: Float[np.ndarray, " q"]

    def rows(self, rows: slice | Int[np.ndarray, " r"] | Bool[np.ndarray, " q"]) -> "LmView":
        """Of some predictions."""
        return LmView(self.entropy[rows], self.max_log_prob[rows])


def lm_view(log_probs: Float[Tensor, "q vocab"]) -> LmView:
    """From the model's log-probabilities of every token; a token of probability 0 adds nothing.

    Gradients do not flow through it: to a gate it is an input like any other.
    """
    log_probs = log_probs.detach()
    if log_probs.is_cpu:
        rows = log_probs.float().contiguous().numpy()
        entropy = np.empty(len(rows), dtype=np.float32)
        _entropy(rows, entropy)
        return LmView(entropy, rows.max(axis=1))
    terms = log_probs.exp().mul_(log_probs).nan_to_num_(nan=0.0)  # 0 · log 0
    return LmView(-terms.sum(-1).cpu().numpy(), log_probs.amax(-1).cpu().numpy())


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(
    nogil=True, cache=code_can_be_cached(), error_model="numpy",
    fastmath={"reassoc", "contract", "nsz"},  # sums may be reordered, so that vectors make them
)
def _entropy(log_probs: Any, entropy: Any) -> None:
    for i in range(len(log_probs)):
        total = np.float32(0)
        for j in range(log_probs.shape[1]):
            bounded = max(log_probs[i, j], np.float32(-1e4))  # a number: 0 · log 0 is 0
            total += fast_exp(bounded) * bounded
        entropy[i] = -total
# fmt: on
