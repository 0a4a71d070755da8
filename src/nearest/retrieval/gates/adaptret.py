"""Search only where it pays (AdaptRet; He et al., arXiv:2109.04212)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.fitting import (
    FLOOR,
    TEMPERATURES,
    best_lams,
    nll,
    observe,
    temperature_of,
)
from nearest.retrieval.gates.gate import LEFT_TO_LM, View
from nearest.retrieval.gates.network import Network
from nearest.retrieval.gates.quantiles import check_quantiles, quantiles_of, worth_searching
from nearest.retrieval.gates.seen import Seen
from nearest.retrieval.gates.training import check_enough, held_out_documents, train_network

LONGEST = 4  # tokens of the n-grams that are looked at
_FIGURES = 2 + 2 * LONGEST
_PENALTY = 0.05  # of the mean λ of the memory
_HIDDEN = 16


@dataclass(frozen=True)
class AdaptRetGate:
    """A network gives λ of the memory before the search, and so says whether to make one.

    Attributes:
        temperature: by which distances are divided.
        network: features → logits of the language model and of the memory.
        quantiles: of λ's log-odds on the tuning text.
    """

    temperature: float
    network: Network
    quantiles: Float[np.ndarray, " quantiles"]

    @property
    def components(self) -> tuple[Component, ...]:
        """All neighbours."""
        return (_component(self.temperature),)

    @property
    def needs_lm(self) -> bool:
        """It sees the model's entropy and largest probability."""
        return True

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """λ where a search was made and found something; elsewhere the model is left alone."""
        lams = np.exp(-np.logaddexp(np.float32(0), -self._log_odds(view)))
        return np.where(view.candidates.has("dense"), (1 - LEFT_TO_LM) * lams, 0.0)[:, None]

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Where λ reaches the quantile that saves as many searches."""
        return worth_searching(before, self._log_odds, self.quantiles, skip)

    def _log_odds(self, view: View) -> Float[np.ndarray, " q"]:
        return _log_odds(self.network(adaptret_inputs(view)))

    def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The temperature as JSON, network and quantiles as arrays."""
        arrays = {**self.network.arrays("mix"), "quantiles": self.quantiles}
        return {"temperature": self.temperature}, arrays

    @classmethod
    def restored(
        cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> "AdaptRetGate":
        """The gate that was stored."""
        network = Network.of(arrays, "mix")
        network.check(None, 2)
        check_quantiles(arrays["quantiles"])
        return cls(temperature_of(config), network, arrays["quantiles"])


def fit_adaptret(
    seen: Iterable[Seen],
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
) -> AdaptRetGate:
    """Fit the network on nine tenths of the documents; what predicts the others best is kept.

    Args:
        seen: the text, searched everywhere.
        temperatures: that are tried, with a fixed λ.
        seed: of training, and of which documents are held out.

    Raises:
        SettingError: the text is too short.
    """
    data = observe(seen, adaptret_inputs, [_component(t) for t in temperatures])
    check_enough(len(data.inputs))
    lams = best_lams(data.lm_probs, data.probs)
    best = int(nll(data.lm_probs, data.probs, lams).argmin())
    lm, memory = torch.from_numpy(data.lm_probs), torch.from_numpy(data.probs[:, best])
    lam = np.clip(lams[best], 1e-3, 1 - 1e-3)

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        return adaptret_loss(logits, lm[rows], memory[rows])

    network = train_network(
        data.inputs,
        loss,
        2,
        hidden=_HIDDEN,
        seed=seed,
        emphasis=_emphasis(data.inputs.shape[1]),
        start=np.log([1 - lam, lam]),
        held_out=held_out_documents(data.documents, seed=seed),
    )
    quantiles = quantiles_of(_log_odds(network(data.inputs)))
    return AdaptRetGate(temperatures[best], network, quantiles)


def adaptret_loss(
    logits: Float[Tensor, "n 2"], lm_probs: Float[Tensor, " n"], memory_probs: Float[Tensor, " n"]
) -> Float[Tensor, ""]:
    """−mean log(λ_LM·p_LM + λ·p_memory) + .05·mean λ, in nats."""
    shares = logits.softmax(-1)
    mixed = shares[:, 0] * lm_probs + shares[:, 1] * memory_probs
    return -mixed.clamp(min=FLOOR).log().mean() + _PENALTY * shares[:, 1].mean()


def adaptret_inputs(view: View) -> Float[np.ndarray, "q inputs"]:
    """The key; the model's largest probability and entropy; logs of 1 + count and of 1 + fertility.

    Counts and fertility are of the last 1 … 4 tokens in the memory's corpus.
    """
    queries, lm = view.queries, view.queries.lm
    if lm is None or view.memory is None:
        raise ValueError("this gate needs the language model's view of the queries, and the memory")
    ngrams = view.memory.ngrams(queries.context, queries.ends, LONGEST)
    figures = [np.exp(lm.max_log_prob)[:, None], lm.entropy[:, None]]
    figures += [np.log1p(ngrams.counts), np.log1p(ngrams.fertility)]
    return np.concatenate([queries.keys, *figures], axis=1).astype(np.float32)


def _log_odds(logits: Float[np.ndarray, "q 2"]) -> Float[np.ndarray, " q"]:
    """log(λ / (1 − λ)), which tells λ near 0 or 1 apart where float32 cannot."""
    log_odds: Float[np.ndarray, " q"] = logits[:, 1] - logits[:, 0]
    return log_odds


def _emphasis(inputs: int) -> Float[np.ndarray, " inputs"]:
    """The key's dimensions together count like one figure: the paper, too, balances features."""
    dim = inputs - _FIGURES
    return np.concatenate([np.full(dim, 1 / np.sqrt(dim)), np.ones(_FIGURES)])


def _component(temperature: float) -> Component:
    return Component(("dense",), temperature)
