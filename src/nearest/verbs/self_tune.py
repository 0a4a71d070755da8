"""Find a memory's settings on its own text, so that one that nobody tuned predicts well.

A sample of its documents is predicted as if they were not in it: without any of their own entries.
A document that stands in the memory nearly word for word a second time says nothing about text that
the memory has not seen, and is not in the sample.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from nearest.build.build import store_settings
from nearest.encode.identity import AnyModel
from nearest.memory import Memory
from nearest.models.scoring import ReadText, read_text
from nearest.progress import Progress, no_progress
from nearest.retrieval.candidates import Candidates
from nearest.retrieval.gates.gate import Examples
from nearest.retrieval.lookup import Lookup
from nearest.store.tuned import SELF_TUNED, found_on
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
    model: AnyModel, memory: Memory, tokenizer: Any = None, progress: Progress = no_progress
) -> bool:
    """Store settings of "knn" and "suffix" found on the memory's own text.

    `memory` takes them over. Returns whether that was done: not where the memory has too little
    text, or where entries were merged and so cannot be left out.

    Args:
        model, tokenizer: those that built the memory.
        memory: it has no settings that are to be kept.
        progress: told (stage, done, total).

    Raises:
        NearestError: the model does not fit, or the folder cannot be written.
    """
    if memory.documents < _LEAST_DOCUMENTS or memory.has_weights:
        return False
    read, own = _sample(model, memory, tokenizer, progress)
    kept = ~_copied(memory, read, own)
    total = read.text.predictions
    if total < _LEAST_PREDICTIONS:
        return False
    if sum(int(kept[block.documents].sum()) for block in read.read) < _LEAST_PREDICTIONS:
        return False
    for method in ("suffix",) if memory.manifest.keys is None else ("knn", "suffix"):
        grid = Grid.of(memory, method, {})
        narrow = grid.lookup.settings
        most = narrow.k if method == "knn" else narrow.suffix_k
        wide = _wider(grid)
        examples = looked_up(wide.lookup, read.read, progress, f"self-tune {method}", total)
        tuned = best_settings(wide, (_held_out(one, own, kept, most) for one in examples))
        settings = replace(tuned.settings, suffix_k=narrow.suffix_k)
        stored = replace(tuned, settings=settings).to_dict()
        stored = {**stored, **found_on(memory.manifest), SELF_TUNED: True}
        store_settings(memory.path, method, stored, found_in=memory.manifest)
    memory.take_over_settings()
    return True


def _sample(
    model: AnyModel, memory: Memory, tokenizer: Any, progress: Progress
) -> tuple[ReadText, Int[np.ndarray, "documents 2"]]:
    """Some documents as the model reads them, and which entries are each one's own."""
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
    return read, np.array(own)


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


def _wider(grid: Grid) -> Grid:
    """The same grid with more candidates, so that a document's own can be dropped."""
    lookup, settings = grid.lookup, grid.lookup.settings
    if "dense" in lookup.kinds:
        k = min(settings.k + _SPARE, lookup.memory.entries)
        settings = replace(settings, k=k, rerank=max(settings.rerank, k))
    else:
        settings = replace(settings, suffix_k=settings.suffix_k + _SPARE)
    return replace(grid, lookup=Lookup(lookup.memory, lookup.method, settings))


def _held_out(
    one: Examples,
    own: Int[np.ndarray, "documents 2"],
    kept: Bool[np.ndarray, " documents"],
    most: int,
) -> Examples:
    """As if the documents were not in the memory: their own entries are left out.

    So are predictions of documents that are not `kept`. `most` candidates are left, at most.
    """
    rows = kept[one.documents]
    found = one.view.candidates.rows(rows)
    passed = _of_own(found.ids, own[one.documents[rows]])
    order = np.argsort(passed, axis=1, kind="stable")[:, :most]
    ids, values, distances, lengths = (
        np.take_along_axis(array, order, axis=1) for array in found.without(passed)[:4]
    )
    dense, pointers, suffix = found.columns  # no gate, so no text
    columns = min(most, dense), min(most, pointers), min(most, suffix)  # all are of one kind
    candidates = Candidates(ids, values, distances, lengths, columns, found.searched)
    view = one.view._replace(queries=one.view.queries.rows(rows), candidates=candidates)
    return Examples(
        one.rows[rows], view, one.targets[rows], one.lm_log_probs[rows], one.documents[rows]
    )


def _of_own(ids: Int[np.ndarray, "q c"], own: Int[np.ndarray, "q 2"]) -> Bool[np.ndarray, "q c"]:
    return (ids >= own[:, :1]) & (ids < own[:, 1:])
