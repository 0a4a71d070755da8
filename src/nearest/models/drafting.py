"""Drafts for transformers' assisted decoding, as long as they pay on this machine.

The model verifies a draft in one pass and keeps what it would have written itself, so greedy
search gives the same text and sampling the same distribution (arXiv:2211.17192). Whether a draft
pays depends on how often such drafts were accepted and on what a wider pass costs; both are
measured as text is generated.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from nearest.memory import Memory
from nearest.models.generated import Prompt, generation_option
from nearest.retrieval.drafts import NO_DRAFT, Acceptance, Draft, draft, worth

_RATHER = 0.1  # of a pass, that a further token is taken to cost before any was measured
_FORGET = 0.95  # what a measured pass keeps of its weight with each later one
_OUTLIER = 4.0  # times what was expected: the machine was at something else
_PATIENCE = (8, 128)  # passes without a draft before one is tried anyway; doubled by failures
_TRIAL = 4  # tokens of such a draft
_LOOK_EVERY = 4  # passes, for what may be drafted, while nothing pays
# Options of generate() under which a text is written otherwise than token by token, or ends by
# what a pass over several tokens would see too late.
_OTHER_WAYS = (
    "assistant_model",
    "assistant_early_exit",
    "constraints",
    "dola_layers",
    "force_words_ids",
    "guidance_scale",
    "max_time",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "stop_strings",
    "stopping_criteria",
)


@dataclass
class PassTimes:
    """Seconds of a pass by the number of tokens it verifies: a line through what was measured."""

    _moments: np.ndarray = field(default_factory=lambda: np.zeros(5))  # 1, n, n², s, n·s; decayed

    def saw(self, tokens: int, seconds: float) -> None:
        """Take a measured pass into account."""
        if self._moments[0] > 3:
            alone, a_token = self.line
            seconds = min(seconds, _OUTLIER * (alone + a_token * tokens))
        of_this = np.array([1.0, tokens, tokens**2, seconds, tokens * seconds])
        self._moments = _FORGET * self._moments + of_this

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of a pass without drafted tokens, and of each such token."""
        count, n, squares, seconds, products = self._moments
        if count == 0:
            return 1.0, _RATHER
        spread = count * squares - n**2
        mean = seconds / count
        if spread <= 1e-9 * count**2:  # all were equally wide
            alone = mean / (1 + _RATHER * n / count)
            return alone, _RATHER * alone
        a_token = max(0.0, (count * products - n * seconds) / spread)
        return max(mean - a_token * n / count, mean / 10), a_token


@dataclass
class Experience:
    """What generating has taught so far; one a thread."""

    acceptance: Acceptance = field(default_factory=Acceptance.start)
    times: PassTimes = field(default_factory=PassTimes)
    waited: int = 0  # passes since the last draft
    patience: int = _PATIENCE[0]

    @property
    def resting(self) -> bool:
        """Whether not even to look for a draft: none paid for a while."""
        return self.waited > _PATIENCE[0] and self.waited % _LOOK_EVERY > 0

    def length(self, rates: Float[np.ndarray, " n"]) -> int:
        """How many tokens of a draft are to be verified, whose rates of acceptance are these."""
        count = worth(rates, *self.times.line)
        if not count and self.waited >= self.patience:
            count = min(_TRIAL, len(rates))
        return count

    def saw(self, found: Draft, accepted: int, seconds: float) -> None:
        """A pass verified a draft, which may be empty."""
        self.times.saw(len(found.tokens), seconds)
        if not len(found.tokens):
            self.waited += 1
            return
        self.acceptance = self.acceptance.after(found.classes, accepted)
        least, most = _PATIENCE
        self.patience = least if accepted else min(most, 2 * self.patience)
        self.waited = 0


class Drafter:
    """Drafts from memories and from the text itself, in one call of generate().

    It has the methods of transformers' `CandidateGenerator`.
    """

    requires_model_outputs = False

    def __init__(self, memories: Sequence[Memory], experience: Experience, max_length: int) -> None:
        self._memories = memories
        self._experience = experience
        self._max_length = max_length
        self._draft = NO_DRAFT
        self._passes = 0
        self._began = 0.0  # the pass that is being made

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """The text and what is drafted after it; without probabilities, since nothing is drawn."""
        context = input_ids[0].cpu().numpy()
        room = self._max_length - len(context) - 1
        self._draft = NO_DRAFT
        if room > 0 and self._passes and not self._experience.resting:
            found = draft(self._memories, context, room)
            rates = self._experience.acceptance.rates(found.classes)
            self._draft = found.first(self._experience.length(rates))
        self._began = time.perf_counter()
        drafted = input_ids.new_tensor(self._draft.tokens)
        return torch.cat([input_ids, drafted[None]], dim=1), None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Learn from how much was accepted."""
        seconds = time.perf_counter() - self._began
        if self._passes:  # the first reads the prompt, and tells nothing of those that follow
            self._experience.saw(self._draft, int(num_matches), seconds)
        self._passes += 1


def can_draft(model: PreTrainedModel, prompt: Prompt, named: Mapping[str, Any]) -> bool:
    """Whether a call of generate() writes one text, token by token, and ends by tokens alone."""
    if len(prompt.first) != 1 or getattr(model, "_is_stateful", False):
        return False
    if any(generation_option(model, named, option) for option in _OTHER_WAYS):
        return False
    single = ("num_beams", "num_return_sequences")
    if any((generation_option(model, named, option) or 1) > 1 for option in single):
        return False
    caching = generation_option(model, named, "cache_implementation")
    return (
        caching in (None, "dynamic") and generation_option(model, named, "use_cache") is not False
    )
