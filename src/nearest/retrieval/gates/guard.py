"""Doing no harm: an online Bayes mixture of the base model and base with memory.

Each begins a document with a weight of ½ and is then weighed by how well it has predicted the
document so far. The mixture of the two loses at most ln 2 nats a document to the better one,
whatever the text, and nothing about the text need be known before.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.machine import code_can_be_cached

_ENOUGH = 50.0  # nats, beyond which the model's own share adds nothing that a float64 holds
_LARGEST = 1e3  # nats; one impossible token must not silence a side for ever after


def gained(
    base_log_probs: Float[Tensor, " n"], mixed_log_probs: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """How much better each token was predicted with the memory (float64, nats)."""
    gain = mixed_log_probs.double() - base_log_probs.double()
    return gain.nan_to_num(0.0, _LARGEST, -_LARGEST).clamp(-_LARGEST, _LARGEST)


def gains_of(
    lm_log_probs: Float[Tensor, " n"],
    memory_probs: Float[np.ndarray, " n"],
    lm_share: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """`gained` of what memory and model give to each token: log(p_memory + λ_LM·p_LM) − log p_LM.

    One kernel, as it is asked for at every token that is written.
    """
    gains = np.empty(len(memory_probs))
    _gains(lm_log_probs.numpy(), memory_probs, lm_share, gains)
    return gains


# fmt: off
@no_type_check  # numba compiles the bare function
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _gains(lm_log_probs: Any, memory_probs: Any, lm_share: Any, gains: Any) -> None:
    for i in range(len(gains)):
        gain = np.log(np.float64(memory_probs[i])) - lm_log_probs[i]  # of the memory alone
        if not gain > _ENOUGH:
            gain = np.log(np.exp(gain) + max(lm_share[i], 0.0))
        gains[i] = 0.0 if np.isnan(gain) else min(max(gain, -_LARGEST), _LARGEST)
# fmt: on


def gained_before(
    gains: Float[Tensor, " n"], documents: Int[np.ndarray, " n"]
) -> Float[Tensor, " n"]:
    """Sum of the gains of a document's earlier tokens.

    Args:
        gains: of documents one after another.
        documents: the number of each token's document.
    """
    sums = gains.cumsum(0) - gains
    first = torch.from_numpy(np.unique(documents, return_index=True)[1])
    lengths = torch.diff(first, append=torch.tensor([len(gains)]))
    return sums - sums[first].repeat_interleave(lengths)


def guarded(
    base_log_probs: Float[Tensor, "*shape"],
    mixed_log_probs: Float[Tensor, "*shape"],
    gained: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*shape"]:
    """log(w·p_mixed + (1−w)·p_base), w the weight that the gain so far has earned."""
    log_weight = torch.nn.functional.logsigmoid(gained).to(base_log_probs.dtype)
    log_rest = torch.nn.functional.logsigmoid(-gained).to(base_log_probs.dtype)
    return torch.logaddexp(mixed_log_probs + log_weight, base_log_probs + log_rest)
