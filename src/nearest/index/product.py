"""Product-quantised keys (Jégou et al., 2011): a byte for each part of a key.

A key is cut into parts, and each part replaced by the nearest of 256 centroids. The distances from
the parts of a query to all centroids are computed once; a key's distance is a sum of look-ups.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int, UInt8

from nearest.errors import SettingError
from nearest.index.distances import AHEAD, WHOLE, Shard, measured, prefetch
from nearest.index.faiss_module import load_faiss
from nearest.index.neighbours import Metric
from nearest.machine import code_can_be_cached

CENTROIDS = 256


def product_parts(name: str) -> int | None:
    """M of the key format pqM; None for other names."""
    found = re.fullmatch("pq([1-9][0-9]{0,4})", name, re.ASCII)
    return None if found is None else int(found[1])


def train_codebooks(
    rows: Float[np.ndarray, "n dim"], parts: int, rng: np.random.Generator
) -> Float[np.ndarray, "parts 256 part_dim"]:
    """Centroids of every part of float32 rows, by k-means.

    Raises:
        SettingError: the dimension is no multiple of the number of parts.
    """
    dim = rows.shape[1]
    if not 1 <= parts <= dim or dim % parts:
        raise SettingError(
            f"keys of {dim} dims cannot be cut into {parts} equal parts: choose pqM with an M that "
            f"divides {dim}"
        )
    quantiser = load_faiss().ProductQuantizer(dim, parts, 8)
    quantiser.cp.seed = int(rng.integers(1 << 31))
    quantiser.cp.min_points_per_centroid = 1
    quantiser.train(np.resize(rows, (max(len(rows), CENTROIDS), dim)))  # few rows are repeated
    centroids = load_faiss().vector_to_array(quantiser.centroids)
    codebooks: Float[np.ndarray, "parts 256 part_dim"] = centroids.reshape(parts, CENTROIDS, -1)
    return codebooks


class ProductKeys:
    """uint8 codes [n, parts], each the number of a centroid of its part."""

    def __init__(
        self,
        codes: UInt8[np.ndarray, "n parts"],
        codebooks: Float[np.ndarray, "parts 256 part_dim"],
        metric: Metric,
    ) -> None:
        self._codes, self._codebooks = np.asarray(codes), codebooks
        # Centroids in the last axis, so that a table of distances is filled vector by vector.
        self._by_dim = np.ascontiguousarray(codebooks.transpose(0, 2, 1))
        self.metric = metric
        self.dim = codebooks.shape[0] * codebooks.shape[2]

    def rows(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m dim"]:
        parts = self._codebooks[np.arange(len(self._codebooks)), self._codes[ids]]
        rows: Float[np.ndarray, "m dim"] = parts.reshape(len(ids), self.dim)
        return rows

    def distances(
        self,
        queries: Float[np.ndarray, "q dim"],
        ids: Int[np.ndarray, "q k"],
        shard: Shard = WHOLE,
    ) -> Float[np.ndarray, "q k"]:
        stored = self._codes, self._by_dim
        return measured(_product_distances, stored, queries, ids, self.metric, shard)

    def problems(self) -> list[str]:
        return [] if np.isfinite(self._codebooks).all() else ["a centroid of keys is not finite"]


@dataclass(frozen=True)
class ProductFormat:
    """A byte for each part of a key. The centroids belong to the whole memory."""

    codebooks: Float[np.ndarray, "parts 256 part_dim"]
    largest: float = 1e15  # sums of larger squares might overflow float32

    @property
    def name(self) -> str:
        return f"pq{len(self.codebooks)}"

    def layout(self, dim: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return {"keys": (np.dtype(np.uint8), (len(self.codebooks),))}

    def encode(self, rows: Float[np.ndarray, "m dim"]) -> dict[str, np.ndarray]:
        return {"keys": self._quantiser.compute_codes(np.ascontiguousarray(rows, np.float32))}

    def open(self, arrays: Mapping[str, np.ndarray], metric: Metric) -> ProductKeys:
        return ProductKeys(arrays["keys"], self.codebooks, metric)

    @cached_property
    def _quantiser(self) -> Any:
        faiss = load_faiss()
        parts, _, part_dim = self.codebooks.shape
        quantiser = faiss.ProductQuantizer(parts * part_dim, parts, 8)
        faiss.copy_array_to_vector(self.codebooks.ravel(), quantiser.centroids)
        return quantiser


@no_type_check  # numba compiles the bare function
@numba.njit(
    "void(Array(uint8, 2, 'C', readonly=True), Array(float32, 3, 'C', readonly=True), "
    "float32[:, ::1], int64[:, ::1], int64, boolean, float32[:, ::1])",
    nogil=True,
    fastmath={"reassoc", "contract", "nsz"},
    cache=code_can_be_cached(),
)
def _product_distances(
    codes: Any, codebooks: Any, queries: Any, ids: Any, first: int, is_l2: bool, distances: Any
) -> None:
    parts, part_dim, centroids = codebooks.shape
    table = np.empty((parts, centroids), np.float32)
    last, size = ids.shape[1] - 1, len(codes)
    for i in range(len(queries)):
        table[:] = 0
        for m in range(parts):
            for d in range(part_dim):
                value = queries[i, m * part_dim + d]
                for c in range(centroids):
                    if is_l2:
                        table[m, c] += (codebooks[m, d, c] - value) ** 2
                    else:
                        table[m, c] -= codebooks[m, d, c] * value
        for j in range(ids.shape[1]):
            soon = ids[i, min(j + AHEAD, last)] - first
            if 0 <= soon < size:
                for m in range(0, parts, 64):
                    prefetch(codes, soon, m)
            entry = ids[i, j] - first
            if not 0 <= entry < size:
                continue
            total = np.float32(0)
            for m in range(parts):
                total += table[m, codes[entry, m]]
            distances[i, j] = total
