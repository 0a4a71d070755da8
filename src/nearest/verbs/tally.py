"""What methods make of a text, or of a run of its documents: sums that a result is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nearest.corpus.text import Text
from nearest.memory import Memory
from nearest.models.in_context import reader_of
from nearest.models.method_run import Details, EnsembleRun
from nearest.models.scoring import ReadText, ScoredBlock, Scorer
from nearest.progress import Progress, no_progress
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.settings import (
    BASE,
    Settings,
    method_named,
    passage_settings,
    resolve_settings,
    settings_of,
)
from nearest.verbs.records import Records, records_of


@dataclass(frozen=True)
class Tally:
    """What one method made of some documents.

    Attributes:
        nll: summed of each document, in nats.
        losses: nll of each token minus the base model's; empty for the base model.
        documents: of each loss, by number.
        read: seconds of the model's forward passes.
        spent: seconds of the method itself.
        tokens, searches: predictions in all memories, and dense searches made for them.
        given, right, elsewhere: as of `MethodRun`, of all memories.
    """

    nll: Float[np.ndarray, " documents"]
    losses: Float[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    read: float
    spent: float
    tokens: int
    searches: int
    given: float
    right: float
    elsewhere: float

    @property
    def saved(self) -> float | None:
        """Fraction of saved searches, of one a token and memory; None where none is used."""
        return 1 - self.searches / self.tokens if self.tokens else None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Its fields as arrays by name."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Tally":
        """What `to_arrays` gave."""
        told: dict[str, Any] = {n: one if one.ndim else one.item() for n, one in arrays.items()}
        return cls(**told)

    @classmethod
    def joined(cls, tallies: "Sequence[Tally]") -> "Tally":
        """Of the documents of several, one after another."""
        sums = ("read", "spent", "tokens", "searches", "given", "right", "elsewhere")
        before = np.cumsum([0, *(len(one.nll) for one in tallies)])[:-1]
        numbers = [one.documents + n for one, n in zip(tallies, before, strict=True)]
        return cls(
            np.concatenate([one.nll for one in tallies]),
            np.concatenate([one.losses for one in tallies]),
            np.concatenate(numbers),
            *(sum(getattr(one, name) for one in tallies) for name in sums),
        )


def passages_of(
    method: str, memories: Sequence[Memory], settings: Settings | None, given: Mapping[str, Any]
) -> Settings | None:
    """What a method's passages depend on, nothing else; None where the text is read alone."""
    if method == BASE or not method_named(method).in_context or not memories:
        return None
    resolved = resolve_settings(method, memories[0], settings, **settings_of(method, given))
    return Settings(**passage_settings(resolved))


def read(
    scorer: Scorer | ReadText,
    memories: Sequence[Memory],
    ensembles: Mapping[str, Ensemble | None],
    passages: Mapping[str, Settings | None],
    sink: Records | None = None,
    progress: Progress = no_progress,
) -> list[Tally]:
    """Let the model read a text, once for each way to read it, and every method predict it.

    Args:
        scorer: of the text.
        memories: what is looked up.
        ensembles: the lookups of each method; None where the model reads, and no more.
        passages: what stands before the text, of each method; None: nothing.
        sink: takes records of every prediction.
        progress: told (stage, done, total).
    """
    several = [_Predicted(name, one, memories, scorer.text) for name, one in ensembles.items()]
    ways: dict[Settings | None, list[_Predicted]] = {}
    for one in several:
        ways.setdefault(passages[one.method], []).append(one)
    for way, methods in ways.items():
        reader = reader_of(scorer, memories, way)
        with_view = sink is not None or any(one.needs_lm for one in methods)
        for block in reader.blocks(progress, "evaluate", with_view):
            for one in methods:
                one.predict(block, sink)
    return [one.tally() for one in several]


class _Predicted:
    """One method, or the base model, and what it made of the text so far."""

    def __init__(
        self, method: str, ensemble: Ensemble | None, memories: Sequence[Memory], text: Text
    ) -> None:
        self.method = method
        self._nll = np.zeros(len(text.documents))
        self._memories, self._text = memories, text
        self._run = None if ensemble is None else EnsembleRun(ensemble)
        self._losses: list[Float[np.ndarray, " n"]] = []
        self._documents: list[Int[np.ndarray, " n"]] = []
        self._seconds = 0.0

    @property
    def needs_lm(self) -> bool:
        """Whether its queries must say what the model predicts."""
        return self._run is not None and self._run.ensemble.needs_lm

    def predict(self, block: ScoredBlock, sink: Records | None) -> None:
        """Predict a block."""
        self._seconds += block.seconds
        details = None if sink is None else Details.empty(len(block.targets))
        log_probs = block.lm_log_probs
        if self._run is not None:
            log_probs = self._run.log_probs(block, details)
            self._losses.append((block.lm_log_probs - log_probs).numpy())
            self._documents.append(block.documents)
        np.add.at(self._nll, block.documents, -log_probs.double().numpy())
        if sink is not None and details is not None:
            sink(records_of(self._text, self._memories, self.method, block, log_probs, details))

    def tally(self) -> Tally:
        """What came of it."""
        run = self._run
        losses = np.concatenate([np.empty(0, np.float32), *self._losses])
        documents = np.concatenate([np.empty(0, np.int64), *self._documents])
        spent = (0.0, 0, 0) if run is None else (run.seconds, run.tokens, run.searches)
        judged = (0.0, 0.0, 0.0) if run is None else run.judged
        return Tally(self._nll, losses, documents, self._seconds, *spent, *judged)
