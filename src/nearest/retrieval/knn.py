"""kNN-LM over a memory: settings, retrieval, and the two ways a mixture is asked for."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearest.errors import SettingError
from nearest.memory.memory import DISTANCES, Memory
from nearest.retrieval.distribution import (
    interpolate,
    knn_weights,
    target_probs,
    vocabulary_probs,
)

BASE = "base"
MEMORY_METHODS = ("knn",)
METHODS = (BASE, *MEMORY_METHODS)


def check_method(method: str, known: Sequence[str] = METHODS) -> None:
    """Refuse a method that is not known here (SettingError)."""
    if method not in known:
        raise SettingError(f"method {method!r} is unknown: choose among {', '.join(known)}")


@dataclass(frozen=True)
class KnnSettings:
    """What kNN-LM leaves open; the defaults are the paper's in-domain ones (arXiv:1911.00172)."""

    lam: float = 0.25
    temperature: float = 1.0
    k: int = 1024
    distances: str = "keys"
    candidates: int = 0  # at least so many are fetched and re-ranked by their keys

    def __post_init__(self) -> None:
        for name in ("lam", "temperature"):
            if not isinstance(getattr(self, name), Real):
                raise SettingError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("k", "candidates"):
            if not isinstance(getattr(self, name), Integral):
                raise SettingError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not 0 <= self.lam <= 1:
            raise SettingError(f"lam must lie inside [0, 1], got {self.lam}: it is a probability")
        if not 0 < self.temperature < float("inf"):
            raise SettingError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.k < 1:
            raise SettingError(f"k must be at least 1, got {self.k}")
        if self.distances not in DISTANCES:
            raise SettingError(f"distances {self.distances!r} is unknown: choose keys or index")

    @classmethod
    def resolve(cls, memory: Memory, **given: Any) -> "KnnSettings":
        """Settings as given, else as tuned, else the defaults; k at most the memory's entries."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - names):
            raise SettingError(f"{unknown[0]!r} is no setting of knn: choose among {sorted(names)}")
        tuned = {name: v for name, v in memory.settings("knn").items() if name in names}
        chosen = {name: v for name, v in given.items() if v is not None}
        try:
            cls(**tuned)
        except (SettingError, TypeError) as error:
            raise SettingError(
                f"the settings stored in {memory.path} make no sense: {tuned}. Tune it again "
                "(`nearest tune`)"
            ) from error
        settings = cls(**{**tuned, **chosen})
        if settings.k > memory.entries:
            if "k" in chosen:
                warnings.warn(
                    f"k = {settings.k:,} is more than the memory's {memory.entries:,} entries: "
                    "all of them are used",
                    stacklevel=2,
                )
            settings = cls(**{**asdict(settings), "k": memory.entries})
        return settings


class Retrieved(NamedTuple):
    """Neighbours with their say; rows of weights sum to 1, or to 0 where none was found."""

    ids: Int[Tensor, "q k"]
    values: Int[Tensor, "q k"]
    weights: Float[Tensor, "q k"]


class KnnLM:
    """A memory with settings; it holds no state between calls."""

    def __init__(self, memory: Memory, settings: KnnSettings) -> None:
        self.memory = memory
        self.settings = settings

    def retrieve(self, keys: Float[Tensor, "q dim"]) -> Retrieved:
        """Look hidden states up; keys are float32 on the CPU, and so is what comes back."""
        settings = self.settings
        found = self.memory.search(
            keys.numpy(), settings.k, settings.distances, settings.candidates
        )
        return Retrieved(
            torch.from_numpy(found.ids),
            torch.from_numpy(self.memory.values(found.ids)),
            knn_weights(torch.from_numpy(found.distances), settings.temperature),
        )

    def target_log_probs(
        self,
        lm_log_probs: Float[Tensor, " q"],
        keys: Float[Tensor, "q dim"],
        targets: Int[Tensor, " q"],
    ) -> Float[Tensor, " q"]:
        """Log-probability of one token a query, with no array of the vocabulary's size."""
        retrieved = self.retrieve(keys)
        probs = target_probs(retrieved.weights, retrieved.values, targets)
        return interpolate(lm_log_probs, probs, self.lams(retrieved))

    def log_probs(
        self, lm_log_probs: Float[Tensor, "q vocab"], keys: Float[Tensor, "q dim"]
    ) -> Float[Tensor, "q vocab"]:
        """Log-probabilities of every token, on the device of `lm_log_probs`."""
        retrieved = self.retrieve(keys)
        device = lm_log_probs.device
        probs = vocabulary_probs(
            retrieved.weights.to(device), retrieved.values.to(device), lm_log_probs.shape[-1]
        )
        return interpolate(lm_log_probs, probs, self.lams(retrieved)[:, None].to(device))

    def lams(self, retrieved: Retrieved) -> Float[Tensor, " q"]:
        """λ of each query: as set, or 0 where nothing was found and the model stands alone."""
        return self.settings.lam * (retrieved.weights.sum(-1) > 0).float()
