"""Neighbours → distribution over the next token → mixture with the language model's.

kNN-LM (Khandelwal et al., 2020, arXiv:1911.00172): p_kNN(w) ∝ Σ 1[value = w]·exp(−d/T) and
p = λ·p_kNN + (1−λ)·p_LM. Pure functions on tensors; everything is summed in float32 or better.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def knn_weights(distances: Float[Tensor, "q k"], temperature: float) -> Float[Tensor, "q k"]:
    """softmax(−distance / temperature) over each query's neighbours.

    A neighbour at distance +inf (id −1) weighs nothing; a query without any neighbour gets zeros.
    """
    nearest = distances.amin(-1, keepdim=True)
    # Large distances lose digits when divided, small differences of them do not.
    weights = torch.softmax((nearest - distances) / temperature, dim=-1)
    return weights.masked_fill_(nearest == torch.inf, 0.0)


def target_probs(
    weights: Float[Tensor, "q k"], values: Int[Tensor, "q k"], targets: Int[Tensor, " q"]
) -> Float[Tensor, " q"]:
    """Probability that the neighbours give to one token each."""
    return (weights * (values == targets[:, None])).sum(-1)


def vocabulary_probs(
    weights: Float[Tensor, "q k"], values: Int[Tensor, "q k"], vocab_size: int
) -> Float[Tensor, "q vocab"]:
    """Probability that the neighbours give to every token; value −1 has no weight."""
    votes = weights.new_zeros(len(values), vocab_size)
    return votes.scatter_add(-1, values.clamp(min=0), weights)


def interpolate(
    lm_log_probs: Float[Tensor, "*shape"],
    memory_probs: Float[Tensor, "*shape"],
    lam: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*shape"]:
    """log(λ·p_memory + (1−λ)·p_LM) in nats, λ in [0, 1]."""
    return torch.logaddexp(lm_log_probs + torch.log1p(-lam), memory_probs.log() + lam.log())


def target_probs_on_grid(
    distances: Float[Tensor, "q k_max"],
    matches: Bool[Tensor, "q k_max"],
    temperatures: Sequence[float],
    ks: Sequence[int],
) -> Float[Tensor, "q temperatures ks"]:
    """`target_probs` at every temperature with only the k nearest, for every k, in one retrieval.

    Args:
        distances: ascending in each row.
        matches: whether the neighbour's value is the target.
        temperatures: at which to weigh them.
        ks: ascending, each at most k_max.
    """
    nearest = distances[:, :1].nan_to_num(posinf=0.0)  # subtracted so that exp never overflows
    bounds = list(zip([0, *ks[:-1]], ks, strict=True))
    probs = []
    for temperature in temperatures:
        weights = torch.exp((nearest - distances) / temperature)
        hits = weights * matches
        total = torch.stack([weights[:, a:b].sum(-1) for a, b in bounds], -1).cumsum(-1)
        matched = torch.stack([hits[:, a:b].sum(-1) for a, b in bounds], -1).cumsum(-1)
        probs.append(torch.where(total > 0, matched / total, 0.0))
    return torch.stack(probs, 1)


def nll_over_lams(
    lm_probs: Float[Tensor, " n"], memory_probs: Float[Tensor, " n"], lams: Float[Tensor, " lams"]
) -> Float[Tensor, " lams"]:
    """Mean negative log-likelihood in nats at each λ; in the dtype of the probabilities."""
    gain = memory_probs - lm_probs
    return torch.stack([-(lm_probs + lam * gain).log().mean() for lam in lams])
