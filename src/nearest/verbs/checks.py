"""What a mean hides: where a method does harm, and whether its neighbours are informative."""

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
        """Plain values; None for infinite ones."""
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
    """Summarise losses: the nll of each token minus the base model's, in nats."""
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
    """Whether neighbours are informative: how much of their weight falls on the right token.

    Attributes:
        right: mean p_memory of the token that came, weighed by λ.
        chance: mean p_memory of tokens from elsewhere in the text, which is what neighbours that
            know nothing of the context reach.
        tokens: number of predictions.
    """

    right: float
    chance: float
    tokens: int

    @property
    def useless(self) -> bool:
        """Whether the right token gets hardly more weight than any other token of the text.

        The mixture is then about (1 − λ) of the base model: perplexity grows by 1 / (1 − λ).
        """
        return self.tokens >= _ENOUGH and self.right <= _BETTER_THAN_CHANCE * self.chance


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
