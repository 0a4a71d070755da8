"""An index of vectors that is searched to a recall@4, for those who want few neighbours."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nearest.errors import SettingError
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import build_index, check_spec, number_of_lists
from nearest.index.choice import AUTO, EXACT, EXACT_BELOW, fitting_lists
from nearest.index.exact import ExactIndex
from nearest.index.keys import FloatKeys
from nearest.index.product import CENTROIDS
from nearest.index.search import Searched, Searcher
from nearest.index.tuning import recall as share_found

RECALL_AT = 4
RECALL = 0.95
_RECALL_QUERIES = 1024
_SEED = 0
RERANKED = 16  # candidates beyond k, which the index's codes order roughly


class BuiltIndex(NamedTuple):
    """How vectors are searched; `recall` is recall@4 against exact search, which has no index."""

    spec: str
    nprobe: int | None
    recall: float
    faiss_index: Any = None

    def searcher(self, vectors: Float[np.ndarray, "n dim"]) -> Searcher:
        """Finds the nearest; squared L2 distances by the stored vectors, not by codes."""
        keys, count = FloatKeys(vectors, "l2"), len(vectors)
        backend = (
            ExactIndex(keys, np.arange(count))
            if self.faiss_index is None
            else ApproximateIndex(self.faiss_index, "l2", self.nprobe)
        )
        return Searcher([Searched(backend, count, RERANKED)], keys)


def build_vector_index(
    vectors: Float[np.ndarray, "n dim"], spec: str = AUTO, recall: float = RECALL
) -> BuiltIndex:
    """Exact for fewer than 50,000 vectors, else inverted lists searched to a recall@4.

    Args:
        vectors: float32 or float16; may be a memory map.
        spec: "auto", "exact", or a FAISS index_factory string. Fewer vectors than an index has
            lists are searched exactly, whatever was asked for.
        recall: recall@4 on a sample of the vectors; as many lists are probed as it takes.

    Raises:
        SettingError: FAISS does not know the string, or the recall is out of (0, 1].
    """
    if not 0 < recall <= 1:
        raise SettingError(f"recall must lie in (0, 1], got {recall}")
    count, dim = vectors.shape
    if spec == AUTO:
        spec = f"IVF{fitting_lists(count)},SQ8" if count >= EXACT_BELOW else EXACT
    exact = BuiltIndex(EXACT, None, 1.0)
    if spec != EXACT:
        check_spec(spec, dim, None)
    if spec == EXACT or count < _fewest(spec, dim):
        return exact
    rng = np.random.default_rng(_SEED)
    index = build_index(FloatKeys(vectors, "l2"), np.arange(count), spec, rng)
    sample = np.sort(rng.choice(count, min(_RECALL_QUERIES, count), replace=False))
    queries = np.asarray(vectors[sample], dtype=np.float32)
    at = min(RECALL_AT, count)
    truth = exact.searcher(vectors).search(queries, at).ids
    lists = number_of_lists(spec, dim)
    nprobe = min(1, lists) or None
    while True:
        built = BuiltIndex(spec, nprobe, 0.0, index)
        reached = share_found(built.searcher(vectors).search(queries, at).ids, truth)
        if nprobe is None or reached >= recall or nprobe >= lists:
            return built._replace(recall=round(reached, 4))
        nprobe = min(2 * nprobe, lists)


def _fewest(spec: str, dim: int) -> int:
    """Vectors that such an index needs to be trained: exact search is as quick for fewer."""
    return max(number_of_lists(spec, dim), CENTROIDS if "PQ" in spec else 0)
