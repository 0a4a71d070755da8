"""Answers of shards put together, equal to those of one process that holds all segments."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from nearest.index.ids import random_order
from nearest.index.matches import Matches
from nearest.index.neighbours import NO_ENTRY
from nearest.index.ngrams import SAMPLED, Ngrams, distinct
from nearest.index.search import Fetched

_LAST = np.uint64(2**64 - 1)


def nearest_of(found: Sequence[Fetched], queries: int, wanted: int, *, exact: bool) -> Fetched:
    """The `wanted` nearest by codes of what shards have of a group; all, where codes are keys."""
    nothing = [np.empty((queries, 0), dtype) for dtype in (np.int64, np.float32, np.float32)]
    arrays = [np.concatenate(some, axis=1) for some in zip(nothing, *found, strict=True)]
    # In the order of one index, so that sums over them are rounded as they are there.
    order = np.lexsort((random_order(arrays[0]), arrays[1]), axis=1)
    order = order if exact else order[:, :wanted]
    arrays = [np.take_along_axis(array, order, axis=1) for array in arrays]
    missing = ((0, 0), (0, max(0, wanted - arrays[0].shape[1])))  # where shards are lost
    return Fetched(
        np.pad(arrays[0], missing, constant_values=NO_ENTRY),
        *(np.pad(array, missing, constant_values=np.inf) for array in arrays[1:]),
    )


def longest_of(
    found: Sequence[Matches], queries: int, most: int, bounds: Int[np.ndarray, " segments_plus_1"]
) -> Matches:
    """The matches of a whole corpus from those of its shards, in the order of one process.

    Longest first; those of one length in the order of segments, in which shards tell them. If they
    do not all fit, those that come first in the random order of ids are taken.
    """
    ids = np.concatenate([np.full((queries, most), NO_ENTRY), *(one.ids for one in found)], axis=1)
    lengths = np.concatenate(
        [np.zeros((queries, most), np.int16), *(one.lengths for one in found)], axis=1
    )
    rank = np.where(ids < 0, _LAST, random_order(ids))
    taken = np.zeros(ids.shape, dtype=bool)
    first = np.lexsort((rank, -lengths.astype(np.int64)), axis=1)[:, :most]
    np.put_along_axis(taken, first, True, axis=1)
    segment = np.searchsorted(bounds, ids, side="right")
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    order = np.lexsort((place, segment, -lengths.astype(np.int64), ~taken), axis=1)[:, :most]
    longest = np.zeros(queries, np.int64)
    if found:
        each = np.stack([one.lengths.max(axis=1, initial=0) for one in found])
        counts = np.stack([one.longest for one in found])
        longest = np.where(each == each.max(axis=0), counts, 0).sum(axis=0)
    return Matches(
        np.take_along_axis(ids, order, axis=1), np.take_along_axis(lengths, order, axis=1), longest
    )


def ngrams_of(found: Sequence[Mapping[str, np.ndarray]], shape: tuple[int, int]) -> Ngrams:
    """Counts of a whole corpus, and distinct successors in a sample of it, from its shards."""
    counts = np.zeros(shape, np.int64)
    ids = [np.empty((*shape, 0), np.int64)]
    values = [np.empty((*shape, 0), np.int64)]
    for one in found:
        counts += one["counts"]
        ids.append(one["ids"])
        values.append(one["values"])
    every, after = np.concatenate(ids, axis=2), np.concatenate(values, axis=2)
    rank = np.where(every < 0, _LAST, random_order(every))
    order = np.argsort(rank, axis=2)[:, :, :SAMPLED]
    return Ngrams(counts, distinct(np.take_along_axis(after, order, axis=2)))
