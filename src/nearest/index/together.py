"""Indexes that were filled from one trained index, searched as if they had been joined.

What is found does not depend on how entries are divided among them (`index.search`). Joined they
are quicker to search; apart, one that is in RAM already serves a memory that has grown since.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from nearest.index.approximate import ApproximateIndex
from nearest.index.neighbours import NO_ENTRY, Neighbours, sort_nearest_first


class TogetherIndex:
    """Several indexes as one; index i holds the ids from firsts[i] to firsts[i + 1] − 1."""

    exact = False

    def __init__(self, parts: Sequence[ApproximateIndex], firsts: Sequence[int]) -> None:
        """`firsts` rise, one for each part."""
        self.parts, self._firsts = parts, np.asarray(firsts)
        self.entries = sum(part.entries for part in parts)
        self.most = sum(part.most for part in parts)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries of all parts by their codes, nearest first."""
        found = [part.search(queries, min(k, part.entries)) for part in self.parts]
        ids, distances = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        return sort_nearest_first(Neighbours(ids, distances), k)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Distances to the codes of chosen entries; +inf for id -1."""
        owner = np.searchsorted(self._firsts, ids, side="right") - 1
        distances = np.full(ids.shape, np.inf, np.float32)
        for number, part in enumerate(self.parts):
            own = np.where(owner == number, ids, NO_ENTRY)
            np.minimum(distances, part.distances(queries, own), out=distances)
        return distances
