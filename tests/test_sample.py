"""Samples of entries: what comes first in one random order, however a corpus is divided."""

from itertools import pairwise

import numpy as np
import pytest

from nearest.index.ids import random_order
from nearest.index.matches import longest_matches
from nearest.index.sample import sample
from nearest.index.suffix import SuffixArray, sort_suffixes
from nearest.store.parts.corpus import valued_mask
from suffix_oracle import longest_matches_reference

START = 0


def array_of(entries: int, first: int = 0) -> SuffixArray:
    """An array in any order; sampling looks at nothing but places and ids."""
    order = np.random.default_rng(entries).permutation(entries).astype(np.int32)
    return SuffixArray(np.zeros(entries, np.uint16), order, first)


def drawn(arrays: list[SuffixArray], runs: np.ndarray, wanted: int) -> np.ndarray:
    """The sample of one query whose runs are [array, run, (begin, end)]."""
    ids = np.full((1, wanted), -1)
    sample(arrays, runs[..., :1], runs[..., 1:], np.array([wanted]), np.array([0]), ids)
    return ids[0]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [1, 5, 300, 4_000, 30_000])
def test_a_sample_is_what_comes_first(wanted: int) -> None:
    """Found by lists of early entries or without, in two runs of each of three arrays."""
    arrays = [array_of(20_000), array_of(300, 20_000), array_of(30_000, 20_300)]
    runs = np.array([[[5, 4_000], [9_000, 20_000]], [[0, 0], [10, 290]], [[3, 9], [20, 29_990]]])
    ids = np.concatenate(
        [
            array.suffixes[begin:end] + array.first
            for array, own in zip(arrays, runs, strict=True)
            for begin, end in own
        ]
    )
    first = np.argsort(random_order(ids))[:wanted]
    np.testing.assert_array_equal(drawn(arrays, runs, wanted), ids[np.sort(first)])


def test_early_entries_are_listed_ever_more_briefly() -> None:
    array = array_of(100_000)
    places, bounds = array.early
    order = random_order(array.suffixes.astype(np.int64))
    assert len(bounds) == 4  # an eighth of the third would be some 24
    for number, (begin, end) in enumerate(pairwise(bounds), start=1):
        expected = np.flatnonzero(order >> np.uint64(64 - 3 * number) == 0)
        np.testing.assert_array_equal(places[begin:end], expected)
    assert len(array_of(10).early[0]) == 0


def test_a_sample_that_was_guessed_too_small_is_drawn_anew() -> None:
    """Entries that all come late in the order: no limit lets as many through as was thought."""
    ids = np.arange(50_000)
    late = ids[random_order(ids) > np.uint64(2**64 - 2**61)].astype(np.int32)
    array = SuffixArray(np.zeros(50_000, np.uint16), late)
    found = drawn([array], np.array([[[0, len(late)]]]), 40)
    np.testing.assert_array_equal(found, late[np.sort(np.argsort(random_order(late))[:40])])


def test_a_sample_that_was_guessed_too_large_is_cut() -> None:
    """Entries that all come early: far more are let through than there is room for."""
    ids = np.arange(400_000)
    early = ids[random_order(ids) < np.uint64(2**60)].astype(np.int32)
    array = SuffixArray(np.zeros(400_000, np.uint16), early)
    found = drawn([array], np.array([[[0, len(early)]]]), 40)
    np.testing.assert_array_equal(found, early[np.sort(np.argsort(random_order(early))[:40])])


def test_every_entry_is_as_likely_as_another() -> None:
    """Neither the ids' size nor their distance makes any difference."""
    for ids in (np.arange(4_096), 10**9 + 610 * np.arange(4_096)):
        places = random_order(ids) / 2.0**64
        assert np.abs(np.sort(places) - np.linspace(0, 1, 4_096)).max() < 0.03  # 1.36/√n ≈ 0.021
        assert abs(np.corrcoef(places, ids)[0, 1]) < 0.05


@pytest.mark.slow
def test_matches_of_a_large_corpus_are_sampled_as_a_scan_would() -> None:
    """With lists of early entries in use, in one part and in three."""
    rng = np.random.default_rng(0)
    documents = [np.append(START, rng.choice([1, 1, 1, 2], 60)) for _ in range(300)]
    context = np.array([START, 2, 1, 1, 2, 1])
    ends = np.array([1, 3, 5])
    found = []
    for parts in (1, 3):
        arrays: list[SuffixArray] = []
        for own in np.array_split(np.arange(300), parts):
            tokens = np.concatenate([documents[i] for i in own]).astype(np.uint16)
            valued = valued_mask(61 * np.arange(len(own) + 1))
            first = sum(len(array.tokens) for array in arrays)
            arrays.append(SuffixArray(tokens, sort_suffixes(tokens, valued), first))
        assert all(len(array.early[1]) > 1 for array in arrays)
        ours = longest_matches(arrays, START, context, ends, 100)
        truth = longest_matches_reference(arrays, START, context, ends, 100)
        for one, other in zip(ours, truth, strict=True):
            np.testing.assert_array_equal(one, other)
        found.append(np.sort(ours.ids, axis=1))
    np.testing.assert_array_equal(found[0], found[1])
