"""Score text by the base model and with a memory, in one pass of the model over it."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from nearest.corpus.text import Text
from nearest.errors import SettingError
from nearest.memory.memory import Memory
from nearest.models.scoring import MethodRun, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import BASE, check_method, settings_of_methods
from nearest.verbs.results import Cost, Result, result_of


@overload
def evaluate(
    model: PreTrainedModel,
    memory: Memory | None,
    documents: ScoredInput,
    method: str = "knn",
    **options: Any,
) -> Result: ...


@overload
def evaluate(
    model: PreTrainedModel,
    memory: Memory | None,
    documents: ScoredInput,
    method: Sequence[str],
    **options: Any,
) -> list[Result]: ...


def evaluate(
    model: PreTrainedModel,
    memory: Memory | None,
    documents: ScoredInput,
    method: str | Sequence[str] = "knn",
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    score_eos: bool = False,
    batch_size: int | None = None,
    force: bool = False,
    exclude_own: bool = False,
    stream: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> Result | list[Result]:
    """Perplexity of documents by one method, or by several in one pass.

    Args:
        model: a causal language model in evaluation mode.
        memory: what to look up; None where only the base model is asked for.
        documents: documents, strings, or arrays of token ids whose first token is context only.
        method: "base", "knn", or several; the first of several is what the others are compared to.
        tokenizer: the model's; loaded from where the model came from when not given.
        window, stride: as in `build`; the memory's own when not given.
        score_eos: predict the end of each document too.
        batch_size: windows a forward pass.
        force: accept another model than the one that built the memory.
        exclude_own: predict a document that stands in the memory too without the entries that are
            itself; its equals under other ids stay.
        stream: read all documents as one sequence, as older tools do (fairseq's sample-break-mode
            none): it begins with one context token and holds the documents one after another, with
            nothing between them, or with EOS where `score_eos` asks for it. Context and state go
            over their ends, and every token but the first is predicted once.
        progress: told (stage, done, total).
        **settings: lam, temperature, k, distances of the memory's method; what is not given comes
            from `tune`'s result in the memory, else from the paper's defaults.

    Returns:
        A Result, or a list of them where several methods were asked for.

    Raises:
        NearestError: model, memory, text or settings cannot be used.
    """
    methods = [method] if isinstance(method, str) else list(method)
    runs = {name: MethodRun(lookup) for name, lookup in _lookups(memory, methods, settings).items()}
    scorer = Scorer.prepare(
        model,
        memory,
        documents,
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        score_eos=score_eos,
        batch_size=batch_size,
        force=force,
        exclude_own=exclude_own,
        stream=stream,
    )
    nll = {name: np.zeros(len(scorer.text.documents)) for name in methods}
    base_seconds = 0.0
    with_view = any(run.lookup.needs_lm for run in runs.values())
    for block in scorer.blocks(progress, "evaluate", with_view):
        base_seconds += block.seconds
        for name in methods:
            run = runs.get(name)
            log_probs = block.lm_log_probs if run is None else run.log_probs(block)
            np.add.at(nll[name], block.documents, -log_probs.double().numpy())
    results = [
        _result(
            scorer.text,
            name,
            nll[name],
            nll[methods[0]] if n else None,
            base_seconds,
            runs.get(name),
        )
        for n, name in enumerate(methods)
    ]
    return results[0] if isinstance(method, str) else results


def _lookups(
    memory: Memory | None, methods: Sequence[str], given: dict[str, Any]
) -> dict[str, Lookup]:
    for name in methods:
        check_method(name)
    if not methods or len(set(methods)) != len(methods):
        raise SettingError("name at least one method, and each only once")
    of_memory = [name for name in methods if name != BASE]
    if not of_memory:
        if unused := sorted(name for name, value in given.items() if value is not None):
            raise SettingError(
                f"{unused[0]!r} is a setting of methods that use the memory, and the base model "
                "has none: leave it out, or name a method"
            )
        return {}
    if memory is None:
        raise SettingError(f"method {of_memory[0]} needs a memory: pass one")
    return {
        name: Lookup.of(memory, name, settings)
        for name, settings in settings_of_methods(of_memory, memory, given).items()
    }


def _result(
    text: Text,
    method: str,
    nll: Float[np.ndarray, " documents"],
    compared_to: Float[np.ndarray, " documents"] | None,
    base_seconds: float,
    run: MethodRun | None,
) -> Result:
    if run is None:
        return result_of(text, method, nll, Cost(base_seconds), {}, compared_to)
    cost = Cost(base_seconds, run.seconds, 1 - run.searches / run.tokens)
    return result_of(text, method, nll, cost, run.lookup.settings.of(method), compared_to)
