"""Distances between queries and chosen keys: gather, decode and reduce in one pass.

Keys are read from their files as they are stored: float16, or int8 with one scale a row. Numba has
no float16, so the kernel reads uint16 and converts it by the processor's own instruction. Each
kernel has a reference in plain numpy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int, Int8
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nearest.index.neighbours import Metric
from nearest.index.threads import in_threads
from nearest.machine import code_can_be_cached

AHEAD = 8  # rows are prefetched this many entries before they are read


class Shard(NamedTuple):
    """A shard's offset in the global id space, and the output array it writes into.

    Ids from `first` on are rows of the shard. Distances to other ids are left as they are in
    `into`; without it, a new array is filled with +inf.
    """

    first: int = 0
    into: Float[np.ndarray, "q k"] | None = None


WHOLE = Shard()


def key_distances(
    keys: Float[np.ndarray, "n dim"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
    shard: Shard = WHOLE,
) -> Float[np.ndarray, "q k"]:
    """Distance of query i to keys[ids[i, j]]: squared L2, or the negated inner product.

    Keys are float16 or float32, queries and distances float32. An id that is no row gives +inf.
    """
    stored = keys.view(np.uint16) if keys.dtype == np.float16 else keys
    return measured(_distances, (stored,), queries, ids, metric, shard)


def scaled_key_distances(
    codes: Int8[np.ndarray, "n dim"],
    scales: Float[np.ndarray, " n"],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
    shard: Shard = WHOLE,
) -> Float[np.ndarray, "q k"]:
    """`key_distances` for keys stored as int8 codes, each row times its own float32 scale."""
    return measured(_scaled_distances, (codes, scales[:, None]), queries, ids, metric, shard)


def measured(
    kernel: Callable[..., None],
    stored: tuple[np.ndarray, ...],
    queries: Float[np.ndarray, "q dim"],
    ids: Int[np.ndarray, "q k"],
    metric: Metric,
    shard: Shard,
) -> Float[np.ndarray, "q k"]:
    """Run a kernel over all queries, shared among threads."""
    distances = shard.into
    if distances is None:
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    ids = np.ascontiguousarray(ids)

    def work(some: slice) -> None:
        kernel(*stored, queries[some], ids[some], shard.first, metric == "l2", distances[some])

    in_threads(work, len(queries))
    return distances


def _widen_stored(_context: Any, stored: Any) -> Any:
    """float16 bits (uint16) → float32; float32 stays."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if stored == types.float32:
            return args[0]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(stored), generate


def _ask_for(_context: Any, array: Any, row: Any, column: Any) -> Any:
    """Prefetch array[row, column] into the cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        place = cgutils.get_item_pointer(
            context, builder, signature.args[0], struct, list(args[1:]), wraparound=False
        )
        pointer = builder.bitcast(place, ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        prefetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag]),
            "llvm.prefetch.p0",
        )
        builder.call(prefetch, [pointer, flag(0), flag(3), flag(1)])  # for reading; keep; data
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), generate


_widen: Any = intrinsic(_widen_stored)
prefetch: Any = intrinsic(_ask_for)


@no_type_check  # numba compiles the bare function
@numba.njit(
    [
        f"void(Array({stored}, 2, 'C', readonly=True), float32[:, ::1], int64[:, ::1], int64, "
        "boolean, float32[:, ::1])"
        for stored in ("uint16", "float32")
    ],
    nogil=True,
    fastmath={"reassoc", "contract", "nsz"},
    cache=code_can_be_cached(),
)
def _distances(keys: Any, queries: Any, ids: Any, first: int, is_l2: bool, distances: Any) -> None:
    last, size = ids.shape[1] - 1, len(keys)
    for i in range(len(queries)):
        query = queries[i]
        for j in range(ids.shape[1]):
            soon = ids[i, min(j + AHEAD, last)] - first
            if 0 <= soon < size:
                for d in range(0, len(query), 64 // keys.itemsize):
                    prefetch(keys, soon, d)
            entry = ids[i, j] - first
            if not 0 <= entry < size:
                continue
            total = np.float32(0)
            if is_l2:
                key = keys[entry]
                for d in range(len(query)):
                    gap = _widen(key[d]) - query[d]
                    total += gap * gap
            else:
                key = keys[entry]
                for d in range(len(query)):
                    total -= _widen(key[d]) * query[d]
            distances[i, j] = total


@no_type_check
@numba.njit(
    "void(Array(int8, 2, 'C', readonly=True), Array(float32, 2, 'C', readonly=True), "
    "float32[:, ::1], int64[:, ::1], int64, boolean, float32[:, ::1])",
    nogil=True,
    fastmath={"reassoc", "contract", "nsz"},
    cache=code_can_be_cached(),
)
def _scaled_distances(
    codes: Any, scales: Any, queries: Any, ids: Any, first: int, is_l2: bool, distances: Any
) -> None:
    last, size = ids.shape[1] - 1, len(codes)
    for i in range(len(queries)):
        query = queries[i]
        for j in range(ids.shape[1]):
            soon = ids[i, min(j + AHEAD, last)] - first
            if 0 <= soon < size:
                prefetch(scales, soon, 0)
                for d in range(0, len(query), 64):
                    prefetch(codes, soon, d)
            entry = ids[i, j] - first
            if not 0 <= entry < size:
                continue
            total = np.float32(0)
            if is_l2:  # of differences: |q|² − 2q·k + |k|² would cancel, and is no faster
                code, scale = codes[entry], scales[entry, 0]
                for d in range(len(query)):
                    gap = scale * np.float32(code[d]) - query[d]
                    total += gap * gap
            else:
                code = codes[entry]
                for d in range(len(query)):
                    total -= np.float32(code[d]) * query[d]
                total *= scales[entry, 0]
            distances[i, j] = total
