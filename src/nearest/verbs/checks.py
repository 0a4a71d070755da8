"""What a mean hides: where a method harms, and whether its neighbours know anything at all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_NOTICEABLE = 1e-3  # nats
_NAMED = 3
_ENOUGH = 100  # tokens, for the neighbours to be judged
_BETTER_THAN_CHANCE = 2.0


@dataclass(frozen=True)
class Harm:
    """Where a method predicts worse than the base model, by more than a thousandth of a nat.

    Attributes:
        fraction: of all tokens.
        mean: nats that such a token loses.
        p99: nats; of all tokens 1 % lose more (below 0 where fewer lose anything).
        documents: id and nats a token of those that lose most as a whole.
    """

    fraction: float
    mean: float
    p99: float
    documents: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values, None for what is infinite."""
        return {
            "fraction": self.fraction,
            "mean": _finite(self.mean),
            "p99": _finite(self.p99),
            "documents": [{"id": name, "nll": _finite(loss)} for name, loss in self.documents],
        }


def harm_of(
    losses: Float[np.ndarray, " tokens"],
    documents: Int[np.ndarray, " tokens"],
    ids: Sequence[str],
) -> Harm:
    """From what each token loses to the base model: nll minus the base model's, in nats."""
    losses = np.where(np.isnan(losses), 0.0, losses)  # impossible for both
    worse = losses > _NOTICEABLE
    sums = np.bincount(documents, losses, minlength=len(ids))
    means = sums / np.maximum(1, np.bincount(documents, minlength=len(ids)))
    worst = [n for n in np.argsort(-means, kind="stable")[:_NAMED] if means[n] > _NOTICEABLE]
    return Harm(
        float(worse.mean()),
        float(losses[worse].mean()) if worse.any() else 0.0,
        float(np.quantile(losses, 0.99, method="higher")),
        tuple((ids[n], float(means[n])) for n in worst),
    )


@dataclass(frozen=True)
class NeighbourCheck:
    """What the neighbours know: of the weight that they are given, how much falls on which tokens.

    Attributes:
        right: on the token that came, which is p_memory(token), weighed by λ.
        chance: on tokens that came elsewhere in the text: all that neighbours give which know
            nothing of the context.
        tokens: that were predicted.
    """

    right: float
    chance: float
    tokens: int

    @property
    def useless(self) -> bool:
        """Whether they give hardly more to the right token than to any other of the text.

        The mixture is then about (1 − λ) of the base model: perplexity grows by 1 / (1 − λ).
        """
        return self.tokens >= _ENOUGH and self.right <= _BETTER_THAN_CHANCE * self.chance


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
