"""Find a method's settings on held-out text, or train its gate, and store them in the memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearest.build.build import check_writable, store_settings
from nearest.encode.identity import AnyModel
from nearest.errors import NearestError, NotStoredError, SettingError
from nearest.memory import Memory
from nearest.models.in_context import Reader, reader_of
from nearest.models.method_run import MethodRun
from nearest.models.scoring import ScoredBlock, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.distribution import Component
from nearest.retrieval.gates.adaptret import fit_adaptret
from nearest.retrieval.gates.buckets import fit_buckets
from nearest.retrieval.gates.fit_mixture import fit_mixture
from nearest.retrieval.gates.gate import Examples, FixedGate, StoredGate
from nearest.retrieval.gates.guard import gained, gained_before, guarded
from nearest.retrieval.gates.meta_k import fit_meta_k
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate
from nearest.retrieval.gates.shipped import shipped_gate
from nearest.retrieval.gates.stored import load_gate, to_store
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import (
    BASE,
    IN_CONTEXT,
    Settings,
    as_stored,
    check_method,
    method_named,
    passage_settings,
    resolve_settings,
)
from nearest.store.tuned import found_on
from nearest.verbs.mixture_examples import mixture_examples
from nearest.verbs.settings_search import Grid, Tuned, best_settings, looked_up

_MUCH = 20_000  # tokens, from which a gate learns as much with no other to start from


@dataclass(frozen=True)
class TunedGate:
    """A trained gate with the settings it goes with; nll in nats, of the text it was trained on."""

    method: str
    settings: Settings
    gate: StoredGate = field(repr=False)
    nll: float
    base_nll: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The settings stored beside the gate."""
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
    start: Memory | None = None,
    store: bool = True,
    progress: Progress = no_progress,
    **fixed: Any,
) -> Tuned | TunedGate:
    """Find the settings with the lowest nll on documents that are not to be scored later.

    λ and the temperature are swept; with them k for kNN-LM (of the candidates for the largest k),
    and length_power for the methods that weigh by match length. For a method with a gate, such as
    "knn+mixture" or "hybrid", the gate is trained instead.

    Args:
        model, memory, documents, tokenizer, window, stride, batch_size, force, leave_one_out,
            progress: as in `evaluate`.
        method: one that uses the memory.
        start: a memory whose gate for this method is learned on from, so that a few thousand tokens
            of one's own do; of any corpus and model. Only for gates of the kind "mixture". "hybrid"
            learns on from the gate that ships if no other is given and the text has fewer than
            20,000 tokens, which say enough themselves.
        store: write the result into the memory's folder, where `attach` and `evaluate` find it.
            `memory` itself takes it over.
        **fixed: settings that are not swept, such as distances, min_knns, max_knns, dedup,
            suffix_k.

    Raises:
        NotStoredError: the result cannot be stored; the error's `tuned` holds it.
        NearestError: model, memory, text or settings cannot be used.
    """
    given = {name: value for name, value in fixed.items() if value is not None}
    resolved = settings_to_tune(method, memory, given)
    begin = None if start is None else _gate_to_start(start, method)
    if store:
        check_writable(memory.path)
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
    passages = resolved if method_named(method).in_context else None
    reader = reader_of(scorer, [memory], passages)
    if passages is not None:
        given |= passage_settings(passages)
    tuned: Tuned | TunedGate
    if method_named(method).gate is None:
        grid = Grid.of(memory, method, given)
        blocks, total = reader.blocks(progress, "read"), scorer.text.predictions
        examples = looked_up(grid.lookup, blocks, progress, f"tune {method}", total)
        tuned = best_settings(grid, examples)
    else:
        tuned = _train(reader, memory, method, given, progress, begin)
    if store:
        store_tuned(memory, tuned)
    return tuned


@runtime_checkable
class Found(Protocol):
    """What tuning finds, whatever it goes by."""

    @property
    def method(self) -> str:
        """The method that it is for."""

    def to_dict(self) -> dict[str, Any]:
        """The result as it is stored in the memory."""


def store_tuned(memory: Memory, tuned: Found) -> None:
    """Write what was tuned into the memory's folder; `memory` takes it over.

    Raises:
        NotStoredError: it cannot be written; the error's `tuned` holds it.
    """
    method = tuned.method
    gate = to_store(tuned.gate, memory, method) if isinstance(tuned, TunedGate) else None
    settings = {**tuned.to_dict(), **found_on(memory.manifest)}
    try:
        store_settings(memory.path, method, settings, gate, found_in=memory.manifest)
    except (NearestError, OSError) as error:
        raise NotStoredError(
            f"what was found for {method} could not be stored ({error}): {tuned.to_dict()}. Mend "
            "that and store it with `store_tuned(memory, error.tuned)`, or tune again",
            tuned,
        ) from error
    memory.take_over_settings()


def _shipped_for(method: str) -> MixtureGate | None:
    """The gate that ships, where it looks at what the method's does."""
    chosen = method_named(method)
    if chosen.gate != "mixture":
        return None
    shipped = shipped_gate()
    alike = shipped.config.alike(MixtureConfig.over(chosen.weighed, 1.0))
    return shipped if alike and (shipped.search is not None) == chosen.asks else None


def _gate_to_start(memory: Memory, method: str) -> MixtureGate:
    gate = load_gate(memory, method)
    if not isinstance(gate, MixtureGate):
        raise SettingError(
            f"{method} has no gate that another can start from: choose hybrid, or a method with "
            "the gate mixture"
        )
    return gate


@runtime_checkable
class _Fit(Protocol):
    def __call__(self, examples: Iterable[Examples], *, progress: Progress) -> StoredGate: ...


_PUBLISHED: Mapping[str, _Fit] = {
    "buckets": fit_buckets,
    "meta-k": fit_meta_k,
    "adaptret": fit_adaptret,
}


def settings_to_tune(method: str, memory: Memory, given: dict[str, Any]) -> Settings:
    """The settings that tuning a method begins with; what is given is not swept.

    Raises:
        SettingError: the method has nothing to tune or is none, or a setting is one that is found,
            unknown or out of range.
    """
    if method in (BASE, IN_CONTEXT):
        raise SettingError(f"{method} has nothing that tuning finds: name another method")
    check_method(method)
    if swept := {"lam", "temperature"} & set(given):
        raise SettingError(f"{min(swept)} is what tuning finds: leave it out")
    return resolve_settings(method, memory, **given)


def _train(
    scorer: Reader,
    memory: Memory,
    method: str,
    given: dict[str, Any],
    progress: Progress,
    begin: MixtureGate | None,
) -> TunedGate:
    """Train the method's gate on the text, looked up as the method does."""
    chosen = method_named(method)
    settings = replace(Settings(**chosen.defaults), **given)
    if "dense" in chosen.kinds:
        settings = replace(settings, k=min(settings.k, memory.entries))
    blocks = list(scorer.blocks(progress, "read", with_view=True))
    if chosen.gate in _PUBLISHED:
        gate, log_probs = _train_published(memory, method, settings, blocks, progress)
    else:
        if begin is None and sum(len(block.targets) for block in blocks) < _MUCH:
            begin = _shipped_for(method)
        gate, log_probs = _train_mixture(memory, method, settings, blocks, progress, begin)
    base = torch.cat([block.lm_log_probs for block in blocks])
    nlls = -log_probs.double().mean(), -base.double().mean()
    return TunedGate(method, settings, gate, float(nlls[0]), float(nlls[1]), len(base))


def _train_published(
    memory: Memory,
    method: str,
    settings: Settings,
    blocks: Sequence[ScoredBlock],
    progress: Progress,
) -> tuple[StoredGate, Float[Tensor, " n"]]:
    """The gate, and its log-probabilities of the text's tokens."""
    total = sum(len(block.targets) for block in blocks)
    everywhere = FixedGate(Component(("dense",), 1.0), 0.0)
    lookup = Lookup(memory, method, settings, everywhere)
    examples = looked_up(lookup, blocks, progress, "look up", total)
    gate = _PUBLISHED[str(method_named(method).gate)](examples, progress=progress)
    run, log_probs, done = MethodRun(Lookup(memory, method, settings, gate)), [], 0
    for block in blocks:
        log_probs.append(run.log_probs(block))
        done += len(block.targets)
        progress(f"score {method}", done, total)
    return gate, torch.cat(log_probs)


def _train_mixture(
    memory: Memory,
    method: str,
    settings: Settings,
    blocks: Sequence[ScoredBlock],
    progress: Progress,
    begin: MixtureGate | None = None,
) -> tuple[StoredGate, Float[Tensor, " n"]]:
    """The gate, and its log-probabilities of the text's tokens.

    Where the gate decides about searches, it is trained, and judged, at states to which random
    decisions have led.
    """
    unit, ways = mixture_examples(memory, method, settings, blocks, progress)
    config = MixtureConfig.over(method_named(method).weighed, unit)
    skip = settings.skip if method_named(method).asks else None
    gate, mixed = fit_mixture(config, ways, skip, progress, begin)
    if settings.guard:
        base = torch.cat([block.lm_log_probs for block in blocks])
        sequences = np.concatenate([block.sequences for block in blocks])
        mixed = guarded(base, mixed, gained_before(gained(base, mixed), sequences))
    return gate, mixed
