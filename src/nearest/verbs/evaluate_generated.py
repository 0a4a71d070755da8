"""Score what a model writes with and without a memory: BLEU, chrF, ROUGE, exact match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nearest.corpus.incoming import Documents
from nearest.encode.identity import AnyModel, bare_model
from nearest.errors import SettingError
from nearest.markup import interval, number, table
from nearest.models.scoring import own_tokenizer
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Memories, memories_of
from nearest.retrieval.settings import BASE, Settings, check_methods, method_named, settings_of
from nearest.store.tuned import SettingsFrom
from nearest.verbs.results import data_frame
from nearest.verbs.text_metrics import Score, metrics_named, scores_of
from nearest.verbs.written import Pairs, Written, read_pairs, write

DEFAULT_METRICS = ("bleu", "chrf", "exact")


@dataclass(frozen=True, repr=False)
class GeneratedResult:
    """One method's texts and their scores, 0 to 100.

    Attributes:
        scores: by the metric's name, with intervals and the difference to the first method.
        tokens, seconds: that were written, and that it took.
        texts, pairs: what was written, and what was wanted.
        settings_from: as of a `Result`.
    """

    method: str
    scores: Mapping[str, Score]
    tokens: int
    seconds: float
    texts: list[str] = field(repr=False)
    pairs: Pairs = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_from: SettingsFrom | None = None

    def __repr__(self) -> str:
        """Method, scores, and of how many texts."""
        scores = ", ".join(f"{name} {score.value:.1f}" for name, score in self.scores.items())
        return f"GeneratedResult({self.method}: {scores}; {len(self.texts):,} texts)"

    def _repr_html_(self) -> str:
        """Its scores as a table, for notebooks."""
        rows = [
            (
                name,
                f"{number(score.value, '.1f')} {interval(score.low, score.high, '.1f')}",
                ""
                if score.delta is None
                else f"{number(score.delta, '+.1f')} "
                f"{interval(score.delta_low, score.delta_high, '+.1f')}",
            )
            for name, score in self.scores.items()
        ]
        return table((self.method, "score", "− the first method's"), rows)

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON keys; a metric m has m, m_low, m_high, m_delta, m_delta_low, …."""
        figures: dict[str, Any] = {
            "method": self.method,
            "documents": len(self.texts),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tok_s": self.tokens / self.seconds if self.seconds else None,
        }
        for name, score in self.scores.items():
            figures[name] = score.value
            figures |= {f"{name}_{end}": v for end, v in score._asdict().items() if end != "value"}
        named = {name: self.settings.get(name) for name in ("lam", "temperature", "k")}
        return {**figures, **named, "settings_from": self.settings_from}

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row a document: id, encoder_text, reference, text.

        Raises:
            NearestError: pandas is not installed.
        """
        pairs = self.pairs
        columns = {
            "id": pairs.ids,
            "encoder_text": pairs.encoder_texts,
            "reference": pairs.references,
        }
        return data_frame({**columns, "text": self.texts})


def evaluate_generated(
    model: AnyModel,
    memory: Memories | None,
    documents: Documents,
    method: str | Sequence[str] = "knn",
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    max_new_tokens: int = 128,
    num_beams: int = 1,
    tokenizer: Any = None,
    batch_size: int | None = None,
    weights: Sequence[float] | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    settings: Settings | None = None,
    generation: Mapping[str, Any] | None = None,
    **given: Any,
) -> list[GeneratedResult]:
    """Let a model write a text for each encoder text, and compare it to the document's text.

    Args:
        model: an encoder–decoder, or a causal model, which continues the encoder text.
        memory: what to look up, or several; None where only the base model is asked for.
        documents: as in `Memory.build`, each with an `encoder_text` (in files also `source`), which
            is read, and a `text`, which is wanted.
        method: "base", "knn", or several; the first of several is what the others are compared to.
        metrics: "bleu", "chrf", "rouge", "exact".
        max_new_tokens, num_beams: of greedy or beam search.
        tokenizer: the model's; loaded from where the model came from when not given.
        batch_size: texts that are written together; as many as 4,096 tokens hold when not given.
        weights, force, settings: as in `attach`.
        progress: told (stage, done, total).
        generation: further arguments of `model.generate`.
        **given: single settings, by the names of `Settings`.

    Raises:
        NearestError: model, memory, text or settings cannot be used, or the packages that score
            (extra "text-metrics") are not installed.
    """
    methods = [method] if isinstance(method, str) else list(method)
    chosen, memories = metrics_named(metrics), memories_of(memory)
    check_methods(methods, given, has_memory=bool(memories))
    for name in methods:
        if name != BASE and method_named(name).in_context:
            raise SettingError(
                f"{name} reads passages for one text at a time, and texts are written in batches "
                "here: leave it out"
            )
    model = bare_model(model)
    tokenizer = tokenizer or own_tokenizer(model)
    pairs = read_pairs(model, tokenizer, documents, max_new_tokens)
    written = [
        write(
            model,
            tokenizer,
            memories,
            pairs,
            name,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            batch_size=batch_size,
            weights=weights,
            force=force,
            settings=settings,
            given={} if name == BASE else settings_of(name, given),
            generation=generation,
            progress=progress,
        )
        for name in methods
    ]
    texts = [one.texts for one in written]
    scores = {metric.name: scores_of(metric, texts, pairs.references) for metric in chosen}
    return [
        _result(name, {key: some[n] for key, some in scores.items()}, written[n], pairs)
        for n, name in enumerate(methods)
    ]


def _result(
    method: str, scores: Mapping[str, Score], written: Written, pairs: Pairs
) -> GeneratedResult:
    settings = {} if written.settings is None else written.settings.of(method)
    return GeneratedResult(
        method,
        scores,
        written.tokens,
        written.seconds,
        written.texts,
        pairs,
        settings,
        written.settings_from,
    )
