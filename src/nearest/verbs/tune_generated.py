"""Find a method's settings by what the model writes with them, not by the loss of given texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nearest.build.build import check_writable
from nearest.corpus.incoming import Documents
from nearest.encode.identity import AnyModel, bare_model
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.scoring import own_tokenizer
from nearest.progress import Progress, no_progress
from nearest.retrieval.gates.fitting import COARSE_TEMPERATURES, KS
from nearest.retrieval.settings import (
    BASE,
    MEMORY_METHODS,
    Settings,
    as_stored,
    check_method,
    method_named,
)
from nearest.verbs.text_metrics import metrics_named, scores_of
from nearest.verbs.tune import store_tuned, tune
from nearest.verbs.written import read_pairs, write

LAMS = tuple(n / 10 for n in range(1, 10))
_ROUNDS = 3


@dataclass(frozen=True)
class TunedByText:
    """The settings whose texts score best; `tried` are all that were, in order, with scores."""

    method: str
    settings: Settings
    metric: str
    score: float
    base_score: float
    tried: list[tuple[Settings, float]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as it is stored in the memory."""
        return {
            **as_stored(self.settings, self.method),
            "tuned_by": self.metric,
            "tuned_score": self.score,
            "tuned_base_score": self.base_score,
        }


def tune_generated(
    model: AnyModel,
    memory: Memory,
    documents: Documents,
    *,
    method: str = "knn",
    metric: str = "bleu",
    max_new_tokens: int = 128,
    num_beams: int = 1,
    tokenizer: Any = None,
    batch_size: int | None = None,
    force: bool = False,
    store: bool = True,
    progress: Progress = no_progress,
    **fixed: Any,
) -> TunedByText:
    """Find λ, the temperature and k by BLEU or another metric of texts written on held-out sources.

    The search begins at the settings of the lowest nll. Then λ, temperature and k are tried in
    turns, the others as they are best so far (λ from 0.1 to 0.9; the next temperatures and k on
    either side), until a round finds nothing better. Each try writes all texts.

    Args:
        model, memory, documents, max_new_tokens, num_beams, tokenizer, batch_size, force, progress:
            as in `evaluate_generated`.
        method: one with a fixed λ.
        metric: "bleu", "chrf", "rougeL" or another that `evaluate_generated` reports.
        store: write the result into the memory's folder; `memory` takes it over.
        **fixed: settings that are not searched.

    Raises:
        NearestError: model, memory, text or settings cannot be used.
    """
    check_method(method, MEMORY_METHODS)
    if method_named(method).gate is not None:
        raise SettingError(
            f"the gate of {method} is trained by the texts' probabilities: tune it by nll, or a "
            "method with a fixed λ by a metric"
        )
    package = "rouge" if metric.startswith("rouge") else metric
    chosen = {one.name: one for one in metrics_named([package])}
    if metric not in chosen:
        raise SettingError(f"one figure is needed to tune by: choose {' or '.join(chosen)}")
    if store:
        check_writable(memory.path)
    model = bare_model(model)
    tokenizer = tokenizer or own_tokenizer(model)
    if isinstance(documents, Iterator):  # it is read twice
        documents = list(documents)
    pairs = read_pairs(model, tokenizer, documents, max_new_tokens)
    options = {"tokenizer": tokenizer, "batch_size": batch_size, "force": force}
    begun = tune(model, memory, documents, method=method, store=False, **options, **fixed).settings

    def score(name: str, settings: Settings | None) -> float:
        written = write(
            model,
            tokenizer,
            memory,
            pairs,
            name,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            batch_size=batch_size,
            force=force,
            settings=settings,
            progress=progress,
        )
        return scores_of(chosen[metric], [written.texts], pairs.references)[0].value

    base_score = score(BASE, None)
    settings, best, tried = _climb(
        begun, [*_searched(method, memory, fixed)], lambda settings: score(method, settings)
    )
    tuned = TunedByText(method, settings, metric, best, base_score, tried)
    if store:
        store_tuned(memory, tuned)
    return tuned


def _searched(
    method: str, memory: Memory, fixed: dict[str, Any]
) -> list[tuple[str, Callable[[Settings], Sequence[float]]]]:
    """The settings that are searched, and for each what is tried beside one setting's value."""
    found: list[tuple[str, Callable[[Settings], Sequence[float]]]] = [
        ("lam", lambda _: LAMS),
        ("temperature", lambda settings: _beside(settings.temperature, COARSE_TEMPERATURES)),
    ]
    if "k" in method_named(method).settings and fixed.get("k") is None:
        ks = sorted({min(k, memory.entries) for k in KS})
        found.append(("k", lambda settings: _beside(settings.k, ks)))
    return found


def _beside(value: float, values: Sequence[float]) -> list[float]:
    """The next smaller and the next larger value, where there are such."""
    smaller = [other for other in values if other < value]
    larger = [other for other in values if other > value]
    return [*smaller[-1:], *larger[:1]]


def _climb(
    begun: Settings,
    searched: Sequence[tuple[str, Callable[[Settings], Sequence[float]]]],
    score: Callable[[Settings], float],
) -> tuple[Settings, float, list[tuple[Settings, float]]]:
    """The best settings that single steps lead to, their score, and all that were tried."""
    known = {begun: score(begun)}
    best = begun
    for _ in range(_ROUNDS):
        before = best
        for name, values in searched:
            for value in values(best):
                changed: dict[str, Any] = {name: value}
                one = replace(best, **changed)
                if one not in known:
                    known[one] = score(one)
            best = max(known, key=lambda settings: known[settings])
        if best == before:
            break
    return best, known[best], list(known.items())
