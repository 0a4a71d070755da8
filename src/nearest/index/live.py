"""An index of which some entries were taken back: it finds the nearest of the others."""

import numpy as np
from jaxtyping import Bool, Float, Int

from nearest.index.neighbours import NO_ENTRY, MeasuringIndex, Neighbours, sort_nearest_first

_SPARE = 16  # more than asked for, so that few queries need a second search


class LiveIndex:
    """Searches for more than is wanted and drops what was taken back.

    Few kinds of index can forget an entry, or search around it. More is fetched until every query
    has what it wants or its index has no more to give.
    """

    def __init__(self, index: MeasuringIndex, entries: int, gone: Bool[np.ndarray, " n"]) -> None:
        """`entries`: how many the index holds; `gone` says of each id whether it was taken back."""
        self._index, self._entries, self._gone = index, entries, gone

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest entries that are left."""
        left_share = max(1 - float(self._gone.mean()), 0.5)
        wanted = min(int(k / left_share) + _SPARE, self._entries)
        while True:
            found = self._index.search(queries, wanted)
            left = (found.ids >= 0) & ~self._gone[found.ids]
            enough = (left.sum(axis=1) >= k) | (found.ids < 0).any(axis=1)
            if wanted == self._entries or enough.all():
                break
            wanted = min(2 * wanted, self._entries)
        ids = np.where(left, found.ids, NO_ENTRY)
        distances = np.where(left, found.distances, np.float32(np.inf))
        return sort_nearest_first(Neighbours(ids, distances), k)

    def distances(
        self, queries: Float[np.ndarray, "q dim"], ids: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k"]:
        """Those of the index."""
        return self._index.distances(queries, ids)
