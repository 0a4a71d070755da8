"""Fit the mixture gate on held-out text."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearest.errors import SettingError
from nearest.progress import Progress, no_progress
from nearest.retrieval.candidates import MEMORY_KINDS
from nearest.retrieval.distribution import Component, are_found, component_probs
from nearest.retrieval.gates.fitting import FLOOR, best_shares
from nearest.retrieval.gates.gate import LEFT_TO_LM, Examples, View, quantiles_of, reaching
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate
from nearest.retrieval.gates.network import check_enough, folds_of, train_network

_LARGEST_GAIN = 3.0  # nats; a rare enormous gain says little about the next
_ROUNDS = 20  # of expectation maximisation, for the shares that training begins with
_LEAST_SHARE = 1e-3  # of these


class SearchEverywhere:
    """Stands in for the gate while its training text is looked up."""

    needs_lm = True

    def __init__(self, config: MixtureConfig) -> None:
        self.components: tuple[Component, ...] = config.weighed

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """Nothing is predicted with it."""
        return np.zeros((len(view.candidates.ids), len(self.components)))

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """All of them, whatever `skip` is."""
        return np.ones(len(before.candidates.ids), dtype=bool)


class MixtureData(NamedTuple):
    """Everything about n predictions, looked up in one way, that fitting needs.

    `log_probs` are of the token that came, by the language model and by each component with what
    the gate leaves to the model; −inf where a component has no candidate.
    """

    rows: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    features: Float[np.ndarray, "n features"]
    before: Float[np.ndarray, "n features_before"]
    log_probs: Float[np.ndarray, "n choices"]  # float32


def fit_mixture(
    config: MixtureConfig,
    examples: Iterable[tuple[Examples, ...]],
    skip: float | None = None,
    progress: Progress = no_progress,
    begin: MixtureGate | None = None,
) -> tuple[MixtureGate, Float[Tensor, " n"]]:
    """Fit a mixture; also the log-probability that it gives to each token of the text.

    Args:
        config: what it looks at and weighs.
        examples: predictions of the text, each looked up in one way; for a gate that decides about
            searches in two, with and without the dense search.
        skip: fraction of searches that the log-probabilities are to be without; None for a gate
            that decides about none.
        progress: told how training goes on.
        begin: a gate that is learned on from; one for another memory needs less text then.

    Raises:
        SettingError: the text is too short, or `begin` looks at other things.
    """
    if begin is not None and not (
        begin.config.alike(config) and (begin.search is None) == (skip is None)
    ):
        raise SettingError(
            "the gate to start from looks at other things: tune it anew with this version, for "
            "the same method"
        )
    return fit_mixture_to(config, mixture_data(config, examples), skip, progress, begin)


def fit_mixture_to(
    config: MixtureConfig,
    ways: Sequence[MixtureData],
    skip: float | None = None,
    progress: Progress = no_progress,
    begin: MixtureGate | None = None,
) -> tuple[MixtureGate, Float[Tensor, " n"]]:
    """`fit_mixture` to what `mixture_data` made of a text, or `one_after_another` of several."""
    first = ways[0]
    check_enough(len(first.rows), learned=begin is not None)
    folds = folds_of(first.documents)
    log_probs = torch.from_numpy(np.concatenate([way.log_probs for way in ways]))

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        return -_mixed(logits, log_probs[rows]).mean(-1)

    mix = train_network(
        np.concatenate([way.features for way in ways]),
        loss,
        np.log(np.maximum(best_shares(np.exp(first.log_probs), _ROUNDS), _LEAST_SHARE)),
        np.tile(folds, len(ways)),
        begin=None if begin is None else begin.mix,
        progress=progress,
        stage="train the gate",
    )
    state = mix.state_dict(prefix="mix.")
    mixed = [_mixed(torch.from_numpy(mix(w.features)), torch.from_numpy(w.log_probs)) for w in ways]
    if skip is None:
        return MixtureGate(config, state), mixed[0]
    gains = (mixed[0] - mixed[1]).clamp(-_LARGEST_GAIN, _LARGEST_GAIN)

    def error(rows: Tensor, estimates: Tensor) -> Tensor:
        return ((estimates[..., 0] - gains[rows]) ** 2).mean(-1)

    start = gains.mean(0, keepdim=True).numpy()
    search = train_network(
        first.before,
        error,
        start,
        folds,
        begin=None if begin is None else begin.search,
        may_stay_untrained=begin is not None,  # equal estimates would save no search
        progress=progress,
        stage="train its searches",
    )
    estimates = search(first.before)[:, 0]
    quantiles = quantiles_of(estimates)
    state |= {**search.state_dict(prefix="search."), "quantiles": quantiles}
    searched = torch.from_numpy(reaching(estimates, quantiles, skip))
    return MixtureGate(config, state), torch.where(searched, mixed[0], mixed[1])


def _mixed(
    logits: Float[Tensor, "*shape choices"], log_probs: Float[Tensor, "*shape choices"]
) -> Float[Tensor, "*shape"]:
    """Log-probability that the gated mixture gives to each token."""
    logits = logits.masked_fill(log_probs == -torch.inf, -torch.inf)
    return (logits + log_probs).logsumexp(-1) - logits.logsumexp(-1)


def distance_unit(examples: Iterable[Examples]) -> float:
    """How much farther the entry in the middle is than the nearest: median over queries.

    1 where no query has two entries, or all are equally near.
    """
    gaps = []
    for one in examples:
        found = one.view.candidates
        distances = np.sort(found.distances[:, found.of(*MEMORY_KINDS)], axis=1)
        count = np.isfinite(distances).sum(axis=1)
        some = count > 1
        middle = distances[some, count[some] // 2]
        gaps.append(middle - distances[some, 0])
    unit = float(np.median(np.concatenate(gaps))) if gaps and sum(map(len, gaps)) else 0.0
    return unit if unit > 0 else 1.0


def mixture_data(
    config: MixtureConfig, examples: Iterable[tuple[Examples, ...]]
) -> list[MixtureData]:
    """What a mixture sees of a text, in the order of the text: one for each way it is looked up."""
    collected = (_collect(config, ways) for ways in examples)
    return [_in_order(parts) for parts in zip(*collected, strict=True)]


def one_after_another(texts: Sequence[Sequence[MixtureData]]) -> list[MixtureData]:
    """Several texts, each looked up in a memory and measured in a unit of its own, as one text."""
    shifted: list[list[MixtureData]] = []
    rows = documents = 0
    for ways in texts:
        shifted.append(
            [
                way._replace(rows=way.rows + rows, documents=way.documents + documents)
                for way in ways
            ]
        )
        rows += len(ways[0].rows)
        documents += int(ways[0].documents.max()) + 1
    return [_in_order(parts) for parts in zip(*shifted, strict=True)]


def _collect(config: MixtureConfig, ways: tuple[Examples, ...]) -> list[MixtureData]:
    collected = []
    for one in ways:
        probs = component_probs(one.view.candidates, config.weighed, one.targets)
        lm = np.maximum(np.exp(one.lm_log_probs), FLOOR)[:, None]
        probs = (1 - LEFT_TO_LM) * probs + LEFT_TO_LM * lm
        log_probs = np.log(np.concatenate([lm, probs], axis=1))
        log_probs[:, 1:][~are_found(one.view.candidates, config.weighed)] = -np.inf
        collected.append(
            MixtureData(
                one.rows,
                one.documents,
                config.features(one.view),
                config.features_before(one.view),
                log_probs.astype(np.float32),
            )
        )
    return collected


def _in_order(parts: Sequence[MixtureData]) -> MixtureData:
    """Concatenate the parts in the order of the text."""
    whole = MixtureData(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(whole.rows, kind="stable")
    return MixtureData(*(array[order] for array in whole))
