"""Search among the vectors of chunks, and the search for neighbours that filters leave."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex, inverted_lists
from nearest.index.building import build_index, check_spec
from nearest.index.choice import AUTO, EXACT, EXACT_BELOW, fitting_lists
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import NO_ENTRY, Neighbours
from nearest.index.search import Searched, Searcher
from nearest.index.tuning import recall as share_found
from nearest.retro.data.filters import KEPT, REASONS, Judge

RECALL_AT = 4
RECALL = 0.95
_RECALL_QUERIES = 1024
_RERANKED = 16  # candidates beyond k, which the index's codes order roughly


@dataclass(frozen=True)
class IndexRecord:
    """What an index is and how it is searched; `recall` is recall@4 against exact search."""

    spec: str
    nprobe: int | None
    recall: float


class ChunkIndex:
    """Finds the nearest vectors; squared L2 distances by the stored vectors, not by codes."""

    def __init__(
        self, embeddings: Float[np.ndarray, "n dim"], record: IndexRecord, faiss_index: Any = None
    ) -> None:
        self.record = record
        self.faiss_index = faiss_index
        self.entries, self.dim = embeddings.shape
        keys = FloatKeys(embeddings, "l2")
        backend = (
            ExactIndex(keys, np.arange(self.entries))
            if faiss_index is None
            else ApproximateIndex(faiss_index, "l2", record.nprobe)
        )
        self._searcher = Searcher([Searched(backend, self.entries, _RERANKED)], keys)

    @classmethod
    def build(
        cls,
        embeddings: Float[np.ndarray, "n dim"],
        spec: str = AUTO,
        recall: float = RECALL,
        seed: int = 0,
    ) -> "ChunkIndex":
        """Exact for fewer than 50,000 vectors, else inverted lists searched to a recall@4.

        Args:
            embeddings: float32 or float16; may be a memory map.
            spec: "auto", "exact", or a FAISS index_factory string. Fewer vectors than an index has
                lists are searched exactly, whatever was asked for.
            recall: recall@4 on a sample of the vectors; as many lists are probed as it takes.
            seed: of the training sample.

        Raises:
            SettingError: FAISS does not know the string, or the recall is out of (0, 1].
        """
        if not 0 < recall <= 1:
            raise SettingError(f"recall must lie in (0, 1], got {recall}")
        count, dim = embeddings.shape
        if spec == AUTO:
            spec = f"IVF{fitting_lists(count)},SQ8" if count >= EXACT_BELOW else EXACT
        exact = cls(embeddings, IndexRecord(EXACT, None, 1.0))
        if spec != EXACT:
            check_spec(spec, dim, None)
        if spec == EXACT or _too_few(spec, count):
            return exact
        rng = np.random.default_rng(seed)
        built = build_index(FloatKeys(embeddings, "l2"), np.arange(count), spec, rng)
        sample = np.sort(rng.choice(count, min(_RECALL_QUERIES, count), replace=False))
        queries = np.asarray(embeddings[sample], dtype=np.float32)
        at = min(RECALL_AT, count)
        truth = exact.search(queries, at).ids
        ivf = inverted_lists(built)
        lists = 0 if ivf is None else int(ivf.nlist)
        nprobe = min(1, lists) or None
        while True:
            found = cls(embeddings, IndexRecord(spec, nprobe, 0.0), built)
            reached = share_found(found.search(queries, at).ids, truth)
            if nprobe is None or reached >= recall or nprobe >= lists:
                return cls(embeddings, IndexRecord(spec, nprobe, round(reached, 4)), built)
            nprobe = min(2 * nprobe, lists)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest of each query, fewer where there are; ties in the random order of ids."""
        return self._searcher.search(np.ascontiguousarray(queries, dtype=np.float32), k)


def _too_few(spec: str, count: int) -> bool:
    """Whether so few vectors cannot train such an index: exact search is as quick then."""
    from nearest.index.building import number_of_lists

    lists = 0 if spec == EXACT else number_of_lists(spec, 64) if "PQ" not in spec else 0
    return count < max(256 if "PQ" in spec or "OPQ" in spec else 0, lists)


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
