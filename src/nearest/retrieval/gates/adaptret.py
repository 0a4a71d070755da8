"""Search only where it pays (AdaptRet; He et al., arXiv:2109.04212)."""

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearest.errors import SettingError
from nearest.progress import Progress, no_progress
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.fitting import (
    COARSE_TEMPERATURES,
    FLOOR,
    Temperature,
    best_lams,
    nll,
    observe,
)
from nearest.retrieval.gates.gate import (
    LEFT_TO_LM,
    Examples,
    StoredGate,
    View,
    checked_quantiles,
    quantiles_of,
    worth_searching,
)
from nearest.retrieval.gates.network import Network, check_enough, folds_of, train_network

LONGEST = 4  # tokens of the n-grams whose counts are an input
_FIGURES = 2 + 2 * LONGEST
_PENALTY = 0.05  # of the mean λ of the memory
_HIDDEN = (16, 16)


class AdaptRetGate(StoredGate):
    """A network gives λ of the memory before the search, and so says whether to make one.

    Its state: the network `mix`, `adaptret_inputs` → logits of the language model and of the
    memory; and `quantiles` of λ's log-odds on the tuning text.
    """

    class Config(msgspec.Struct, frozen=True):
        """The temperature by which distances are divided."""

        temperature: Temperature

    needs_lm = True
    quantiles: Tensor

    def __init__(self, config: Config, state: Mapping[str, Tensor]) -> None:
        super().__init__(config, state)
        self.mix = Network.of(state, "mix", None, 2)
        self.register_buffer("quantiles", checked_quantiles(state["quantiles"]))

    @property
    def components(self) -> tuple[Component, ...]:
        return (_component(self.config.temperature),)

    @property
    def key_dim(self) -> int:
        """Dimension of the keys that it looks at."""
        return self.mix.inputs - _FIGURES

    def shares(self, view: View) -> Float[np.ndarray, "q components"]:
        """λ where a search was made and found something; elsewhere the model is left alone."""
        lams = np.exp(-np.logaddexp(np.float32(0), -self._log_odds(view)))
        return np.where(view.candidates.has("dense"), (1 - LEFT_TO_LM) * lams, 0.0)[:, None]

    def worth_searching(self, before: View, skip: float) -> Bool[np.ndarray, " q"]:
        """Where λ reaches the quantile that saves as many searches."""
        return worth_searching(before, self._log_odds, self.quantiles, skip)

    def _log_odds(self, view: View) -> Float[np.ndarray, " q"]:
        return _log_odds(self.mix(adaptret_inputs(view)))


def fit_adaptret(examples: Iterable[Examples], progress: Progress = no_progress) -> AdaptRetGate:
    """Fit the network, and the temperature that is best with a fixed λ.

    Args:
        examples: the text, looked up with every search made.
        progress: told how training goes on.

    Raises:
        SettingError: the text is too short.
    """
    data = observe(examples, adaptret_inputs, [_component(t) for t in COARSE_TEMPERATURES])
    check_enough(len(data.inputs))
    lams = best_lams(data.lm_probs, data.probs)
    best = int(nll(data.lm_probs, data.probs, lams).argmin())
    lm, memory = torch.from_numpy(data.lm_probs), torch.from_numpy(data.probs[:, best].copy())
    lam = np.clip(lams[best], 1e-3, 1 - 1e-3)

    def loss(rows: Tensor, logits: Tensor) -> Tensor:
        return adaptret_loss(logits, lm[rows], memory[rows])

    network = train_network(
        data.inputs,
        loss,
        np.log([1 - lam, lam]),
        folds_of(data.documents),
        hidden=_HIDDEN,
        emphasis=_emphasis(data.inputs.shape[1]),
        progress=progress,
    )
    quantiles = quantiles_of(_log_odds(network(data.inputs)))
    state = {**network.state_dict(prefix="mix."), "quantiles": quantiles}
    return AdaptRetGate(AdaptRetGate.Config(COARSE_TEMPERATURES[best]), state)


def adaptret_loss(
    logits: Float[Tensor, "*copies n 2"],
    lm_probs: Float[Tensor, "*copies n"],
    memory_probs: Float[Tensor, "*copies n"],
) -> Float[Tensor, "*copies"]:
    """−mean log(λ_LM·p_LM + λ·p_memory) + .05·mean λ, in nats."""
    shares = logits.softmax(-1)
    mixed = shares[..., 0] * lm_probs + shares[..., 1] * memory_probs
    return -mixed.clamp(min=FLOOR).log().mean(-1) + _PENALTY * shares[..., 1].mean(-1)


def adaptret_inputs(view: View) -> Float[np.ndarray, "q inputs"]:
    """The key; the model's largest probability and entropy; logs of 1 + count and of 1 + fertility.

    Counts and fertility are of the last 1 … 4 tokens in the memory's corpus.

    Raises:
        SettingError: the queries' own entries are to be left out, which counts them too.
    """
    queries, lm = view.queries, view.queries.lm
    if queries.own is not None and (queries.own >= 0).any():
        raise SettingError(
            "knn+adaptret counts n-grams of the memory, and a text's own cannot be left out of "
            "these: leave leave_one_out out and give text that the memory does not hold, or choose "
            "another method"
        )
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
