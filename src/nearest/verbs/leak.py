"""What of a text stands in the memory that is to predict it: such tokens are copied, not foreseen.

Exact: every span is looked up in the suffix array, one query a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from nearest.corpus.text import Text
from nearest.corpus.tokens import Tokens
from nearest.memory import Memory

SPAN = 50  # tokens; what is shorter may stand anywhere by chance
_NAMED = 20


@dataclass(frozen=True)
class Leak:
    """How much of a text stands in a memory.

    Attributes:
        whole: ids of documents that are documents of the memory, token by token.
        partly: ids of other documents with spans of SPAN or more tokens that stand in one.
        tokens: number of tokens in such spans, of all documents.
        span: SPAN.
    """

    whole: tuple[str, ...]
    partly: tuple[str, ...]
    tokens: int
    span: int = SPAN

    def to_dict(self) -> dict[str, int | list[str]]:
        """Counts, and the first ids."""
        return {
            "documents": len(self.whole),
            "documents_partly": len(self.partly),
            "tokens": self.tokens,
            "span": self.span,
            "ids": [*self.whole, *self.partly][:_NAMED],
        }


def find_leak(
    memories: Sequence[Memory], text: Text, own: Int[np.ndarray, " documents"] | None
) -> Leak:
    """Look for a text's documents, and for its spans, in memories.

    Args:
        memories: what predicts the text.
        text: what is predicted.
        own: the entries at which documents begin that are predicted without themselves (-1: not
            so), and are passed over here.
    """
    kept = np.full(len(text.ids), True) if own is None else own < 0
    documents = [tokens for tokens, one in zip(text.own_tokens, kept, strict=True) if one]
    ids = _named(text.ids, kept)
    if not documents:
        return Leak((), (), 0)
    equal = [memory.equal_documents(documents) >= 0 for memory in memories]
    whole: Bool[np.ndarray, " documents"] = np.logical_or.reduce(equal)
    context = np.concatenate(documents)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    ends = _ends(context, starts, memories[0].manifest.model.start_token)
    stand = np.logical_or.reduce([one.spans_stand(context, ends, SPAN) for one in memories])
    inside = _covered(len(context), ends[stand])
    partly = (np.add.reduceat(inside, starts) > 0) & ~whole
    return Leak(_named(ids, whole), _named(ids, partly), int(inside.sum()))


def _ends(
    context: Tokens, starts: Int[np.ndarray, " documents"], start_token: int
) -> Int[np.ndarray, " q"]:
    """Where spans end that hold no document's first token, nor a start token inside one."""
    barrier = context == start_token
    barrier[starts] = True
    before = np.cumsum(np.append(0, barrier))
    ends = np.arange(SPAN - 1, len(context))
    free: Int[np.ndarray, " q"] = ends[before[ends + 1] == before[ends + 1 - SPAN]]
    return free


def _covered(length: int, ends: Int[np.ndarray, " q"]) -> Int[np.ndarray, " n"]:
    """1 for each position that lies in a span that ends at one of `ends`, else 0."""
    opened = np.zeros(length + 1, dtype=np.int64)
    np.add.at(opened, ends - SPAN + 1, 1)
    np.add.at(opened, ends + 1, -1)
    inside: Int[np.ndarray, " n"] = (np.cumsum(opened)[:-1] > 0).astype(np.int64)
    return inside


def _named(ids: Sequence[str], chosen: Bool[np.ndarray, " documents"]) -> tuple[str, ...]:
    return tuple(name for name, own in zip(ids, chosen.tolist(), strict=True) if own)
