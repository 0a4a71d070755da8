"""Score text by the base model and with a memory, in one pass of the model over it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Float

from nearest.corpus.text import Text
from nearest.encode.identity import AnyModel, bare_model
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.scoring import ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Ensemble, Memories, memories_of
from nearest.retrieval.settings import (
    BASE,
    Settings,
    check_methods,
    method_named,
    settings_of,
)
from nearest.verbs.checks import NeighbourCheck, harm_of
from nearest.verbs.evaluate_workers import shared_by_workers
from nearest.verbs.leak import Leak, find_leak
from nearest.verbs.records import Records, check_records_path, record_file
from nearest.verbs.results import Checks, Cost, Result, result_of
from nearest.verbs.tally import Tally, passages_of, read


@overload
def evaluate(
    model: AnyModel,
    memory: Memories | None,
    documents: ScoredInput,
    method: str = "knn",
    **options: Any,
) -> Result: ...


@overload
def evaluate(
    model: AnyModel,
    memory: Memories | None,
    documents: ScoredInput,
    method: Sequence[str],
    **options: Any,
) -> list[Result]: ...


def evaluate(
    model: AnyModel,
    memory: Memories | None,
    documents: ScoredInput,
    method: str | Sequence[str] = "knn",
    *,
    weights: Sequence[float] | None = None,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    score_eos: bool = False,
    batch_size: int | None = None,
    force: bool = False,
    leave_one_out: bool = False,
    stream: bool = False,
    records: str | Path | Records | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress = no_progress,
    settings: Settings | None = None,
    **given: Any,
) -> Result | list[Result]:
    """Perplexity of documents by one method, or by several in one pass.

    Args:
        model: a language model, causal or encoder–decoder, in evaluation mode.
        memory: what to look up, or several; None where only the base model is asked for.
        documents: documents, strings, rows, tables or a path, as in `Memory.build`; or sequences of
            token ids whose first token is context only. For an encoder–decoder, documents with an
            `encoder_text`.
        method: "base", "knn", or several; the first of several is what the others are compared to.
            With "in-context", or "in-context+knn" and so on, the model reads the text again, with
            passages of the memory before it. `added_ms` counts what this reading takes longer than
            the plain one where a method without passages is there too, else the memory's part
            alone.
        weights: of several memories, as in `attach`.
        tokenizer: the model's; loaded from where the model came from when not given.
        window, stride: as in `build`; the memory's own when not given.
        score_eos: predict the end of each document too.
        batch_size: windows a forward pass.
        force: accept another model than the one that built the memory.
        leave_one_out: predict a document that stands in the memory too without the entries that are
            itself; its equals under other ids stay.
        stream: read all documents as one sequence, as older tools do (fairseq's sample-break-mode
            none): it begins with one context token and holds the documents one after another, with
            nothing between them, or with EOS where `score_eos` asks for it. Context and state go
            over their ends, and every token but the first is predicted once.
        records: a Parquet file to write, one row a token and method, or what is called with columns
            of such rows as the text is read (`verbs.records.records_of` says which), such as a
            `verbs.records.RecordTable`, which makes a pandas.DataFrame of them.
        workers: processes that share the documents, each with its share of the threads; the figures
            are those of this process with as many threads as one of them, to rounding, and seconds
            are those of all together. They load the model by its name.
        ray: the Ray cluster on which they run: "auto", an address, or "local", as in
            `Memory.build`; model and memory are seen by all nodes under the same paths, and what
            nodes found lies beside the memory meanwhile.
        progress: told (stage, done, total).
        settings: of the methods, all of them, in place of those stored in the memory.
        **given: single settings, by the names of `Settings`, before all others. What neither gives
            comes from `tune`'s result in the memory, else from the paper's defaults.

    Returns:
        A Result, or a list of them where several methods were asked for.

    Raises:
        NearestError: model, memory, text or settings cannot be used.
    """
    methods = [method] if isinstance(method, str) else list(method)
    if workers is not None and workers < 1:
        raise SettingError(f"workers must be at least 1, got {workers}")
    if records is not None and (workers or ray):
        raise SettingError("workers keep no records of each token: leave records, or them, out")
    memories = memories_of(memory)
    ensembles = _ensembles(memories, methods, weights, settings, given)
    if isinstance(records, str | Path):
        check_records_path(Path(records))
    scorer = Scorer.prepare(
        model,
        memories,
        documents,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        score_eos=score_eos,
        batch_size=batch_size,
        force=force,
        leave_one_out=leave_one_out,
        stream=stream,
    )
    lookups = {name: ensembles.get(name) for name in methods}
    passages = {name: passages_of(name, memories, settings, given) for name in methods}
    if workers is None and ray is None:
        with _sink(records) as sink:
            tallies = read(scorer, memories, lookups, passages, sink, progress)
    else:
        tallies = shared_by_workers(
            bare_model(model),
            memories,
            scorer,
            lookups,
            passages,
            workers,
            ray,
            force=force,
            progress=progress,
        )
    leak = find_leak(memories, scorer.text, scorer.own) if memories else None
    alone = [one.read for one, name in zip(tallies, methods, strict=True) if passages[name] is None]
    results = [
        _result(
            name,
            tally,
            ensembles.get(name),
            scorer.text,
            alone[0] if alone else tally.read,
            tallies[0].nll if n else None,
            leak,
        )
        for n, (name, tally) in enumerate(zip(methods, tallies, strict=True))
    ]
    return results[0] if isinstance(method, str) else results


def _sink(records: str | Path | Records | None) -> AbstractContextManager[Records | None]:
    """Where records go while the context is open."""
    if isinstance(records, str | Path):
        return record_file(Path(records))
    return nullcontext(records)


def _result(
    method: str,
    tally: Tally,
    ensemble: Ensemble | None,
    text: Text,
    base: float,
    compared_to: Float[np.ndarray, " documents"] | None,
    leak: Leak | None,
) -> Result:
    """A method's figures; `base` seconds are the model's alone."""
    longer = tally.read - base
    if ensemble is None:
        cost, checks = Cost(base, longer), Checks(leak=leak)
        return result_of(text, method, tally.nll, cost, {}, compared_to, checks)
    cost = Cost(base, longer + tally.spent, tally.saved)
    harm, given = harm_of(tally.losses, tally.documents, text.ids), tally.given
    neighbours = None
    if given > 0:
        right, elsewhere = tally.right / given, tally.elsewhere / given
        neighbours = NeighbourCheck(right, elsewhere, int(text.predictions))
    checks, from_where = Checks(neighbours, harm, leak), ensemble.settings_from
    common = _common_settings(ensemble, method)
    return result_of(text, method, tally.nll, cost, common, compared_to, checks, from_where)


def _common_settings(ensemble: Ensemble, method: str) -> dict[str, Any]:
    """The method's settings that are equal in all memories."""
    first, *others = [lookup.settings.of(method) for lookup in ensemble.lookups]
    return {n: v for n, v in first.items() if all(other[n] == v for other in others)}


def _ensembles(
    memories: Sequence[Memory],
    methods: Sequence[str],
    weights: Sequence[float] | None,
    settings: Settings | None,
    given: dict[str, Any],
) -> dict[str, Ensemble]:
    check_methods(methods, given, has_memory=bool(memories))
    return {
        name: Ensemble.of(memories, name, weights, settings, **settings_of(name, given))
        for name in methods
        if name != BASE and method_named(name).kinds  # else the model reads passages, no more
    }
