"""Queries to a memory: positions at which the next token is to be predicted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.corpus.tokens import Tokens
from nearest.encode.view import LmView


class Sources(NamedTuple):
    """What an encoder read beside queries: tokens[rows[i]] for query i."""

    tokens: Sequence[Tokens]
    rows: Int[np.ndarray, " q"]


class Queries(NamedTuple):
    """Query i has the hidden state keys[i] and the tokens context[: ends[i] + 1].

    A context reaches back to its last start token; several documents may stand one after another.
    `lm` is there for methods that need it. Where the text stands in the memory too, `own` names the
    entry that each query is itself (-1 where it is none), which is then left out. `sources` are of
    encoder–decoders, where they are known.
    """

    keys: Float[np.ndarray, "q dim"]  # float32
    context: Tokens  # int64
    ends: Int[np.ndarray, " q"]
    lm: LmView | None = None
    own: Int[np.ndarray, " q"] | None = None
    sources: Sources | None = None

    def rows(self, rows: slice | Int[np.ndarray, " r"] | Bool[np.ndarray, " q"]) -> "Queries":
        """Some of the queries."""
        lm = None if self.lm is None else self.lm.rows(rows)
        own = None if self.own is None else self.own[rows]
        sources = (
            None if self.sources is None else self.sources._replace(rows=self.sources.rows[rows])
        )
        return Queries(self.keys[rows], self.context, self.ends[rows], lm, own, sources)
