"""Candidates → distribution over the next token → mixture with the language model's.

kNN-LM (Khandelwal et al., 2020, arXiv:1911.00172) weighs a candidate by exp(−d/T). Here it is
(1 + m)^b · exp(−d/T): m is the number of tokens of left context that candidate and query share, and
b = 0 gives kNN-LM and RetoMaton. An entry into which others were merged counts as often as they and
it were (arXiv:2109.04212). p = Σ λ_c·p_c + (1 − Σ λ_c)·p_LM over components c. Pure functions
of arrays; sums are made in float32 or better.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearest.errors import ModelError
from nearest.fast_exp import fast_exp
from nearest.index.neighbours import NO_ENTRY
from nearest.index.suffix import MAX_MATCH
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached
from nearest.retrieval.candidates import Candidates, columns_of
from nearest.retrieval.votes import VOTES, count_row, new_table

# Sums may be reordered, so that they are made of vectors; infinities and NaN stay what they are.
_FAST = {"reassoc", "contract", "nsz"}
_LOG_LENGTHS = np.log1p(np.arange(MAX_MATCH + 1, dtype=np.float32))


class Component(NamedTuple):
    """How candidates of some kinds are weighed into one distribution."""

    kinds: tuple[str, ...]  # that stand side by side in KINDS
    temperature: float
    length_power: float = 0.0
    first: int | None = None  # only so many columns: of a dense search, the nearest


def component_probs(
    candidates: Candidates, components: Sequence[Component], tokens: Int[np.ndarray, " q"]
) -> Float[np.ndarray, "q components"]:
    """Probability (float64) of one token per query under each component; 0 if it is empty."""
    probs = np.zeros((len(tokens), len(components)))
    ways = _ways(tuple(components), candidates.columns)

    def work(part: slice) -> None:
        _token_probs(*_rows(candidates, part), candidates.values[part], tokens[part], *ways,
                     probs[part])  # fmt: skip

    in_threads(work, len(tokens))
    return probs


class Weights(NamedTuple):
    """What each candidate adds to the probability of its value, and what is left to the model."""

    candidates: Float[np.ndarray, "q c"]  # float32
    lm: Float[np.ndarray, " q"]  # float64


def candidate_weights(
    candidates: Candidates,
    components: Sequence[Component],
    shares: Float[np.ndarray, "q components"],
) -> Weights:
    """Weigh candidates such that each component's sum to its share λ in every row.

    A component without candidates leaves its share to the language model.
    """
    weights = np.zeros(candidates.ids.shape, dtype=np.float32)
    lm = np.ones(len(weights))
    ways = _ways(tuple(components), candidates.columns)

    def work(part: slice) -> None:
        _add_weights(*_rows(candidates, part), *ways, shares[part], weights[part], lm[part])

    in_threads(work, len(weights))
    return Weights(weights, lm)


def component_votes(
    candidates: Candidates, components: Sequence[Component]
) -> Float[np.ndarray, "q components 3"]:
    """VOTES of each component's distribution over tokens; 0 where it has no candidate."""
    found = np.zeros((len(candidates.ids), len(components), len(VOTES)), dtype=np.float32)
    ways = _ways(tuple(components), candidates.columns)

    def work(part: slice) -> None:
        _count_votes(*_rows(candidates, part), candidates.values[part], *ways, found[part])

    in_threads(work, len(found))
    return found


def are_found(
    candidates: Candidates, components: Sequence[Component]
) -> Bool[np.ndarray, "q components"]:
    """Whether each component has a candidate."""
    found = np.zeros((len(candidates.ids), len(components)), dtype=bool)
    ways = _ways(tuple(components), candidates.columns)
    _find(candidates.distances, ways.begins, ways.stops, found)
    return found


def token_probs(
    weights: Weights, candidates: Candidates, tokens: Int[np.ndarray, " q"]
) -> Float[np.ndarray, " q"]:
    """Total probability that the candidates give to one token per query."""
    right = weights.candidates * (candidates.values == tokens[:, None])
    probs: Float[np.ndarray, " q"] = right.sum(axis=1)
    return probs


def mixed_log_probs(
    lm_log_probs: Float[Tensor, "*shape"],
    memory_probs: Float[Tensor, "*shape"],
    lm_share: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*shape"]:
    """log(p_memory + λ_LM·p_LM) in nats; the memory's shares are in p_memory already."""
    return torch.logaddexp(_shared(lm_log_probs, lm_share), memory_probs.log())


def vocabulary_log_probs(
    lm_log_probs: Float[Tensor, "q vocab"],
    weights: Weights,
    values: Int[np.ndarray, "q c"],
) -> Float[Tensor, "q vocab"]:
    """`mixed_log_probs` of every token, with the weights of candidates summed by value.

    Value −1 has no weight. Only tokens with candidates are mixed: of a large vocabulary few. On
    CPUs, where no gradient is asked for, a kernel takes the place of a dozen calls, whose own costs
    are what counts when a text is written token by token.

    Raises:
        ModelError: a candidate stands for a token that the model does not have.
    """
    if not lm_log_probs.is_cpu or lm_log_probs.requires_grad:
        _refuse_unknown(values, lm_log_probs.shape[-1])
        return vocabulary_log_probs_in_torch(lm_log_probs, weights, values)
    log_probs = lm_log_probs.float().contiguous().numpy()
    mixed = np.empty_like(log_probs)

    def work(part: slice) -> None:
        _mix(log_probs[part], weights.candidates[part], values[part], weights.lm[part], mixed[part])

    try:
        in_threads(work, len(values))
    except IndexError:
        _refuse_unknown(values, lm_log_probs.shape[-1])
        raise
    return torch.from_numpy(mixed)


def _refuse_unknown(values: Int[np.ndarray, "q c"], vocabulary: int) -> None:
    largest = values.max(initial=NO_ENTRY)
    if largest >= vocabulary:
        raise ModelError(
            f"the memory holds token {largest} and the model predicts {vocabulary:,}: it is not "
            "the model that built the memory, or the memory is damaged (`nearest verify`)"
        )


def vocabulary_log_probs_in_torch(
    lm_log_probs: Float[Tensor, "q vocab"],
    weights: Weights,
    values: Int[np.ndarray, "q c"],
) -> Float[Tensor, "q vocab"]:
    """`vocabulary_log_probs` in torch: on any device, and differentiable."""
    device = lm_log_probs.device
    tokens = torch.from_numpy(values).to(device).clamp(min=0)
    shared = _shared(lm_log_probs, torch.from_numpy(weights.lm)[:, None].to(device))
    summed = torch.from_numpy(weights.candidates).to(device)
    votes = torch.zeros_like(shared).scatter_add(-1, tokens, summed)
    mixed = torch.logaddexp(shared.gather(-1, tokens), votes.gather(-1, tokens).log())
    return shared.scatter(-1, tokens, mixed)


def _shared(
    lm_log_probs: Float[Tensor, "*shape"], lm_share: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """log(λ_LM·p_LM); a sum of the others' shares may exceed 1 by ulps."""
    return lm_log_probs + lm_share.to(lm_log_probs.dtype).clamp(min=0).log()


class _Ways(NamedTuple):
    """Ways to weigh candidates, one an element: of which columns, and how."""

    begins: Int[np.ndarray, " n"]
    stops: Int[np.ndarray, " n"]
    per_distance: Float[np.ndarray, " n"]  # float32, as are powers
    powers: Float[np.ndarray, " n"]


@lru_cache(maxsize=256)
def _ways(components: tuple[Component, ...], columns: tuple[int, ...]) -> _Ways:
    """The components as arrays, for candidates of these columns."""
    spans = []
    for component in components:
        own = columns_of(columns, *component.kinds)
        stop = own.stop if component.first is None else min(own.stop, own.start + component.first)
        spans.append((own.start, stop))
    begins, stops = np.array(spans, dtype=np.int64).reshape(-1, 2).T.copy()
    temperatures = np.array([component.temperature for component in components])
    powers = np.array([component.length_power for component in components], dtype=np.float32)
    return _Ways(begins, stops, (1 / temperatures).astype(np.float32), powers)


def _rows(
    candidates: Candidates, part: slice
) -> tuple[
    Float[np.ndarray, "q c"], Int[np.ndarray, "q c"], Float[np.ndarray, "q c"] | None
]:  # fmt: skip
    """What weights of candidates depend on."""
    counts = candidates.log_counts
    return (
        candidates.distances[part],
        candidates.lengths[part],
        None if counts is None else counts[part],
    )


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy", fastmath=_FAST)
def _weigh(
    distances: Any, lengths: Any, log_counts: Any, i: Any, begin: Any, per_distance: Any,
    length_power: Any, weights: Any,
) -> Any:
    """Fill in weights of row i from column `begin` on, the largest 1; returns their sum.

    The sum is 0 without candidates.
    """
    size = len(weights)
    nearest = np.float32(np.inf)
    for j in range(size):
        nearest = min(nearest, distances[i, begin + j])
    if nearest == np.inf:
        return np.float32(0)
    # Large distances lose digits when divided, small differences of them do not.
    for j in range(size):
        weights[j] = (nearest - distances[i, begin + j]) * per_distance
    if length_power > 0:
        for j in range(size):
            weights[j] += length_power * _LOG_LENGTHS[lengths[i, begin + j]]
    if log_counts is not None:
        for j in range(size):
            weights[j] += log_counts[i, begin + j]
    best = -np.float32(np.inf)
    for j in range(size):
        best = max(best, weights[j])
    total = np.float32(0)
    for j in range(size):
        weight = fast_exp(weights[j] - best)
        weights[j] = weight
        total += weight
    return total


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _find(distances: Any, begins: Any, stops: Any, found: Any) -> None:
    for i in range(len(distances)):
        for n in range(len(begins)):
            for j in range(begins[n], stops[n]):
                if distances[i, j] < np.inf:
                    found[i, n] = True
                    break


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _token_probs(
    distances: Any, lengths: Any, log_counts: Any, values: Any, tokens: Any,
    begins: Any, stops: Any, per_distance: Any, powers: Any, probs: Any,
) -> None:
    row = np.empty(distances.shape[1], dtype=np.float32)
    for i in range(len(tokens)):
        for n in range(len(begins)):
            begin, weights = begins[n], row[:stops[n] - begins[n]]
            total = _weigh(
                distances, lengths, log_counts, i, begin, per_distance[n], powers[n], weights
            )
            if total > 0:
                right = np.float32(0)
                for j in range(len(weights)):
                    if values[i, begin + j] == tokens[i]:
                        right += weights[j]
                probs[i, n] = right / total


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _add_weights(
    distances: Any, lengths: Any, log_counts: Any,
    begins: Any, stops: Any, per_distance: Any, powers: Any, shares: Any, weights: Any, lm: Any,
) -> None:
    row = np.empty(distances.shape[1], dtype=np.float32)
    for i in range(len(distances)):
        for n in range(len(begins)):
            share = shares[i, n]
            if share == 0:
                continue
            begin, own = begins[n], row[:stops[n] - begins[n]]
            total = _weigh(
                distances, lengths, log_counts, i, begin, per_distance[n], powers[n], own
            )
            if total > 0:
                lm[i] -= share
                for j in range(len(own)):
                    weights[i, begin + j] += own[j] * (share / total)


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _count_votes(
    distances: Any, lengths: Any, log_counts: Any, values: Any,
    begins: Any, stops: Any, per_distance: Any, powers: Any, found: Any,
) -> None:
    row = np.empty(distances.shape[1], dtype=np.float32)
    for n in range(len(begins)):
        begin, own = begins[n], row[:stops[n] - begins[n]]
        table = new_table(len(own))
        for i in range(len(distances)):
            total = _weigh(
                distances, lengths, log_counts, i, begin, per_distance[n], powers[n], own
            )
            if total > 0:
                for j in range(len(own)):
                    own[j] /= total
                count_row(i, own, values[i, begin:stops[n]], table, found[i, n])


@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached(), error_model="numpy")
def _mix(log_probs: Any, weights: Any, values: Any, lm: Any, mixed: Any) -> None:
    votes = np.zeros(log_probs.shape[1], dtype=np.float32)
    for i in range(len(log_probs)):
        log_share = np.float32(np.log(max(lm[i], 0.0)))
        for token in range(len(votes)):
            mixed[i, token] = log_probs[i, token] + log_share
        for j in range(weights.shape[1]):
            if values[i, j] >= len(votes):
                raise IndexError
            if values[i, j] >= 0:
                votes[values[i, j]] += weights[i, j]
        for j in range(weights.shape[1]):
            token = values[i, j]
            if token >= 0 and votes[token] != 0:
                more, less = np.log(votes[token]), mixed[i, token]
                if not more > less:  # NaN stays NaN
                    more, less = less, more
                mixed[i, token] = more + np.log1p(np.exp(less - more))
                votes[token] = 0  # seen: the value may come again
# fmt: on
