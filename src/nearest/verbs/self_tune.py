"""Find a memory's settings on its own text, so that one that nobody tuned predicts well.

A sample of its documents is predicted as if they were not in it: without any of their own entries.
A document that makes up much of the memory is sampled in parts, each as if neither it nor those
beside it were there: without a whole book, a memory of little else would be empty. What stands in
the memory nearly word for word a second time says nothing about text that the memory has not seen,
and is not in the sample.

Hybrid's gate learns on from the one that ships. Where there is too little text for that, its
networks stay as they are and the text tells them what distances mean here: then each prediction is
made as if its own entry alone were not there.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

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
_LONGEST = 2_000  # tokens that are read of a document
_LARGEST = 0.2  # of the memory, that may be left out at once
_PART = 500  # tokens of the parts of a document that is larger
_SPARE = 512  # candidates of a piece's own that may be left out
# A piece is a copy if more than half of its spans of so many tokens stand elsewhere, too.
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


class _Piece(NamedTuple):
    """Tokens of a document, and what is left out while they are predicted.

    Attributes:
        document: its number.
        tokens: which of its tokens are read.
        first: the entry that their first prediction is.
        own: the entries that are left out, from one on and below another.
    """

    document: int
    tokens: slice
    first: int
    own: tuple[int, int]


def _pieces(memory: Memory, number: int, most: int) -> Iterator[_Piece]:
    """A document as one piece; of a large one its share of `most` predictions, in parts."""
    entries = memory.entries_of(number)
    start, stop = entries.start, entries.stop
    share = len(entries) / max(memory.entries, 1)
    if share <= _LARGEST or memory.manifest.model.reads_sources:
        yield _Piece(number, slice(_LONGEST), start, (start, stop))
        return
    parts = np.random.default_rng(number).permutation(math.ceil(len(entries) / _PART))
    for part in parts[: math.ceil(share * most / _PART)].tolist():
        first = part * _PART
        own = max(start + first - _PART, start), min(start + first + 2 * _PART, stop)
        yield _Piece(number, slice(first, first + _PART + 1), start + first, own)


@dataclass(frozen=True)
class _Sample:
    """Some pieces of documents as the model reads them.

    Attributes:
        read: their text.
        pieces: where it stands in the memory.
        kept: which tell how text is predicted that the memory does not hold: no copies, and none
            without which little of the memory is left.
    """

    read: ReadText
    pieces: list[_Piece]
    kept: Bool[np.ndarray, " pieces"]

    @classmethod
    def of(cls, model: AnyModel, memory: Memory, tokenizer: Any, progress: Progress) -> "_Sample":
        """Pieces of documents in a random order, until there are predictions enough."""
        most = min(_PREDICTIONS, max(_FEW_PREDICTIONS, memory.entries // 10))
        documents = np.random.default_rng(0).permutation(memory.documents).tolist()
        pieces: list[_Piece] = []
        texts: list[Any] = []
        predictions = 0
        for piece in itertools.chain.from_iterable(
            _pieces(memory, number, most) for number in documents
        ):
            tokens = memory.document_tokens(piece.document)[piece.tokens].astype(np.int64)
            reads_sources = memory.manifest.model.reads_sources
            texts.append(memory.document(piece.document) if reads_sources else tokens)
            pieces.append(piece)
            predictions += len(tokens) - 1
            if predictions >= most:
                break
        read = read_text(model, memory, texts, tokenizer=tokenizer, progress=progress)
        own = _own(pieces)
        small = own[:, 1] - own[:, 0] <= _LARGEST * memory.entries
        return cls(read, pieces, small & ~_copied(memory, read, own))

    @cached_property
    def enough(self) -> bool:
        """Whether what is kept has predictions enough."""
        left = sum(int(self.kept[block.documents].sum()) for block in self.read.read)
        return left >= _LEAST_PREDICTIONS

    def left(self, one: Examples, settings: Settings) -> Examples:
        """Predictions as if the memory did not hold them, with candidates as `settings` say.

        As if it did not hold their pieces; where these are too few, their own entries.
        """
        if self.enough:
            kept = self.kept[one.documents]
            return _held_out(one, _own(self.pieces)[one.documents], kept, settings)
        entries = self.entries(one)
        return _held_out(one, entries, np.ones(len(entries), dtype=bool), settings)

    def entries(self, one: Examples) -> Int[np.ndarray, "q 2"]:
        """The entry that each prediction is itself, as the one from it on and below the next."""
        predictions = [len(tokens) - 1 for tokens in self.read.text.documents]
        before = np.cumsum([0, *predictions])[one.documents]
        first = np.array([piece.first for piece in self.pieces])[one.documents]
        entries = first + one.rows - before
        return np.stack([entries, entries + 1], axis=1)


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


def _own(pieces: list[_Piece]) -> Int[np.ndarray, "pieces 2"]:
    return np.array([piece.own for piece in pieces])


def _copied(
    memory: Memory, read: ReadText, own: Int[np.ndarray, "pieces 2"]
) -> Bool[np.ndarray, " pieces"]:
    """Which pieces stand in others almost entirely; none of them if that is so of all."""
    elsewhere, tokens = np.zeros(len(own)), np.zeros(len(own))
    for block in read.read:
        queries = block.queries
        found = memory.longest_matches(queries.context, queries.ends, _MATCHES)
        lengths = np.where(_of_own(found.ids, own[block.documents]), 0, found.lengths)
        np.add.at(elsewhere, block.documents, lengths.max(axis=1, initial=0) >= _SPAN)
        np.add.at(tokens, block.documents, 1)
    copied: Bool[np.ndarray, " pieces"] = elsewhere > _COPIED * tokens
    return copied & ~copied.all()


def _wider(settings: Settings, memory: Memory, kinds: Sequence[str]) -> Settings:
    """The same settings with more candidates, so that a piece's own can be dropped."""
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


def _of_own(ids: Int[np.ndarray, "q c"], own: Int[np.ndarray, "q 2"]) -> Bool[np.ndarray, "q c"]:
    return (ids >= own[:, :1]) & (ids < own[:, 1:])
