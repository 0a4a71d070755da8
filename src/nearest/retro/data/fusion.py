"""Lists of neighbours that were found in several ways, as one."""

import numpy as np

from nearest.index.neighbours import NO_ENTRY, Neighbours, sort_nearest_first

_RRF = 60  # Cormack et al., 2009


def fused(lists: list[Neighbours], k: int) -> Neighbours:
    """Reciprocal-rank fusion: each list gives 1 / (60 + rank) to what it found.

    Distances are the sums negated.
    """
    ids = np.concatenate([found.ids for found in lists], axis=1)
    shares = [
        np.broadcast_to(1.0 / (_RRF + 1 + np.arange(found.ids.shape[1])), found.ids.shape)
        for found in lists
    ]
    weights = np.where(ids >= 0, np.concatenate(shares, axis=1), 0.0)
    order = np.argsort(ids, axis=1, kind="stable")
    ids, weights = (np.take_along_axis(array, order, 1) for array in (ids, weights))
    same = np.diff(ids, axis=1, prepend=-2) == 0
    for column in range(ids.shape[1] - 1, 0, -1):  # sums gather at the first of equal ids
        weights[:, column - 1] += np.where(same[:, column], weights[:, column], 0)
    first = ~same & (ids >= 0)
    distances = np.where(first, -weights, np.inf).astype(np.float32)
    return sort_nearest_first(Neighbours(np.where(first, ids, NO_ENTRY), distances), k)
