"""Perplexities of a text in several readings, paired by document."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from nearest.errors import SettingError
from nearest.markup import interval, number, table
from nearest.metrics import Interval, bits_per_byte, bootstrap_interval, perplexity
from nearest.progress import Progress, no_progress
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.table import NeighbourTable
from nearest.retro.evaluation.readings import Reading, dataset_for, readings_of
from nearest.retro.evaluation.scoring import by_document, check_fit, scored_tokens
from nearest.retro.passages import Passages, overlapping

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class RetroResult:
    """One reading of a text; nll is the mean in nats a token.

    Attributes:
        text, reading: names. neighbours, continuation: read of each chunk.
        tokens: predicted: each but a document's first.
        nll_low, nll_high: 95 % interval of nll by document bootstrap; None for one document.
        ppl, word_ppl: perplexity a token, and a white-space word. bpb: bits a UTF-8 byte. The last
            two are None without a tokenizer.
        delta_nll, delta_low, delta_high: difference in nll to the first reading, paired.
        seconds, tok_s: of this reading.
        document_nll, document_tokens: summed nll of each document, and its tokens.
    """

    text: str
    reading: str
    neighbours: int
    continuation: int
    tokens: int
    nll: float
    nll_low: float | None
    nll_high: float | None
    ppl: float
    word_ppl: float | None
    bpb: float | None
    delta_nll: float | None
    delta_low: float | None
    delta_high: float | None
    seconds: float
    tok_s: float
    document_nll: Float[np.ndarray, " documents"]
    document_tokens: Float[np.ndarray, " documents"]

    def _repr_html_(self) -> str:
        """Its figures as a table, for notebooks."""
        ends = interval(self.nll_low, self.nll_high, ".4f")
        rows = [
            ("token perplexity", number(self.ppl, ".3f")),
            ("nll, nats a token", f"{number(self.nll, '.4f')} {ends}"),
            ("bits a byte", number(self.bpb, ".4f")),
            ("tokens", f"{self.tokens:,}"),
        ]
        if self.delta_nll is not None:
            ends = interval(self.delta_low, self.delta_high, "+.4f")
            rows.append(("nll − the first reading's", f"{number(self.delta_nll, '+.4f')} {ends}"))
        return table((self.text, self.reading), rows)

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON keys."""
        skipped = ("document_nll", "document_tokens")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Sizes:
    """Bytes and words of what is predicted of a text."""

    utf8_bytes: int
    words: int

    @classmethod
    def of(cls, data: RetroDataset, decode: Decode) -> "Sizes":
        """Those of all documents' tokens but each one's first, which is only context."""
        total = words = 0
        for item in range(len(data)):
            tokens = data[item]["input_ids"].tolist()
            text = decode(tokens)
            total += len(text.encode()) - len(decode(tokens[:1]).encode())
            words += len(text.split())
        return cls(total, words)


def evaluate_retro(
    model: PreTrainedModel,
    data: RetroDataset,
    table: NeighbourTable,
    readings: Sequence[str] = ("on", "off"),
    *,
    text: str = "text",
    decode: Decode | None = None,
    neighbours: int = 2,
    continuation: int = 1,
    window: int = 512,
    stride: int | None = None,
    first_only: bool = False,
    batch_size: int = 8,
    progress: Progress = no_progress,
) -> list[RetroResult]:
    """Losses of a text with its neighbours, and in the readings that say what they are worth.

    Args:
        model: RETRO or RETROfit.
        data: the text's documents; how many neighbours it reads does not matter here.
        table: its neighbours.
        readings: as in `readings_of`; the first is what the others are compared to.
        text: its name in the results.
        decode: token ids → text, for bits a byte; None: without.
        neighbours, continuation: of the readings whose names do not say.
        window, stride: tokens read at once, and from one passage to the next, by default half.
        first_only: read the first `window` tokens of each document and no more, as the public
            evaluation of TobiasNorlund/retro does.
        batch_size: passages a forward pass.
        progress: told (stage, done, total).

    Raises:
        SettingError: a reading, the windows or the model do not fit.
    """
    wanted = readings_of(readings, model, table, neighbours, continuation)
    if first_only and stride is not None:
        raise SettingError(
            f"stride {stride} has no effect where the first {window} tokens of a document are read "
            "alone: leave it out"
        )
    results: list[RetroResult] = []
    sizes = None
    for reading in wanted:
        read = dataset_for(reading, data, table, window if first_only else None)
        if decode is not None and sizes is None:
            sizes = Sizes.of(read, decode)
        passages = Passages(read, window) if first_only else overlapping(read, window, stride)
        check_fit(model, passages)
        began = time.perf_counter()
        scored = scored_tokens(
            model, passages, reading=reading.kind, batch_size=batch_size, progress=progress
        )
        nll, tokens = by_document(scored, data.chunks.documents)
        seconds = time.perf_counter() - began
        first = results[0].document_nll if results else None
        results.append(_result(text, reading, nll, tokens, sizes, first, seconds))
    return results


def _result(
    text: str,
    reading: Reading,
    nll: Float[np.ndarray, " documents"],
    tokens: Float[np.ndarray, " documents"],
    sizes: Sizes | None,
    compared_to: Float[np.ndarray, " documents"] | None,
    seconds: float,
) -> RetroResult:
    total, count = float(nll.sum()), int(tokens.sum())
    interval = bootstrap_interval(nll, tokens)
    delta_nll, delta = None, Interval(None, None)
    if compared_to is not None:
        delta_nll = float((nll - compared_to).sum() / count)
        delta = bootstrap_interval(nll - compared_to, tokens)
    return RetroResult(
        text=text,
        reading=reading.name,
        neighbours=reading.neighbours,
        continuation=reading.continuation,
        tokens=count,
        nll=total / count,
        nll_low=interval.low,
        nll_high=interval.high,
        ppl=perplexity(total, count),
        word_ppl=perplexity(total, sizes.words) if sizes and sizes.words else None,
        bpb=bits_per_byte(total, sizes.utf8_bytes) if sizes and sizes.utf8_bytes else None,
        delta_nll=delta_nll,
        delta_low=delta.low,
        delta_high=delta.high,
        seconds=seconds,
        tok_s=count / seconds,
        document_nll=nll,
        document_tokens=tokens,
    )
