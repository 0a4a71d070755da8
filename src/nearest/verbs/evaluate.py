"""Score text by the base model and with a memory, in one pass of the model over it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, overload

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from nearest.errors import SettingError
from nearest.memory.memory import Memory
from nearest.metrics import Interval, bits_per_byte, bootstrap_interval, perplexity
from nearest.models.scoring import MethodRun, ReadText, ScoredInput, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import BASE, check_method, settings_of_methods


@dataclass(frozen=True)
class Result:
    """One method's figures on a text; nll is the mean in nats a token.

    Attributes:
        nll_low, nll_high: 95 % interval of nll by document bootstrap; None for a single document.
        ppl: perplexity a token.
        word_ppl: perplexity a white-space word; None where the text was given as tokens.
        bpb: bits a UTF-8 byte; None where the text was given as tokens.
        foss: fraction of saved searches; None for the base model.
        seconds: of the base model and, for a method, of its own part.
        added_ms: milliseconds a token that the method adds to the base model.
        delta_nll, delta_low, delta_high: difference in nll to the first method, paired by document.
        document_nll: summed nll of each document, in nats.
        document_tokens: tokens predicted in each document.
    """

    method: str
    tokens: int
    nll: float
    nll_low: float | None
    nll_high: float | None
    ppl: float
    word_ppl: float | None
    bpb: float | None
    foss: float | None
    tok_s: float
    seconds: float
    added_ms: float
    lam: float | None
    temperature: float | None
    k: int | None
    delta_nll: float | None
    delta_low: float | None
    delta_high: float | None
    document_nll: Float[np.ndarray, " documents"] = field(repr=False)
    document_tokens: Int[np.ndarray, " documents"] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The stable JSON keys."""
        arrays = ("document_nll", "document_tokens")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in values.items()
        }


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
            scorer, name, nll[name], nll[methods[0]] if n else None, base_seconds, runs.get(name)
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
        return {}
    if memory is None:
        raise SettingError(f"method {of_memory[0]} needs a memory: pass one")
    return {
        name: Lookup.of(memory, name, settings)
        for name, settings in settings_of_methods(of_memory, memory, given).items()
    }


def _result(
    scorer: Scorer | ReadText,
    method: str,
    nll: Float[np.ndarray, " documents"],
    compared_to: Float[np.ndarray, " documents"] | None,
    base_seconds: float,
    run: MethodRun | None,
) -> Result:
    text = scorer.text
    settings: dict[str, Any] = {} if run is None else run.lookup.settings.of(method)
    own_seconds = 0.0 if run is None else run.seconds
    counts = np.array([len(tokens) - 1 for tokens in text.documents])
    tokens, total = int(counts.sum()), float(nll.sum())
    interval = bootstrap_interval(nll, counts)
    delta = Interval(None, None)
    delta_nll = None
    if compared_to is not None:
        delta_nll = float((nll - compared_to).sum() / tokens)
        delta = bootstrap_interval(nll - compared_to, counts)
    seconds = base_seconds + own_seconds
    return Result(
        method=method,
        tokens=tokens,
        nll=total / tokens,
        nll_low=interval.low,
        nll_high=interval.high,
        ppl=perplexity(total, tokens),
        word_ppl=perplexity(total, text.words) if text.words else None,
        bpb=bits_per_byte(total, text.utf8_bytes) if text.utf8_bytes else None,
        foss=None if run is None else 1 - run.searches / run.tokens,
        tok_s=tokens / seconds,
        seconds=seconds,
        added_ms=1000 * own_seconds / tokens,
        lam=settings.get("lam"),
        temperature=settings.get("temperature"),
        k=settings.get("k"),
        delta_nll=delta_nll,
        delta_low=delta.low,
        delta_high=delta.high,
        document_nll=nll,
        document_tokens=counts,
    )
