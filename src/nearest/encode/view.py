"""What a method may see of the language model's own prediction."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    terms = log_probs.exp().mul_(log_probs).nan_to_num_(nan=0.0)  # 0 · log 0
    return LmView(-terms.sum(-1).cpu().numpy(), log_probs.amax(-1).cpu().numpy())
