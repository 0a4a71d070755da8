"""Drafts of what comes next: how memory and text went on where the context stood before.

Entries whose left context shares the longest suffix with the text, in the memory and in the text
itself, vote token by token; those that voted for another token drop out. How often drafts of such
votes were accepted decides how far a draft is worth its verification (`worth`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int

from nearest.corpus.tokens import Tokens
from nearest.index.matches import TokenRun, match_lengths
from nearest.index.neighbours import NO_ENTRY
from nearest.machine import code_can_be_cached
from nearest.memory import Memory

LONGEST = 32  # tokens of a draft
_MATCHES = 64  # entries of each memory that vote
_OWN_MATCHES = 16  # places of the text itself
_POWER = 3.0  # a vote weighs (1 + length of its match) to this power
_LENGTHS = (2, 4, 8, 16)  # where classes of match lengths begin
_SHARES = (0.5, 0.8, 0.95)  # where classes of agreement begin
CLASSES = (len(_LENGTHS) + 1) * (len(_SHARES) + 1)
_FORGET = 0.98  # what an observation keeps of its weight with each later one of its class
_MARGIN = 0.03  # by which a draft must be better than none
_PRIOR = 4.0  # observations that the expected rate of a class counts for
# Rates expected of each class before any is tried, by length (rows) and agreement: about what was
# measured of a small model and SmolLM2 (`benchmarks/draft_trees.py`).
_EXPECTED = np.array(
    [
        [0.25, 0.25, 0.40, 0.55],
        [0.35, 0.55, 0.65, 0.70],
        [0.60, 0.75, 0.90, 0.87],
        [0.80, 0.90, 0.95, 0.97],
        [0.85, 0.93, 0.98, 0.99],
    ]
).ravel()
_CAUTION = 0.5  # accepted tokens of one that was expected, before anything is known of a text
_LEAST = 0.01  # of them, so that a quotient is a number


class Draft(NamedTuple):
    """Tokens that may come next, and the class of evidence that each rests on."""

    tokens: Int[np.ndarray, " n"]
    classes: Int[np.ndarray, " n"]

    def first(self, count: int) -> "Draft":
        """Its first tokens."""
        return Draft(self.tokens[:count], self.classes[:count])


NO_DRAFT = Draft(*np.empty((2, 0), dtype=np.int64))


def draft(memories: Sequence[Memory], context: Tokens, most: int) -> Draft:
    """Up to `most` tokens that the longest matches agree on.

    Args:
        memories: of one model, whose matches vote with those of the context itself.
        context: int64 token ids of the text so far, at least one.
        most: number of tokens; at most LONGEST are drafted.
    """
    continuations, lengths = continuations_of(memories, context, min(most, LONGEST))
    start_token = memories[0].manifest.model.start_token
    tokens, shares, matched = _vote(continuations, lengths, start_token, _POWER)
    classes = np.digitize(matched, _LENGTHS) * (len(_SHARES) + 1) + np.digitize(shares, _SHARES)
    return Draft(tokens, classes)


def continuations_of(
    memories: Sequence[Memory], context: Tokens, most: int
) -> tuple[Int[np.ndarray, "n most"], Int[np.ndarray, " n"]]:
    """How memories and the text itself went on, and how long each place matches the context.

    A continuation that ends before `most` tokens is filled up with -1.
    """
    start_token, last = memories[0].manifest.model.start_token, len(context) - 1
    ends = np.array([last])
    lengths, continuations = [], []
    for memory in memories:
        found = memory.longest_matches(context, ends, _MATCHES)
        known = found.ids[0] >= 0
        ids = found.ids[0][known]
        lengths.append(found.lengths[0][known].astype(np.int64))
        continuations.append(memory.values(ids[:, None] + np.arange(most)))
    places = np.flatnonzero(context[:last] == context[last])[-_MATCHES:]
    own = match_lengths([TokenRun(context)], start_token, places[None], context, ends)[0]
    chosen = np.lexsort((-places, -own))[:_OWN_MATCHES]  # the longest, of these the latest
    lengths.append(own[chosen].astype(np.int64))
    after = places[chosen][:, None] + 1 + np.arange(most)
    continuations.append(np.where(after <= last, context[np.minimum(after, last)], NO_ENTRY))
    return np.concatenate(continuations), np.concatenate(lengths)


# fmt: off
@no_type_check
@numba.njit(nogil=True, cache=code_can_be_cached())
def _vote(continuations: Any, lengths: Any, start_token: Any, power: Any) -> Any:
    """The tokens that most weight is for, one after another, among those that agreed so far.

    Returned with each are its share of the weight and the longest match that goes on with it. A
    continuation ends with its document; where a third of the weight has ended, the draft does.
    """
    count, most = continuations.shape
    tokens, shares = np.empty(most, np.int64), np.empty(most, np.float64)
    matched = np.empty(most, np.int64)
    weights = (1.0 + lengths) ** power
    for j in range(most):
        best, best_weight, total = -1, 0.0, 0.0
        for i in range(count):
            total += weights[i]
        for i in range(count):
            token = continuations[i, j]
            if weights[i] == 0 or token < 0 or token in (start_token, best):
                continue
            weight = 0.0
            for other in range(count):
                if continuations[other, j] == token:
                    weight += weights[other]
            if weight > best_weight or (weight == best_weight and token < best):
                best, best_weight = token, weight
        if best < 0 or best_weight < total / 3:
            return tokens[:j], shares[:j], matched[:j]
        tokens[j], shares[j], matched[j] = best, best_weight / total, 0
        for i in range(count):
            if continuations[i, j] != best:
                weights[i] = 0.0
            elif weights[i] > 0:
                matched[j] = max(matched[j], lengths[i] + j)
    return tokens, shares, matched
# fmt: on


@dataclass(frozen=True)
class Acceptance:
    """How often drafted tokens were accepted, by class of evidence; old observations fade.

    Attributes:
        accepted, tried: decayed counts of each class; the last of each is of all classes together,
            how many were accepted and how many were expected to be.
    """

    accepted: Float[np.ndarray, " classes"]
    tried: Float[np.ndarray, " classes"]

    @classmethod
    def start(cls) -> "Acceptance":
        """Before any draft: rather less than expected, which a few drafts outweigh."""
        tried = np.zeros(CLASSES + 1)
        tried[-1] = 1.0
        return cls(_CAUTION * tried, tried)

    def rates(self, classes: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The probability that a token of each class is accepted where those before it were."""
        # What is nearly sure stays so where little is accepted.
        expected = _EXPECTED[classes] ** (self.tried[-1] / max(self.accepted[-1], _LEAST))
        rates: Float[np.ndarray, " n"] = (self.accepted[classes] + _PRIOR * expected) / (
            self.tried[classes] + _PRIOR
        )
        return rates

    def after(self, classes: Int[np.ndarray, " n"], accepted: int) -> "Acceptance":
        """After a draft whose first `accepted` tokens were; of the rest only the first was seen."""
        hits, tried = self.accepted.copy(), self.tried.copy()
        for place, one in enumerate(classes[: accepted + 1].tolist()):
            for counted, weight in ((one, 1.0), (CLASSES, _EXPECTED[one])):
                hits[counted] = _FORGET * hits[counted] + (place < accepted)
                tried[counted] = _FORGET * tried[counted] + weight
        return Acceptance(hits, tried)


def pooled(rates: Sequence[Float[np.ndarray, "_"]]) -> Float[np.ndarray, " longest"]:
    """Rates of tokens as many of which are accepted in all as of the drafts of a row each.

    Each is the rate of a place: of the rows in which all before it are accepted, the share in which
    it is; a row whose draft is shorter has none.
    """
    survive = np.zeros((len(rates), max(len(one) for one in rates)))
    for row, one in zip(survive, rates, strict=True):
        row[: len(one)] = np.cumprod(one)
    left: Float[np.ndarray, " longest"] = survive.mean(axis=0)
    before, shares = np.concatenate([np.ones(1), left])[:-1], np.zeros_like(left)
    np.divide(left, before, out=shares, where=before > 0)
    return shares


def worth(rates: Float[np.ndarray, " n"], seconds: Float[np.ndarray, " n_plus_1"]) -> int:
    """How many drafted tokens bring the most tokens a second; 0 where none pays.

    Args:
        rates: of each token, that it is accepted where those before it were.
        seconds: of passes that verify none of them, one, two … all.
    """
    if not len(rates):
        return 0
    expected = 1 + np.cumsum(np.cumprod(rates))
    speed = expected / seconds[1:]
    best = int(speed.argmax())
    return best + 1 if speed[best] > (1 + _MARGIN) / seconds[0] else 0
