"""The search for neighbours that filters leave."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8

from nearest.errors import SettingError
from nearest.index.neighbours import NO_ENTRY, Neighbours
from nearest.retro.data.filters import KEPT, REASONS, Judge

Search = Callable[[Int[np.ndarray, " rows"], int], Neighbours]
"""Rows of a block of queries, and k → the k nearest chunks of each."""


@dataclass(frozen=True)
class Found:
    """Neighbours of some query chunks, and the candidates struck out before the last of them.

    Attributes:
        kept: padded to k.
        struck: how many of each row's candidates, by reason, in the order of REASONS.
    """

    kept: Neighbours
    struck: Int[np.ndarray, "q reasons"]

    @property
    def short(self) -> int:
        """Rows with fewer than k neighbours."""
        return int((self.kept.ids[:, -1] < 0).sum())


def valid_neighbours(
    query_ids: Int[np.ndarray, " q"], search: Search, judge: Judge, k: int, margin: int = 4
) -> Found:
    """The k nearest chunks that no filter strikes out.

    k + margin are looked for; for rows with too few of them the margin grows fourfold, until there
    are enough or there is nothing more to be found.

    Raises:
        SettingError: k is below 1.
    """
    if k < 1:
        raise SettingError(f"neighbours must be at least 1, got {k}")
    ids = np.full((len(query_ids), k), NO_ENTRY, np.int64)
    distances = np.full((len(query_ids), k), np.inf, np.float32)
    struck = np.zeros((len(query_ids), len(REASONS)), np.int64)
    total, wanted = len(judge.database), k + margin
    todo = np.arange(len(query_ids))
    while len(todo):
        found = search(todo, min(wanted, total))
        reasons = judge(query_ids[todo], found.ids)
        valid = (found.ids >= 0) & (reasons == KEPT)
        enough = valid.sum(1) >= k
        exhausted = wanted >= total or found.ids.shape[1] < min(wanted, total)
        done = enough | exhausted | (found.ids[:, -1:] < 0).any(1)
        _take(valid[done], found.ids[done], found.distances[done], todo[done], ids, distances)
        struck[todo[done]] = _count(reasons[done], valid[done], k)
        todo = todo[~done]
        wanted = k + (wanted - k) * 4 if wanted > k else k + 4
    return Found(Neighbours(ids, distances), struck)


def _take(
    valid: np.ndarray,
    found: np.ndarray,
    far: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    distances: np.ndarray,
) -> None:
    """Write the first valid ones of each row, in their order."""
    k = min(ids.shape[1], valid.shape[1])
    order = np.argsort(~valid, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(valid, order, 1)
    ids[rows, :k] = np.where(kept, np.take_along_axis(found, order, 1), NO_ENTRY)
    distances[rows, :k] = np.where(kept, np.take_along_axis(far, order, 1), np.inf)


def _count(
    reasons: UInt8[np.ndarray, "q n"], valid: Bool[np.ndarray, "q n"], k: int
) -> Int[np.ndarray, "q reasons"]:
    """Candidates struck out for each reason, up to each row's k-th valid one.

    So the count is the same whatever margin was searched with.
    """
    before = valid.cumsum(1) - valid < k
    return np.stack(
        [(before & (reasons == number)).sum(1) for number in range(1, len(REASONS) + 1)], axis=1
    )
