"""Doing no harm: an online Bayes mixture of the base model and base with memory.

Each begins a document with a weight of ½ and is then weighed by how well it has predicted the
document so far. The mixture of the two loses at most ln 2 nats a document to the better one,
whatever the text, and nothing about the text need be known before.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_LARGEST = 1e3  # nats; one impossible token must not silence a side for ever after


def gained(
    base_log_probs: Float[Tensor, " n"], mixed_log_probs: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """How much better each token was predicted with the memory (float64, nats)."""
    gain = mixed_log_probs.double() - base_log_probs.double()
    return gain.nan_to_num(0.0, _LARGEST, -_LARGEST).clamp(-_LARGEST, _LARGEST)


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
