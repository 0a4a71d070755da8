"""Find a method's settings on held-out text: retrieve once, then sweep as array mathematics."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from nearest.build.build import store_settings
from nearest.encode.identity import AnyModel
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.method_run import MethodRun
from nearest.models.scoring import ReadText, ScoredBlock, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.distribution import Component, component_probs, nll_over_lams
from nearest.retrieval.gates.adaptret import fit_adaptret
from nearest.retrieval.gates.buckets import fit_buckets
from nearest.retrieval.gates.fit_mixture import Trial, distance_unit, fit_mixture
from nearest.retrieval.gates.gate import StoredGate, View
from nearest.retrieval.gates.meta_k import fit_meta_k
from nearest.retrieval.gates.seen import Seen
from nearest.retrieval.gates.stored import to_store
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import (
    MEMORY_METHODS,
    Settings,
    as_stored,
    check_method,
    method_named,
    resolve_settings,
)
from nearest.retrieval.walk import Trails, walk

TEMPERATURES = tuple(round(2 ** (i / 2), 2) for i in range(-4, 25))  # 0.25 … 4096, by √2
LAMS = tuple(i / 50 for i in range(50))  # 0, .02, … .98
KS = (16, 64, 256, 1024)
_PUBLISHED: Mapping[str, Callable[[Iterable[Seen]], StoredGate]] = {
    "buckets": fit_buckets,
    "meta-k": fit_meta_k,
    "adaptret": fit_adaptret,
}
LENGTH_POWERS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class Tuned:
    """The best settings, and the whole sweep: nll in nats at [temperature, variant, λ].

    `variants` are the values tried for one more setting of the method: k, or length_power.
    """

    method: str
    settings: Settings
    nll: float
    base_nll: float
    tokens: int
    grid: Float[np.ndarray, "temperatures variants lams"] = field(repr=False)
    variant: str
    variants: tuple[float, ...]
    temperatures: tuple[float, ...] = TEMPERATURES
    lams: tuple[float, ...] = LAMS

    def as_json(self) -> dict[str, Any]:
        """What was found, as stored in the memory."""
        return {
            **as_stored(self.settings, self.method),
            "tuned_nll": self.nll,
            "tuned_base_nll": self.base_nll,
            "tuned_tokens": self.tokens,
        }


@dataclass(frozen=True)
class TunedGate:
    """A trained gate with the settings it goes with; nll in nats, of the text it was trained on."""

    method: str
    settings: Settings
    gate: StoredGate = field(repr=False)
    nll: float
    base_nll: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """What is stored in the memory beside the gate."""
        return {
            **as_stored(self.settings, self.method),
            "tuned_nll": self.nll,
            "tuned_base_nll": self.base_nll,
            "tuned_tokens": self.tokens,
        }


def tune(
    model: AnyModel,
    memory: Memory,
    documents: ScoredInput,
    *,
    method: str = "knn",
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    force: bool = False,
    leave_one_out: bool = False,
    store: bool = True,
    progress: Progress = no_progress,
    **fixed: Any,
) -> Tuned | TunedGate:
    """Find the settings with the lowest nll on documents that are not to be scored later.

    λ and the temperature are swept; with them k for kNN-LM (of the candidates for the largest k),
    and length_power for the methods that weigh by match length. For a method with a gate, such as
    "knn+mixture" or "hybrid", the gate is trained instead; the text's hidden states are then held
    in memory.

    Args:
        model, memory, documents, tokenizer, window, stride, batch_size, force, leave_one_out,
            progress: as in `evaluate`.
        method: one that uses the memory.
        store: write the result into the memory, where `attach` and `evaluate` find it; a memory
            opened before must be opened again to see it.
        **fixed: settings that are not swept, such as distances, min_knns, max_knns, dedup,
            suffix_k.

    Raises:
        NearestError: model, memory, text or settings cannot be used.
    """
    check_method(method, MEMORY_METHODS)
    if swept := {"lam", "temperature"} & {n for n, value in fixed.items() if value is not None}:
        raise SettingError(f"{min(swept)} is what tuning finds: leave it out")
    given = {name: value for name, value in fixed.items() if value is not None}
    resolve_settings(method, memory, **given)  # refuses what is unknown or out of range
    scorer = Scorer.prepare(
        model,
        memory,
        documents,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        batch_size=batch_size,
        force=force,
        leave_one_out=leave_one_out,
    )
    tuned: Tuned | TunedGate
    if method_named(method).gate is None:
        tuned = _sweep(scorer, memory, method, given, progress)
        gate = None
    else:
        tuned = _train(scorer, memory, method, given, progress)
        gate = to_store(tuned.gate, method)
    if store:
        store_settings(memory.path, method, tuned.as_json(), gate)
    return tuned


def _sweep(
    scorer: Scorer | ReadText,
    memory: Memory,
    method: str,
    given: dict[str, Any],
    progress: Progress,
) -> Tuned:
    """Every temperature, λ and variant of one retrieval."""
    lookup, variant, variants = _sweep_of(method, memory, given)
    lm_probs, memory_probs = [], []
    trails: Trails = {}
    for block in scorer.blocks(progress, f"tune {method}"):
        probs = np.empty((len(block.targets), len(variants), len(TEMPERATURES)), np.float32)
        for rows, candidates in walk(lookup, block.queries, block.sequences, block.targets, trails):
            for i, value in enumerate(variants):
                power, first = lookup.settings.length_power, None
                if variant == "k":
                    first = int(value)
                elif variant == "length_power":
                    power = value
                components = [Component(lookup.kinds, t, power, first) for t in TEMPERATURES]
                probs[rows, i] = component_probs(candidates, components, block.targets[rows])
        memory_probs.append(torch.from_numpy(probs))
        lm_probs.append(block.lm_log_probs.double().exp())
    base = torch.cat(lm_probs)
    grid = _nll_grid(base, torch.cat(memory_probs))
    best = np.unravel_index(int(np.nanargmin(grid)), grid.shape)
    settings = replace(lookup.settings, temperature=TEMPERATURES[best[0]], lam=LAMS[best[2]])
    if variant == "k":
        # The best k was chosen among the widest's candidates, and is to be fetched among them.
        settings = replace(settings, k=int(variants[best[1]]), rerank=int(variants[-1]))
    elif variant == "length_power":
        settings = replace(settings, length_power=variants[best[1]])
    return Tuned(
        method=method,
        settings=settings,
        nll=float(grid[best]),
        base_nll=float(-base.log().mean()),
        tokens=len(base),
        grid=grid,
        variant=variant,
        variants=variants,
    )


def _train(
    scorer: Scorer | ReadText,
    memory: Memory,
    method: str,
    given: dict[str, Any],
    progress: Progress,
) -> TunedGate:
    """Train the method's gate on the text, looked up as the method does."""
    chosen = method_named(method)
    kinds, trained, asks = chosen.kinds, str(chosen.gate), chosen.asks
    settings = replace(Settings(**method_named(method).defaults), **given)
    if "dense" in kinds:
        settings = replace(settings, k=min(settings.k, memory.entries))
    blocks = list(scorer.blocks(progress, f"read for {method}", with_view=True))

    def seen(searched: float) -> Iterator[Seen]:
        return _looked_up(Lookup(memory, method, settings, Trial(kinds, searched)), blocks)

    gate: StoredGate
    if trained in _PUBLISHED:
        gate = _PUBLISHED[trained](seen(1.0))
    else:
        # With every search, with none, and with half of them, for states that a gate leads to.
        shares = (1.0, 0.0, 0.5) if asks else (1.0,)
        unit = distance_unit(seen(1.0))
        gate = fit_mixture(kinds, [seen(share) for share in shares], unit, asks)
    run = MethodRun(Lookup(memory, method, settings, gate))
    nll = -torch.cat([run.log_probs(block) for block in blocks]).double()
    base = -torch.cat([block.lm_log_probs for block in blocks]).double()
    return TunedGate(method, settings, gate, float(nll.mean()), float(base.mean()), len(base))


def _looked_up(lookup: Lookup, blocks: Sequence[ScoredBlock]) -> Iterator[Seen]:
    trails: Trails = {}
    first = 0
    for block in blocks:
        for rows, candidates in walk(lookup, block.queries, block.sequences, block.targets, trails):
            yield Seen(
                first + rows,
                View(block.queries.rows(rows), candidates, lookup.memory),
                block.targets[rows],
                block.lm_log_probs[rows].numpy(),
                block.documents[rows],
            )
        first += len(block.targets)


def _sweep_of(
    method: str, memory: Memory, given: dict[str, Any]
) -> tuple[Lookup, str, tuple[float, ...]]:
    """The widest retrieval, and what of it is varied beside temperature and λ."""
    defaults = Settings(**method_named(method).defaults)
    known = method_named(method).settings
    widest = replace(defaults, **given)
    if "k" in known:
        widest = replace(widest, k=min(widest.k, memory.entries))
    if method == "knn" and "k" not in given:
        ks = tuple(sorted({min(k, memory.entries) for k in KS}))
        widest = replace(widest, k=ks[-1], rerank=max(widest.rerank, ks[-1]))
        return Lookup(memory, method, widest), "k", ks
    if defaults.length_power > 0 and "length_power" not in given:
        return Lookup(memory, method, widest), "length_power", LENGTH_POWERS
    return Lookup(memory, method, widest), "", (0.0,)


def _nll_grid(
    base: Float[torch.Tensor, " n"], memory_probs: Float[torch.Tensor, "n variants temperatures"]
) -> Float[np.ndarray, "temperatures variants lams"]:
    """Mean nll of every combination, in float64."""
    variants, temperatures = memory_probs.shape[1:]
    lams = torch.tensor(LAMS, dtype=torch.float64)
    grid = np.empty((temperatures, variants, len(LAMS)))
    for variant in range(variants):
        for temperature in range(temperatures):
            probs = memory_probs[:, variant, temperature].double()
            grid[temperature, variant] = nll_over_lams(base, probs, lams).numpy()
    return grid
