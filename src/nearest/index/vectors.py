"""An index of vectors that is searched to a recall@4, for those who want few neighbours."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex, inverted_lists
from nearest.index.building import build_index, check_spec, number_of_lists
from nearest.index.choice import AUTO, EXACT, EXACT_BELOW, fitting_lists
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.index.neighbours import Neighbours
from nearest.index.product import CENTROIDS
from nearest.index.search import Searched, Searcher
from nearest.index.tuning import recall as share_found

RECALL_AT = 4
RECALL = 0.95
_RECALL_QUERIES = 1024
RERANKED = 16  # candidates beyond k, which the index's codes order roughly


@dataclass(frozen=True)
class VectorIndexRecord:
    """What an index is and how it is searched; `recall` is recall@4 against exact search."""

    spec: str
    nprobe: int | None
    recall: float


class VectorIndex:
    """Finds the nearest vectors; squared L2 distances by the stored vectors, not by codes."""

    def __init__(
        self,
        embeddings: Float[np.ndarray, "n dim"],
        record: VectorIndexRecord,
        faiss_index: Any = None,
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
        self._searcher = Searcher([Searched(backend, self.entries, RERANKED)], keys)

    @classmethod
    def build(
        cls,
        embeddings: Float[np.ndarray, "n dim"],
        spec: str = AUTO,
        recall: float = RECALL,
        seed: int = 0,
    ) -> "VectorIndex":
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
        exact = cls(embeddings, VectorIndexRecord(EXACT, None, 1.0))
        if spec != EXACT:
            check_spec(spec, dim, None)
        if spec == EXACT or count < _fewest(spec, dim):
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
            found = cls(embeddings, VectorIndexRecord(spec, nprobe, 0.0), built)
            reached = share_found(found.search(queries, at).ids, truth)
            if nprobe is None or reached >= recall or nprobe >= lists:
                return cls(embeddings, VectorIndexRecord(spec, nprobe, round(reached, 4)), built)
            nprobe = min(2 * nprobe, lists)

    def search(self, queries: Float[np.ndarray, "q dim"], k: int) -> Neighbours:
        """The k nearest of each query, fewer where there are; ties in the random order of ids."""
        return self._searcher.search(np.ascontiguousarray(queries, dtype=np.float32), k)


def _fewest(spec: str, dim: int) -> int:
    """Vectors that such an index needs to be trained: exact search is as quick for fewer."""
    return max(number_of_lists(spec, dim), CENTROIDS if "PQ" in spec else 0)
