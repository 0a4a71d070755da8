"""Find how much several memories should weigh, on text not scored later."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch

from nearest.encode.identity import AnyModel
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.in_context import reader_of
from nearest.models.method_run import EnsembleRun
from nearest.models.scoring import ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.gates.fitting import best_shares
from nearest.retrieval.settings import MEMORY_METHODS, check_method


@dataclass(frozen=True)
class TunedWeights:
    """The weights of memories under which a text is likeliest; what is left is the model's alone.

    `nll` and `base_nll` are nats a token with them, and of the base model.
    """

    weights: tuple[float, ...]
    nll: float
    base_nll: float
    tokens: int


def tune_weights(
    model: AnyModel,
    memories: Sequence[Memory],
    documents: ScoredInput,
    method: str = "knn",
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> TunedWeights:
    """The likeliest weights of memories, each used as it was tuned; nothing is stored.

    Args:
        model, documents, tokenizer, window, stride, batch_size, force, progress: as in `evaluate`.
        memories: two or more.
        method: that all of them are used by.
        **settings: of the method; what is not given comes from `tune`'s result in each memory.

    Raises:
        NearestError: model, memories, text or settings cannot be used.
    """
    if len(memories) < 2:
        raise SettingError("weights are for several memories: give two or more")
    check_method(method, MEMORY_METHODS)
    ensemble = Ensemble.of(memories, method, **settings)
    prepared = Scorer.prepare(
        model,
        memories,
        documents,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        batch_size=batch_size,
        force=force,
    )
    scorer = reader_of(prepared, memories, None)
    run = EnsembleRun(ensemble)
    blocks = [
        torch.stack([*run.of_memories(block), block.lm_log_probs])
        for block in scorer.blocks(progress, "tune weights", ensemble.needs_lm)
    ]
    log_probs = torch.cat(blocks, dim=1).double()
    likelihood = (log_probs - log_probs.amax(0)).exp().T
    weights = best_shares(likelihood.numpy())
    mixed = (log_probs + torch.from_numpy(weights).log()[:, None]).logsumexp(0)
    return TunedWeights(
        # Down, since a sum above 1 is no mixture.
        tuple(floor(weight * 1e4) / 1e4 for weight in weights[:-1].tolist()),
        -float(mixed.mean()),
        -float(log_probs[-1].mean()),
        log_probs.shape[1],
    )
