"""Costs of the stages of a build, measured on a sample."""

import hashlib
import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.approximate import ApproximateIndex
from nearest.index.building import (
    code_bytes,
    fill_index,
    number_of_lists,
    rows_at_once,
    sample_size,
    train_index,
)
from nearest.index.choice import EXACT, resolve_spec
from nearest.index.exact import BLOCK_BYTES, ExactIndex
from nearest.index.keys import FloatKeys
from nearest.index.search import Searched, Searcher
from nearest.index.suffix import sort_suffixes
from nearest.index.tuning import RECALL_AT, RECALL_QUERIES, measured_recall

_HASHED = 1 << 22  # bytes
_INDEX_ROWS = 16_384
_TRIALS = 8  # of ways to search, of which the cheapest is taken
_LISTS_GROW = 1.4  # room that inverted lists take while they grow, by what they hold in the end


class IndexCost(NamedTuple):
    """Cost of an index: seconds to build, bytes on disk, peak bytes of RAM."""

    seconds: float
    bytes_needed: int
    memory_bytes: int


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def hashing() -> float:
    """Seconds to checksum one byte."""
    data = bytes(_HASHED)
    return timed(lambda: hashlib.sha256(data)) / len(data)


def sorting(tokens: Tokens, wanted: int) -> float:
    """Seconds to sort the suffixes of `wanted` tokens; the growth is superlinear."""

    def seconds(count: int) -> float:
        return timed(lambda: sort_suffixes(tokens[:count], np.ones(count, bool)))

    loading = seconds(min(len(tokens), 1000))
    whole, part = seconds(len(tokens)), seconds(max(1, len(tokens) // 4))
    power = min(1.4, max(1.0, math.log(max(whole, 1e-9) / max(part, 1e-9), 4)))
    return loading + float(whole * (wanted / len(tokens)) ** power)


def indexing(entries: int, dim: int, spec: str, recall: float) -> IndexCost:
    """Build a small index of random keys, and scale what that takes.

    Training and filling compare keys with all centroids; tuning scans all keys.
    """
    spec = resolve_spec(spec, entries, dim, recall=recall)
    if spec == EXACT:
        return IndexCost(0.0, 0, 0)
    rng = np.random.default_rng(0)
    count = min(entries, _INDEX_ROWS)
    keys = FloatKeys(rng.normal(size=(count, dim)).astype(np.float16), "l2")
    ids: Int[np.ndarray, " m"] = np.arange(count)
    lists = number_of_lists(spec, dim)
    few = min(lists, 256)
    small = re.sub(r"IVF\d+", f"IVF{few}", spec)
    made: list[Any] = []
    training = timed(lambda: made.append(train_index(keys, ids, small, rng)))
    filling = timed(lambda: fill_index(made[0], keys, ids, small))
    exact = ExactIndex(keys, ids)
    queries = keys.rows(ids[:RECALL_QUERIES])
    scanning = timed(lambda: exact.search(queries, RECALL_AT + 1))
    searched = Searched(ApproximateIndex(made[0], keys.metric), count, RECALL_AT)
    searcher = Searcher([searched], keys)
    trying = timed(lambda: measured_recall(searcher, keys, ids, exact, rng)) - scanning
    more = lists / few if few else 1.0
    trained = min(entries, sample_size(dim, lists))
    seconds = training * trained / count * more
    seconds += (filling * more + scanning) * entries / count + _TRIALS * max(trying, 0.0)
    size = entries * (code_bytes(spec, dim) + 8) + 8 * dim * lists
    # Rows are read a block at a time, as they are stored and as float32: a larger one for tuning.
    block = 6 * dim * min(entries, max(rows_at_once(dim), BLOCK_BYTES // (4 * dim)))
    memory = max(4 * dim * trained, int(_LISTS_GROW * size)) + block
    return IndexCost(seconds, size, memory)
