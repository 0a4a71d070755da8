"""Score text by the base model and with a memory, in one pass of the model over it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Float, Int

from nearest.corpus.text import Text
from nearest.encode.identity import AnyModel
from nearest.memory import Memory
from nearest.models.in_context import reader_of
from nearest.models.method_run import Details, EnsembleRun
from nearest.models.scoring import ScoredBlock, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Ensemble, Memories, memories_of
from nearest.retrieval.settings import (
    BASE,
    Settings,
    check_methods,
    method_named,
    passage_settings,
    resolve_settings,
    settings_of,
)
from nearest.verbs.checks import NeighbourCheck, harm_of
from nearest.verbs.leak import Leak, find_leak
from nearest.verbs.records import Records, check_records_path, record_file, records_of
from nearest.verbs.results import Checks, Cost, Result, result_of


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
    scored = [_Scored(name, ensembles.get(name), memories, scorer.text) for name in methods]
    readings: dict[Settings | None, list[_Scored]] = {}
    for name, one in zip(methods, scored, strict=True):
        readings.setdefault(_passages(name, memories, settings, given), []).append(one)
    seconds: dict[Settings | None, float] = {}
    with _sink(records) as sink:
        for passages, several in readings.items():
            reader = reader_of(scorer, memories, passages)
            with_view = records is not None or any(one.needs_lm for one in several)
            seconds[passages] = 0.0
            for block in reader.blocks(progress, "evaluate", with_view):
                seconds[passages] += block.seconds
                for one in several:
                    one.score(block, sink)
    leak = find_leak(memories, scorer.text, scorer.own) if memories else None
    for passages, several in readings.items():
        for one in several:
            one.read_in(seconds.get(None, seconds[passages]), seconds[passages])
    results = [one.result(scored[0].nll if n else None, leak) for n, one in enumerate(scored)]
    return results[0] if isinstance(method, str) else results


def _passages(
    method: str, memories: Sequence[Memory], settings: Settings | None, given: dict[str, Any]
) -> Settings | None:
    """What a method's passages depend on, nothing else; None where the text is read alone."""
    if method == BASE or not method_named(method).in_context or not memories:
        return None
    resolved = resolve_settings(method, memories[0], settings, **settings_of(method, given))
    return Settings(**passage_settings(resolved))


def _sink(records: str | Path | Records | None) -> AbstractContextManager[Records | None]:
    """Where records go while the context is open."""
    if isinstance(records, str | Path):
        return record_file(Path(records))
    return nullcontext(records)


class _Scored:
    """One method, or the base model, and what it made of the text so far."""

    def __init__(
        self, method: str, ensemble: Ensemble | None, memories: Sequence[Memory], text: Text
    ) -> None:
        self.nll = np.zeros(len(text.documents))
        self._method, self._memories, self._text = method, memories, text
        self._run = None if ensemble is None else EnsembleRun(ensemble)
        self._losses: list[Float[np.ndarray, " n"]] = []
        self._documents: list[Int[np.ndarray, " n"]] = []
        self._base_seconds = self._longer = 0.0

    @property
    def needs_lm(self) -> bool:
        """Whether its queries must say what the model predicts."""
        return self._run is not None and self._run.ensemble.needs_lm

    def read_in(self, base: float, seconds: float) -> None:
        """Seconds of the model alone, and of reading the text as this method does."""
        self._base_seconds, self._longer = base, seconds - base

    def score(self, block: ScoredBlock, sink: Records | None) -> None:
        """Predict a block."""
        details = None if sink is None else Details.empty(len(block.targets))
        log_probs = block.lm_log_probs
        if self._run is not None:
            log_probs = self._run.log_probs(block, details)
            self._losses.append((block.lm_log_probs - log_probs).numpy())
            self._documents.append(block.documents)
        np.add.at(self.nll, block.documents, -log_probs.double().numpy())
        if sink is not None and details is not None:
            sink(records_of(self._text, self._memories, self._method, block, log_probs, details))

    def result(
        self, compared_to: Float[np.ndarray, " documents"] | None, leak: Leak | None
    ) -> Result:
        """Its figures, once the whole text is predicted."""
        run, text, method = self._run, self._text, self._method
        if run is None:
            cost, checks = Cost(self._base_seconds, self._longer), Checks(leak=leak)
            return result_of(text, method, self.nll, cost, {}, compared_to, checks)
        cost = Cost(self._base_seconds, self._longer + run.seconds, run.saved)
        harm = harm_of(np.concatenate(self._losses), np.concatenate(self._documents), text.ids)
        given, right, elsewhere = run.judged
        neighbours = None
        if given > 0:
            neighbours = NeighbourCheck(right / given, elsewhere / given, int(text.predictions))
        checks = Checks(neighbours, harm, leak)
        return result_of(
            text,
            method,
            self.nll,
            cost,
            _common_settings(run.ensemble, method),
            compared_to,
            checks,
            run.ensemble.settings_from,
        )


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
