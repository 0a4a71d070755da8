"""Candidates of known text, for what weighs them in other ways than the method does."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from nearest.retrieval.candidates import Candidates
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.queries import Queries
from nearest.retrieval.step import State, steps

Trails = dict[int, State]


class Found(NamedTuple):
    """Candidates of some queries."""

    rows: Int[np.ndarray, " r"]  # which queries
    candidates: Candidates


def walk(
    lookup: Lookup,
    queries: Queries,
    sequences: Int[np.ndarray, " q"],
    targets: Int[np.ndarray, " q"],
    states: Trails,
) -> Iterator[Found]:
    """Candidates of every query, as `steps` finds them; see there for the arguments."""
    unknown = torch.zeros(len(targets))
    for one in steps(lookup.unguarded(), queries, sequences, targets, unknown, states):
        yield Found(one.rows, one.prediction.candidates)
