"""The figures of one method on a text, with intervals by document bootstrap."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nearest.corpus.text import Text
from nearest.errors import require
from nearest.markup import interval, number, table
from nearest.metrics import Interval, bits_per_byte, bootstrap_interval, perplexity
from nearest.store.tuned import SettingsFrom
from nearest.verbs.checks import Harm, NeighbourCheck
from nearest.verbs.leak import Leak


@dataclass(frozen=True)
class Checks:
    """What to know before a method's figures are believed; None where it has no meaning.

    Attributes:
        neighbours: what the memory's candidates know of the text.
        harm: where the method predicts worse than the base model.
        leak: what of the text stands in the memory.
    """

    neighbours: NeighbourCheck | None = None
    harm: Harm | None = None
    leak: Leak | None = None

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON keys."""
        neighbours, harm, leak = self.neighbours, self.harm, self.leak
        return {
            "memory_prob": None if neighbours is None else neighbours.right,
            "chance_prob": None if neighbours is None else neighbours.chance,
            "useless_neighbours": None if neighbours is None else neighbours.useless,
            "harm": None if harm is None else harm.to_dict(),
            "leak": None if leak is None else leak.to_dict(),
        }


@dataclass(frozen=True, repr=False)
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
        checks: what to know before the figures are believed.
        settings_from: where the settings come from that were not given: "tuned", "self-tuned" or
            "defaults" (of several memories the least of these); "given" where all were; None for
            the base model.
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
    document_nll: Float[np.ndarray, " documents"]
    document_tokens: Int[np.ndarray, " documents"]
    checks: Checks
    settings_from: SettingsFrom | None = None

    def __repr__(self) -> str:
        """Method, perplexity with its interval, and on how many tokens."""
        interval = ""
        if self.nll_low is not None and self.nll_high is not None:
            low, high = perplexity(self.nll_low, 1), perplexity(self.nll_high, 1)
            interval = f" (95 %: {low:.2f} to {high:.2f})"
        return f"Result({self.method}: perplexity {self.ppl:.2f}{interval}, {self.tokens:,} tokens)"

    def _repr_html_(self) -> str:
        """Its figures as a table, for notebooks."""
        ends = interval(self.nll_low, self.nll_high, ".4f")
        rows = [
            ("token perplexity", number(self.ppl, ".2f")),
            ("nll, nats a token", f"{number(self.nll, '.4f')} {ends}"),
            ("bits a byte", number(self.bpb, ".4f")),
            ("tokens", f"{self.tokens:,}"),
            ("fraction of saved searches", number(self.foss, ".2f")),
            ("added ms a token", number(self.added_ms, ".3f")),
        ]
        if self.delta_nll is not None:
            ends = interval(self.delta_low, self.delta_high, "+.4f")
            rows.append(("nll − the first method's", f"{number(self.delta_nll, '+.4f')} {ends}"))
        return table(("", self.method), rows)

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON keys."""
        return {**self.figures(), **self.checks.to_dict()}

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each document: its tokens and summed nll in nats.

        Raises:
            NearestError: pandas is not installed.
        """
        return data_frame({"tokens": self.document_tokens, "nll": self.document_nll})

    def figures(self) -> dict[str, Any]:
        """Single figures by name; None for one that is infinite."""
        others = ("document_nll", "document_tokens", "checks")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in values.items()
        }


class Cost(NamedTuple):
    """Seconds of the base model and of the method's own part; fraction of saved searches."""

    base: float
    own: float = 0.0
    foss: float | None = None


def result_of(
    text: Text,
    method: str,
    nll: Float[np.ndarray, " documents"],
    cost: Cost,
    settings: Mapping[str, Any],
    compared_to: Float[np.ndarray, " documents"] | None = None,
    checks: Checks | None = None,
    settings_from: SettingsFrom | None = None,
) -> Result:
    """Figures from the summed nll of each document, and of those it is compared to."""
    counts = np.array([len(tokens) - 1 for tokens in text.documents])
    tokens, total = int(counts.sum()), float(nll.sum())
    interval = bootstrap_interval(nll, counts)
    delta = Interval(None, None)
    delta_nll = None
    if compared_to is not None:
        delta_nll = float((nll - compared_to).sum() / tokens)
        delta = bootstrap_interval(nll - compared_to, counts)
    seconds = cost.base + cost.own
    return Result(
        method=method,
        tokens=tokens,
        nll=total / tokens,
        nll_low=interval.low,
        nll_high=interval.high,
        ppl=perplexity(total, tokens),
        word_ppl=perplexity(total, text.words) if text.words else None,
        bpb=bits_per_byte(total, text.utf8_bytes) if text.utf8_bytes else None,
        foss=cost.foss,
        tok_s=tokens / seconds,
        seconds=seconds,
        added_ms=1000 * cost.own / tokens,
        lam=settings.get("lam"),
        temperature=settings.get("temperature"),
        k=settings.get("k"),
        delta_nll=delta_nll,
        delta_low=delta.low,
        delta_high=delta.high,
        document_nll=nll,
        document_tokens=counts,
        checks=checks or Checks(),
        settings_from=settings_from,
    )


def data_frame(rows: Any) -> Any:
    """A `pandas.DataFrame` of rows or columns (NearestError where pandas is not installed)."""
    require("pandas", "data")
    import pandas

    return pandas.DataFrame(rows)
