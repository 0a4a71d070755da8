"""Distances between queries and chosen keys: gather, decode and reduce in one pass.

The keys stay in their file as float16; numba has no such type, so the kernel reads them as uint16
and lets the processor widen them. `key_distances_reference` is the same in plain numpy.
"""

from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nearest.index.neighbours import Metric
from nearest.index.threads import in_threads


def key_distances(
    keys: Float[np.ndarray, "n dim"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
) -> Float[np.ndarray, "q k"]:
    """Distance of query i to keys[ids[i, j]]: squared L2, or the negated inner product.

    Keys are float16, queries float32, the result float32; id -1 gives +inf.
    """
    distances = np.empty(ids.shape, dtype=np.float32)
    bits = keys.view(np.uint16)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    ids = np.ascontiguousarray(ids)

    def work(part: slice) -> None:
        _distances(bits, queries[part], ids[part], metric == "l2", distances[part])

    in_threads(work, len(queries))
    return distances


def key_distances_reference(
    keys: Float[np.ndarray, "n dim"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
) -> Float[np.ndarray, "q k"]:
    """What `key_distances` computes, in numpy and float64."""
    rows = keys[ids].astype(np.float64)
    wide = queries[:, None].astype(np.float64)
    distances = ((rows - wide) ** 2).sum(-1) if metric == "l2" else -(rows * wide).sum(-1)
    return np.where(ids < 0, np.inf, distances).astype(np.float32)


def _widen_float16(_context: Any, half: Any) -> Any:
    """float16 bits (uint16) → float32."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


_widen: Any = intrinsic(_widen_float16)


@no_type_check  # numba compiles the bare function
@numba.njit(
    "void(Array(uint16, 2, 'C', readonly=True), float32[:, ::1], int64[:, ::1], boolean, "
    "float32[:, ::1])",
    nogil=True,
    fastmath={"reassoc", "contract", "nsz"},
    cache=True,
)
def _distances(keys: Any, queries: Any, ids: Any, is_l2: bool, distances: Any) -> None:
    for i in range(len(queries)):
        query = queries[i]
        for j in range(ids.shape[1]):
            entry = ids[i, j]
            total = np.float32(0)
            if entry < 0:
                total = np.float32(np.inf)
            elif is_l2:
                key = keys[entry]
                for d in range(len(query)):
                    gap = _widen(key[d]) - query[d]
                    total += gap * gap
            else:
                key = keys[entry]
                for d in range(len(query)):
                    total -= _widen(key[d]) * query[d]
            distances[i, j] = total
