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
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from nearest.memory import Memory
from nearest.models.generated import Prompt, generation_option
from nearest.retrieval.drafts import NO_DRAFT, Acceptance, Draft, draft, worth

_STEP = 0.5  # of a pass, that a draft is taken to cost before any was measured
_RATHER = 0.05  # and each of its tokens
_HELD = 0.1  # tokens²: how firmly `_RATHER` is held on to where drafts are of about one length
# Tokens of a draft at least; a shorter one is filled up. A product with two or three rows takes up
# to twice as long as one with one row, and one with five no longer than that or less, where CPUs
# have kernels for one row and for many; elsewhere a few rows more cost nothing.
LEAST = 4
_FORGET = 0.95  # what a measured pass keeps of its weight with each later one
_OUTLIER = 4.0  # times what was expected: the machine was at something else
# Passes that drafts may cost: at first, more with each pass, when one is tried that seems not to
# pay, and at most.
_BEGUN_WITH, _ALLOWED, _ENOUGH, _AT_MOST = 0.75, 0.01, 1.5, 4.0
_RISKED = 0.05  # passes that a draft may be expected to lose whatever the account
_LOOKED = 0.5  # of what is allowed, that goes into looking where the account is overdrawn
_TRIAL = 4  # tokens of a draft that is tried
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
    "watermarking_config",  # whose processor keeps state, which rejected drafts would move on
)


@dataclass
class PassTimes:
    """Seconds of a pass by the number of tokens it verifies, as measured; old passes fade.

    Of passes without a draft a mean, of others a line: the first token of a draft may cost several
    times what a further one does, where a product with one row is read quicker than with a few.
    """

    least: int = 1  # drafted tokens, to which a draft is filled up
    _alone: np.ndarray = field(default_factory=lambda: np.zeros(2))  # 1, s
    _wide: np.ndarray = field(default_factory=lambda: np.zeros(5))  # 1, n, n², s, n·s

    @property
    def known(self) -> bool:
        """Whether a pass without a draft was measured."""
        return bool(self._alone[0] > 0)

    def saw(self, tokens: int, seconds: float) -> None:
        """Take a measured pass into account."""
        if (self._wide if tokens else self._alone)[0] > 2:
            seconds = min(seconds, _OUTLIER * float(self.seconds(tokens)[-1]))
        if tokens:
            tokens = max(tokens, self.least)
            of_this = np.array([1.0, tokens, tokens**2, seconds, tokens * seconds])
            self._wide = _FORGET * self._wide + of_this
        else:
            self._alone = _FORGET * self._alone + np.array([1.0, seconds])

    def seconds(self, most: int) -> Float[np.ndarray, " most_plus_1"]:
        """Of passes that verify 0 … `most` drafted tokens."""
        alone = self._alone[1] / self._alone[0] if self.known else 1.0
        count, total, squares, seconds, products = self._wide
        tokens, a_token = np.maximum(np.arange(most + 1), self.least), _RATHER * alone
        wide = alone * (1 + _STEP) + a_token * tokens
        if count:
            spread, held = count * squares - total**2, _HELD * count**2
            a_token = (count * products - total * seconds + held * a_token) / (spread + held)
            wide = seconds / count + max(0.0, a_token) * (tokens - total / count)
        times: Float[np.ndarray, " most_plus_1"] = np.maximum(wide, alone)
        times[0] = alone
        return times


@dataclass
class Experience:
    """What generating has taught so far; one a thread.

    Whatever the text, drafts cost little: an account says how many passes they may cost yet. It
    begins with less than one, each pass adds a little, and what drafts bring and cost is entered.
    Where it is overdrawn, drafts are looked for now and then, and made where they are nearly sure
    to be right.
    """

    acceptance: Acceptance = field(default_factory=Acceptance.start)
    times: PassTimes = field(default_factory=lambda: PassTimes(LEAST))
    account: float = _BEGUN_WITH
    resting: bool = False  # not even looking for a draft
    _rested: int = 0  # passes since one was looked for
    _looking: float = 0.0  # passes that it took the last time

    def length(self, rates: Float[np.ndarray, " n"]) -> int:
        """How many tokens of a draft are to be verified, whose rates of acceptance are these."""
        if not self.times.known:
            return 0
        seconds = self.times.seconds(len(rates))
        lost = seconds[1:] / seconds[0] - 1  # passes, where nothing is accepted
        risked = max(0.0, 1 - rates[0]) * lost if len(rates) else lost
        affordable = int(np.searchsorted(risked, max(self.account, _RISKED), side="right"))
        count = worth(rates[:affordable], seconds[: affordable + 1])
        if not count and self.account >= _ENOUGH:  # what seems not to pay is tried now and then
            count = min(_TRIAL, affordable)
        return count

    def saw(
        self,
        found: Sequence[Draft],
        accepted: Sequence[int],
        seconds: float,
        looking: float = 0.0,
    ) -> None:
        """A pass verified the drafts of its rows, which may be empty.

        Args:
            found: what was verified in each row.
            accepted: how many of its tokens.
            seconds: that the pass took.
            looking: seconds that it took to find the drafts.
        """
        tokens, first = max(len(one.tokens) for one in found), not self.times.known
        self.times.saw(tokens, seconds)
        if first:  # what opens files and compiles kernels is no measure of what follows
            return
        expected = self.times.seconds(tokens)
        looked = min(1.0, looking / float(expected[0]))
        cost = float(expected[-1] / expected[0]) - 1 + looked
        gain = sum(accepted) / len(found) - cost
        self.account = min(_AT_MOST, self.account + _ALLOWED + gain)
        if not self.resting:
            self._rested, self._looking = 0, looked
        self._rested += 1
        every = self._looking / (_LOOKED * _ALLOWED)  # passes
        self.resting = self.account < 0 and self._rested < every
        for one, right in zip(found, accepted, strict=True):
            if len(one.tokens):
                self.acceptance = self.acceptance.after(one.classes, right)


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
        self._looking = 0.0  # seconds that its draft took to find

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """The text and what is drafted after it; without probabilities, since nothing is drawn."""
        context = input_ids[0].cpu().numpy()
        room = self._max_length - len(context) - 1
        self._draft, began = NO_DRAFT, time.perf_counter()
        if room > 0 and self._passes and not self._experience.resting:
            found = draft(self._memories, context, room)
            rates = self._experience.acceptance.rates(found.classes)
            self._draft = found.first(self._experience.length(rates))
        self._began = time.perf_counter()
        self._looking = self._began - began
        drafted = self._draft.tokens.tolist()
        if drafted:
            drafted += [drafted[-1]] * (min(self._experience.times.least, room) - len(drafted))
        return torch.cat([input_ids, input_ids.new_tensor([drafted])], dim=1), None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Learn from how much was accepted."""
        seconds = time.perf_counter() - self._began
        if self._passes:  # the first reads the prompt, and tells nothing of those that follow
            self._experience.saw([self._draft], [int(num_matches)], seconds, self._looking)
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
    cache = named.get("past_key_values")
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
        return False  # others do not take all back; what a cache holds would be read once more
    caching = generation_option(model, named, "cache_implementation")
    return (
        caching in (None, "dynamic") and generation_option(model, named, "use_cache") is not False
    )
