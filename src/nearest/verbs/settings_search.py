"""Search a method's λ, temperature and k: look up once, then compute a grid as arrays."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.memory import Memory
from nearest.models.scoring import ScoredBlock
from nearest.progress import Progress
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.distribution import Component, component_probs
from nearest.retrieval.gates.fitting import KS, TEMPERATURES, best_lams, nll
from nearest.retrieval.gates.gate import Examples, View
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import Settings, as_stored, method_named
from nearest.retrieval.step import State, Step, steps

LAMS = tuple(i / 50 for i in range(50))  # 0, .02, … .98: finer ones differ by less than text does
LENGTH_POWERS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
_AT_ONCE = 512  # predictions


@dataclass(frozen=True)
class Tuned:
    """The best settings, and the grid that found them; nll in nats a token.

    `variants` are the values tried for one more setting of the method: k, or length_power. `nlls`
    and `lams` are those of the best λ at [temperature, variant]; `curves` are nlls of the best
    variant at [temperature, λ], with λ as in LAMS.
    """

    method: str
    settings: Settings
    nll: float
    base_nll: float
    tokens: int
    nlls: Float[np.ndarray, "temperatures variants"] = field(repr=False)
    lams: Float[np.ndarray, "temperatures variants"] = field(repr=False)
    curves: Float[np.ndarray, "temperatures lams"] = field(repr=False)
    variant: str
    variants: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as it is stored in the memory."""
        return {
            **as_stored(self.settings, self.method),
            "tuned_nll": self.nll,
            "tuned_base_nll": self.base_nll,
            "tuned_tokens": self.tokens,
        }


@dataclass(frozen=True)
class Grid:
    """A grid search: the lookup with the most candidates, and what varies beside λ and T."""

    lookup: Lookup
    variant: str
    variants: tuple[float, ...]

    @classmethod
    def of(cls, memory: Memory, method: str, given: dict[str, Any]) -> "Grid":
        """The grid for a method, with the given settings fixed."""
        defaults = Settings(**method_named(method).defaults)
        known = method_named(method).settings
        widest = replace(defaults, **given)
        variant = ""
        variants: tuple[float, ...] = (0.0,)
        if "k" in known:
            widest = replace(widest, k=min(widest.k, memory.entries))
        if method_named(method).kinds == ("dense",) and "k" not in given:
            ks = sorted({min(k, memory.entries) for k in KS})
            variant, variants = "k", tuple(ks)
            widest = replace(widest, k=ks[-1], rerank=max(widest.rerank, ks[-1]))
        elif defaults.length_power > 0 and "length_power" not in given:
            variant, variants = "length_power", LENGTH_POWERS
        return cls(Lookup(memory, method, widest), variant, variants)

    def components(self, value: float) -> list[Component]:
        """One component per temperature, at one value of what varies."""
        power, first = self.lookup.settings.length_power, None
        if self.variant == "k":
            first = int(value)
        elif self.variant == "length_power":
            power = value
        return [Component(self.lookup.kinds, t, power, first) for t in TEMPERATURES]

    def settings(self, temperature: float, value: float, lam: float) -> Settings:
        """The settings of one point of the grid."""
        settings = replace(self.lookup.settings, temperature=temperature, lam=lam)
        if self.variant == "k":
            # It was chosen among the widest's candidates, and is to be fetched among as many.
            return replace(settings, k=int(value), rerank=int(self.variants[-1]))
        return replace(settings, length_power=value) if self.variant else settings


def best_settings(grid: Grid, examples: Iterable[Examples]) -> Tuned:
    """The grid point with the lowest nll on examples that `grid.lookup` found."""
    lm_parts, parts = [], []
    for one in examples:
        lm_parts.append(np.exp(one.lm_log_probs.astype(np.float64)))
        ways = [grid.components(value) for value in grid.variants]
        found = [component_probs(one.view.candidates, way, one.targets) for way in ways]
        parts.append(np.stack(found, axis=1).astype(np.float32))
    lm, probs = np.concatenate(lm_parts), np.concatenate(parts)
    points = [_best_on_grid(lm, probs[:, i].astype(np.float64)) for i in range(probs.shape[1])]
    lams, nlls = (np.stack(arrays, axis=1) for arrays in zip(*points, strict=True))
    t, v = np.unravel_index(int(np.nanargmin(nlls)), nlls.shape)
    of_best = probs[:, v].astype(np.float64)
    curves = [nll(lm, of_best, np.full(len(TEMPERATURES), lam)) / len(lm) for lam in LAMS]
    return Tuned(
        method=grid.lookup.method,
        settings=grid.settings(TEMPERATURES[t], grid.variants[v], float(lams[t, v])),
        nll=float(nlls[t, v]),
        base_nll=float(-np.log(lm).mean()),
        tokens=len(lm),
        nlls=nlls,
        lams=lams,
        curves=np.stack(curves, axis=1),
        variant=grid.variant,
        variants=grid.variants,
    )


def _best_on_grid(
    lm_probs: Float[np.ndarray, " n"], probs: Float[np.ndarray, "n temperatures"]
) -> tuple[Float[np.ndarray, " temperatures"], Float[np.ndarray, " temperatures"]]:
    """The best of LAMS at each temperature (next to the exact optimum), and its mean nll."""
    below = np.searchsorted(LAMS, best_lams(lm_probs, probs) + 1e-9) - 1
    around = [np.array(LAMS)[np.minimum(below + i, len(LAMS) - 1)] for i in range(2)]
    nlls = np.array([nll(lm_probs, probs, lams) for lams in around]) / len(lm_probs)
    better = nlls.argmin(axis=0)
    return np.choose(better, around), np.choose(better, nlls)


def looked_up(
    lookup: Lookup, blocks: Iterable[ScoredBlock], progress: Progress, stage: str, total: int
) -> Iterator[Examples]:
    """Every prediction of a text with its candidates, without any guard.

    `progress` is told the stage, how many were looked up, and that there are `total`.
    """
    states: dict[int, State] = {}
    first = done = 0
    for block in blocks:
        every = steps(
            lookup,
            block.queries,
            block.sequences,
            block.targets,
            block.lm_log_probs,
            states,
        )
        for some in _gathered(every):
            rows = np.concatenate([one.rows for one in some])
            candidates = Candidates.joined([one.prediction.candidates for one in some])
            yield Examples(
                first + rows,
                View(block.queries.rows(rows), candidates, lookup.memory),
                block.targets[rows],
                block.lm_log_probs.numpy()[rows],
                block.documents[rows],
            )
            done += len(rows)
            progress(stage, done, total)
        first += len(block.targets)


def _gathered(every: Iterable[Step]) -> Iterator[list[Step]]:
    """Steps of few predictions together, which then cost less each."""
    some: list[Step] = []
    count = 0
    for one in every:
        some.append(one)
        count += len(one.rows)
        if count >= _AT_ONCE:
            yield some
            some, count = [], 0
    if some:
        yield some
