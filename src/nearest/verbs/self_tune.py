"""Find a memory's settings on its own text, so that one that nobody tuned predicts well.

A sample of its documents is predicted as if they were not in it: without any of their own entries.
A document that stands in the memory nearly word for word a second time says nothing about text that
the memory has not seen, and is not in the sample.

Hybrid's gate learns on from the one that ships. Where there is too little text for that, its
networks stay as they are and the text tells them what distances mean here, be it of one document:
then each prediction is made as if its own entry, not its document, were not there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from nearest.build.build import store_settings
from nearest.encode.identity import AnyModel
from nearest.memory import Memory
from nearest.models.scoring import ReadText, read_text
from nearest.progress import Progress, no_progress
from nearest.retrieval.candidates import KINDS, Candidates
from nearest.retrieval.gates.fit_mixture import fit_mixture
from nearest.retrieval.gates.gate import Examples
from nearest.retrieval.gates.mixture import MixtureConfig, MixtureGate
from nearest.retrieval.gates.shipped import adapted, shipped_gate
from nearest.retrieval.gates.stored import to_store
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import Settings, as_stored, method_named
from nearest.store.tuned import SELF_TUNED, found_on
from nearest.verbs.mixture_examples import mixture_examples
from nearest.verbs.settings_search import Grid, best_settings, looked_up

_PREDICTIONS = 10_000  # of the sample, or a tenth of the memory's, but
_FEW_PREDICTIONS = 2_000  # if there are so many
_LEAST_PREDICTIONS = 200  # fewer say too little
_LEAST_DOCUMENTS = 5
_LONGEST = 2_000  # tokens that are read of a document
_SPARE = 512  # candidates of a document's own that may be left out
# A document is a copy if more than half of its spans of so many tokens stand elsewhere, too.
_SPAN = 24
_COPIED = 0.5
_MATCHES = 64  # that are looked at to tell


def self_tune(
    model: AnyModel,
    memory: Memory,
    tokenizer: Any = None,
    progress: Progress = no_progress,
    gate: MixtureGate | None = None,
) -> bool:
    """Store settings of "knn" and "suffix" found on the memory's own text, and a gate of "hybrid".

    `memory` takes them over. Returns whether anything was stored: nothing where entries were merged
    and so cannot be left out. A memory with little text has "hybrid" alone, one without keys
    "suffix" alone.

    Args:
        model, tokenizer: those that built the memory.
        memory: it has no settings that are to be kept.
        progress: told (stage, done, total).
        gate: that hybrid gets, trained for other memories; the one that ships if not given.

    Raises:
        NearestError: the model does not fit, or the folder cannot be written.
    """
    if memory.has_weights:
        return False
    sample = _Sample.of(model, memory, tokenizer, progress)
    has_keys = memory.manifest.keys is not None
    if sample.enough:
        for method in ("knn", "suffix") if has_keys else ("suffix",):
            _store(memory, method, _constants(memory, method, sample, progress))
    if has_keys and sample.read.text.predictions:
        settings = Settings(**method_named("hybrid").defaults)
        own_gate = _gate(memory, settings, sample, gate or shipped_gate(), progress)
        _store(memory, "hybrid", as_stored(settings, "hybrid"), own_gate)
    elif not sample.enough:
        return False
    memory.take_over_settings()
    return True


def _store(
    memory: Memory, method: str, settings: dict[str, Any], gate: MixtureGate | None = None
) -> None:
    stored = {**settings, **found_on(memory.manifest), SELF_TUNED: True}
    new_gate = None if gate is None else to_store(gate, memory, method)
    store_settings(memory.path, method, stored, new_gate, found_in=memory.manifest)


@dataclass(frozen=True)
class _Sample:
    """Some documents as the model reads them.

    Attributes:
        read: their text.
        own: which entries are each one's own, from one on and below another.
        kept: which are no copies.
        enough: whether they tell how text is predicted that the memory does not hold.
    """

    read: ReadText
    own: Int[np.ndarray, "documents 2"]
    kept: Bool[np.ndarray, " documents"]
    enough: bool

    @classmethod
    def of(cls, model: AnyModel, memory: Memory, tokenizer: Any, progress: Progress) -> "_Sample":
        """The first documents in a random order, until there are predictions enough."""
        most = min(_PREDICTIONS, max(_FEW_PREDICTIONS, memory.entries // 10))
        texts: list[Any] = []
        own, predictions = [], 0
        for number in np.random.default_rng(0).permutation(memory.documents).tolist():
            entries = memory.entries_of(number)
            if memory.manifest.model.reads_sources:
                texts.append(memory.document(number))
            else:
                texts.append(memory.document_tokens(number)[:_LONGEST].astype(np.int64))
            own.append((entries.start, entries.stop))
            predictions += min(len(entries), _LONGEST)
            if predictions >= most:
                break
        read = read_text(model, memory, texts, tokenizer=tokenizer, progress=progress)
        kept = ~_copied(memory, read, np.array(own))
        left = sum(int(kept[block.documents].sum()) for block in read.read)
        enough = memory.documents >= _LEAST_DOCUMENTS and left >= _LEAST_PREDICTIONS
        return cls(read, np.array(own), kept, enough)

    def left(self, one: Examples, settings: Settings) -> Examples:
        """Predictions as if the memory did not hold them, with candidates as `settings` say.

        As if it did not hold their documents; where these are too few, their own entries.
        """
        if self.enough:
            kept = self.kept[one.documents]
            return _held_out(one, self.own[one.documents], kept, settings)
        entries = _own_entry(one, self.own, self.read)
        return _held_out(one, entries, np.ones(len(entries), dtype=bool), settings)


def _constants(memory: Memory, method: str, sample: _Sample, progress: Progress) -> dict[str, Any]:
    """λ, temperature and what else is the same for all predictions."""
    grid = Grid.of(memory, method, {})
    narrow = grid.lookup.settings
    lookup = Lookup(memory, method, _wider(narrow, memory, grid.lookup.kinds))
    total = sample.read.text.predictions
    found = looked_up(lookup, sample.read.read, progress, f"self-tune {method}", total)
    tuned = best_settings(replace(grid, lookup=lookup), (sample.left(one, narrow) for one in found))
    return replace(tuned, settings=replace(tuned.settings, suffix_k=narrow.suffix_k)).to_dict()


def _gate(
    memory: Memory, settings: Settings, sample: _Sample, begin: MixtureGate, progress: Progress
) -> MixtureGate:
    """A gate for hybrid that learns on from another where there is text enough."""
    wider = _wider(settings, memory, method_named("hybrid").kinds)
    unit, ways = mixture_examples(
        memory, "hybrid", wider, sample.read.read, progress, partial(sample.left, settings=settings)
    )
    if not sample.enough:
        return adapted(begin, unit, (before.view for _, before in ways))
    config = MixtureConfig.over(begin.config.kinds, unit)
    return fit_mixture(config, ways, settings.skip, progress, begin)[0]


def _copied(
    memory: Memory, read: ReadText, own: Int[np.ndarray, "documents 2"]
) -> Bool[np.ndarray, " documents"]:
    """Which documents stand in others almost entirely; none of them if that is so of all."""
    elsewhere, tokens = np.zeros(len(own)), np.zeros(len(own))
    for block in read.read:
        queries = block.queries
        found = memory.longest_matches(queries.context, queries.ends, _MATCHES)
        lengths = np.where(_of_own(found.ids, own[block.documents]), 0, found.lengths)
        np.add.at(elsewhere, block.documents, lengths.max(axis=1, initial=0) >= _SPAN)
        np.add.at(tokens, block.documents, 1)
    copied: Bool[np.ndarray, " documents"] = elsewhere > _COPIED * tokens
    return copied & ~copied.all()


def _wider(settings: Settings, memory: Memory, kinds: Sequence[str]) -> Settings:
    """The same settings with more candidates, so that a document's own can be dropped."""
    if "dense" in kinds:
        k = min(settings.k + _SPARE, memory.entries)
        settings = replace(settings, k=k, rerank=max(settings.rerank, k))
    if "suffix" in kinds:
        settings = replace(settings, suffix_k=settings.suffix_k + _SPARE)
    return settings


def _held_out(
    one: Examples,
    own: Int[np.ndarray, "q 2"],
    kept: Bool[np.ndarray, " q"],
    settings: Settings,
) -> Examples:
    """As if each prediction's `own` entries, from one on and below another, were not there.

    Only predictions that are `kept` are left, and of their candidates as many as `settings` say.
    """
    found = one.view.candidates.rows(kept)
    passed = _of_own(found.ids, own[kept])
    most = {"dense": settings.k, "pointers": settings.max_knns, "suffix": settings.suffix_k}
    orders = []
    for kind in KINDS[: len(found.columns)]:
        columns = found.of(kind)
        order = np.argsort(passed[:, columns], axis=1, kind="stable")[:, : most.get(kind)]
        orders.append(order + columns.start)
    every = np.concatenate(orders, axis=1)
    ids, values, distances, lengths = (
        np.take_along_axis(array, every, axis=1) for array in found.without(passed)[:4]
    )
    columns_left = tuple(order.shape[1] for order in orders)
    candidates = Candidates(ids, values, distances, lengths, columns_left, found.searched)
    view = one.view._replace(queries=one.view.queries.rows(kept), candidates=candidates)
    return Examples(
        one.rows[kept], view, one.targets[kept], one.lm_log_probs[kept], one.documents[kept]
    )


def _own_entry(
    one: Examples, own: Int[np.ndarray, "documents 2"], read: ReadText
) -> Int[np.ndarray, "q 2"]:
    """The entry that each prediction is itself, as the one from it on and below the next."""
    predictions = [len(tokens) - 1 for tokens in read.text.documents]
    first = np.cumsum([0, *predictions])[one.documents]
    entries = own[one.documents, 0] + one.rows - first
    return np.stack([entries, entries + 1], axis=1)


def _of_own(ids: Int[np.ndarray, "q c"], own: Int[np.ndarray, "q 2"]) -> Bool[np.ndarray, "q c"]:
    return (ids >= own[:, :1]) & (ids < own[:, 1:])
