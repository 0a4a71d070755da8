"""Find λ, temperature and k on held-out text: retrieve once, then sweep as array mathematics."""

import itertools
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from nearest.memory.memory import Memory
from nearest.memory.writer import store_settings
from nearest.models.scoring import ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.distribution import nll_over_lams, target_probs_on_grid
from nearest.retrieval.knn import MEMORY_METHODS, KnnSettings, check_method

TEMPERATURES = tuple(round(2 ** (i / 2), 2) for i in range(-4, 25))  # 0.25 … 4096, by √2
LAMS = tuple(i / 50 for i in range(50))  # 0, .02, … .98
KS = (16, 64, 256, 1024)
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Tuned:
    """The best settings, and the whole sweep: nll in nats at [temperature, k, λ]."""

    settings: KnnSettings
    nll: float
    base_nll: float
    tokens: int
    grid: Float[np.ndarray, "temperatures ks lams"] = field(repr=False)
    temperatures: tuple[float, ...] = TEMPERATURES
    ks: tuple[int, ...] = KS
    lams: tuple[float, ...] = LAMS

    def as_json(self) -> dict[str, Any]:
        """What was found, as stored in the memory."""
        return {
            **asdict(self.settings),
            "tuned_nll": self.nll,
            "tuned_base_nll": self.base_nll,
            "tuned_tokens": self.tokens,
        }


def tune(
    model: PreTrainedModel,
    memory: Memory,
    documents: ScoredInput,
    *,
    method: str = "knn",
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    distances: str = "keys",
    force: bool = False,
    store: bool = True,
    progress: Progress = no_progress,
) -> Tuned:
    """Find the settings with the lowest nll on documents that are not to be scored later.

    Args:
        model, memory, documents, tokenizer, window, stride, batch_size, force, progress: as in
            `evaluate`.
        method: "knn".
        distances: "keys" or "index".
        store: write the result into the memory, where `attach` and `evaluate` find it; a memory
            opened before must be opened again to see it.

    Raises:
        NearestError: model, memory, text or settings cannot be used.
    """
    check_method(method, MEMORY_METHODS)
    ks = tuple(sorted({min(k, memory.entries) for k in KS}))
    widest = KnnSettings(k=ks[-1], distances=distances, candidates=ks[-1])
    scorer = Scorer.prepare(
        model,
        memory,
        documents,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        batch_size=batch_size,
        force=force,
    )
    lm_probs, memory_probs = [], []
    for scored in scorer.batches(progress, "tune"):
        targets = torch.from_numpy(scored.batch.targets)
        for start in range(0, len(targets), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            found = memory.search(scored.keys[part].numpy(), widest.k, distances)
            matches = torch.from_numpy(memory.values(found.ids)) == targets[part][:, None]
            ascending = torch.from_numpy(found.distances)
            memory_probs.append(target_probs_on_grid(ascending, matches, TEMPERATURES, ks))
        lm_probs.append(scored.lm_log_probs.double().exp())
    base = torch.cat(lm_probs)
    grid = _sweep(base, torch.cat(memory_probs))
    best = np.unravel_index(int(np.nanargmin(grid)), grid.shape)
    tuned = Tuned(
        # The best k was chosen among the widest's candidates, and is to be fetched among them.
        settings=replace(
            widest, lam=LAMS[best[2]], temperature=TEMPERATURES[best[0]], k=ks[best[1]]
        ),
        nll=float(grid[best]),
        base_nll=float(-base.log().mean()),
        tokens=len(base),
        grid=grid,
        ks=ks,
    )
    if store:
        store_settings(memory.path, method, tuned.as_json())
    return tuned


def _sweep(
    base: Float[torch.Tensor, " n"], memory_probs: Float[torch.Tensor, "n temperatures ks"]
) -> Float[np.ndarray, "temperatures ks lams"]:
    """Mean nll of every combination, in float64."""
    shape = memory_probs.shape[1:]
    lams = torch.tensor(LAMS, dtype=torch.float64)
    grid = np.empty((*shape, len(LAMS)))
    for i, j in itertools.product(*map(range, shape)):
        grid[i, j] = nll_over_lams(base, memory_probs[:, i, j].double(), lams).numpy()
    return grid
