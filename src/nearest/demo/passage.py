"""One scored topic token by token: where the memory helped, and where it misled."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel

from nearest.corpus.documents import Document
from nearest.memory import Memory
from nearest.models.method_run import MethodRun
from nearest.models.scoring import Scorer
from nearest.progress import no_progress
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import resolve_settings
from nearest.verbs.generate import decode_pieces
from nearest.verbs.results import Result

_TOKENS = 220


@dataclass(frozen=True)
class Passage:
    """The beginning of a scored document: each token's text and gain in log-probability (nats).

    A character made of several tokens comes as one, with the sum of their gains.
    """

    document: str
    tokens: list[tuple[str, float]]


def typical_document(base: Result, knn: Result) -> int:
    """The number of the document whose change a token is the median: chosen by rule, not by eye."""
    change = (knn.document_nll - base.document_nll) / base.document_tokens
    return int(np.argsort(change)[len(change) // 2])


def score_passage(
    model: PreTrainedModel, tokenizer: Any, memory: Memory, document: Document
) -> Passage:
    """What the memory, as tuned, changes at every token of a document's beginning."""
    scorer = Scorer.prepare(model, memory, [document], tokenizer=tokenizer)
    run = MethodRun(Lookup(memory, "knn", resolve_settings("knn", memory)))
    gains = np.concatenate(
        [
            (run.log_probs(block) - block.lm_log_probs).double().numpy()
            for block in scorer.blocks(no_progress, "passage")
        ]
    )
    tokens = scorer.text.documents[0][1:]
    return Passage(document.id, _pieces(tokenizer, tokens[:_TOKENS], gains[:_TOKENS]))


def _pieces(
    tokenizer: Any, tokens: Int[np.ndarray, " n"], gains: Float[np.ndarray, " n"]
) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    gain = 0.0
    for text, its_gain in zip(decode_pieces(tokenizer, [], tokens.tolist()), gains, strict=True):
        gain += float(its_gain)
        if text:  # else a character that the next token goes on with
            pieces.append((text, gain))
            gain = 0.0
    return pieces
