"""Suffix arrays: sorted as defined, and matches equal to a scan of every entry."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearest.index import suffix
from nearest.index.matches import longest_matches
from nearest.index.ngrams import ngrams
from nearest.index.suffix import SuffixArray, sort_suffixes
from nearest.store.parts.corpus import valued_entries, valued_mask
from suffix_oracle import longest_matches_reference

START = 0


def corpus(documents: list[list[int]], dtype: type = np.uint16) -> tuple[np.ndarray, np.ndarray]:
    """Documents with their start token, and the positions that have a value."""
    whole = [[START, *tokens] for tokens in documents]
    offsets = np.cumsum([0, *map(len, whole)])
    return np.concatenate(whole).astype(dtype), valued_entries(offsets)


def left_context(tokens: np.ndarray, position: int) -> list[int]:
    start = position
    while tokens[start] != START:
        start -= 1
    return tokens[start : position + 1][::-1].tolist()


def mask(tokens: np.ndarray, entries: np.ndarray) -> np.ndarray:
    return np.isin(np.arange(len(tokens)), entries)


small_documents = st.lists(
    st.lists(st.integers(1, 3), min_size=0, max_size=12), min_size=1, max_size=8
).filter(lambda documents: any(documents))


@given(small_documents)
def test_entries_are_sorted_by_their_reversed_left_context(documents: list[list[int]]) -> None:
    tokens, entries = corpus(documents)
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
    contexts = [left_context(tokens, position) for position in suffixes]
    assert contexts == sorted(contexts)
    assert sorted(suffixes.tolist()) == entries.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(
    documents=small_documents,
    query=st.lists(st.integers(0, 4), min_size=0, max_size=15),
    most=st.integers(1, 12),
)
@settings(max_examples=150)
def test_matches_equal_a_scan(
    dtype: type, documents: list[list[int]], query: list[int], most: int
) -> None:
    tokens, entries = corpus(documents, dtype)
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
    context = np.array([START, *query])  # a start token may stand in the middle, too
    ends = np.arange(len(context))
    found = longest_matches([SuffixArray(tokens, suffixes)], START, context, ends, most)
    truth = longest_matches_reference([SuffixArray(tokens, suffixes)], START, context, ends, most)
    for ours, theirs in zip(found, truth, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(
    parts=st.lists(small_documents, min_size=2, max_size=5),
    query=st.lists(st.integers(0, 4), min_size=0, max_size=15),
    most=st.integers(1, 30),
)
@settings(max_examples=150)
def test_matches_in_several_parts_equal_a_scan(
    parts: list[list[list[int]]], query: list[int], most: int
) -> None:
    """The sample of matches that do not all fit is drawn from all parts alike."""
    arrays, first = [], 0
    for documents in parts:
        tokens, entries = corpus(documents)
        arrays.append(SuffixArray(tokens, sort_suffixes(tokens, mask(tokens, entries)), first))
        first += len(tokens)
    context = np.array([START, *query])
    ends = np.arange(len(context))
    found = longest_matches(arrays, START, context, ends, most)
    truth = longest_matches_reference(arrays, START, context, ends, most)
    for ours, theirs in zip(found, truth, strict=True):
        np.testing.assert_array_equal(ours, theirs)


documents_with_dead = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.booleans()),
    min_size=1,
    max_size=20,
)


def with_dead(
    documents: list[tuple[list[int], bool]], first: int = 0
) -> tuple[SuffixArray, SuffixArray, np.ndarray]:
    """An array that skips dead documents, one that lacks their entries, and all offsets."""
    tokens, entries = corpus([document for document, _ in documents])
    offsets = np.cumsum([0, *(len(document) + 1 for document, _ in documents)])
    alive = np.repeat([not dead for _, dead in documents], np.diff(offsets))
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
    filtered = SuffixArray(tokens, suffixes[alive[suffixes]], first)
    return SuffixArray(tokens, suffixes, first, alive), filtered, offsets


@given(
    parts=st.lists(documents_with_dead, min_size=1, max_size=3),
    query=st.lists(st.integers(0, 4), min_size=0, max_size=15),
    most=st.integers(1, 30),
)
@settings(max_examples=150)
def test_dead_entries_are_skipped_as_if_the_array_lacked_them(
    parts: list[list[tuple[list[int], bool]]], query: list[int], most: int
) -> None:
    arrays: list[SuffixArray] = []
    filtered: list[SuffixArray] = []
    for documents in parts:
        skipping, lacking, _ = with_dead(documents, sum(len(array.tokens) for array in arrays))
        arrays.append(skipping)
        filtered.append(lacking)
    context = np.array([START, *query])
    ends = np.arange(len(context))
    found = longest_matches(arrays, START, context, ends, most)
    for truth in (
        longest_matches(filtered, START, context, ends, most),
        longest_matches_reference(filtered, START, context, ends, most),
    ):
        for ours, theirs in zip(found, truth, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    counted = (ngrams(one, START, context, ends, 4) for one in (arrays, filtered))
    for ours, theirs in zip(*counted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_samples_skip_dead_entries() -> None:
    """Of far more matches than fit, so that lists of early entries are used."""
    rng = np.random.default_rng(0)
    documents = [([1] * 9, bool(dead)) for dead in rng.random(2000) < 0.3]
    skipping, lacking, _ = with_dead(documents)
    context = np.array([START, 1])
    ours, theirs = (
        longest_matches([array], START, context, np.array([0, 1]), 16)
        for array in (skipping, lacking)
    )
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    assert (ours.longest > 1000).all()
    assert skipping.early[1].tolist() == lacking.early[1].tolist() != [0]
    assert not np.isin(ours.ids, np.flatnonzero(~skipping.alive)).any()


@given(documents=small_documents, query=st.lists(st.integers(1, 3), min_size=1, max_size=15))
def test_a_match_is_as_long_as_it_says_and_none_is_longer(
    documents: list[list[int]], query: list[int]
) -> None:
    tokens, entries = corpus(documents)
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
    context = np.array([START, *query])
    found = longest_matches(
        [SuffixArray(tokens, suffixes)], START, context, np.array([len(query)]), 1000
    )
    wanted = [START, *query][::-1]
    shared = {}
    for position in entries.tolist():
        own = left_context(tokens, position)
        same = [a == b for a, b in zip(own, wanted, strict=False)]
        shared[position] = [*same, False].index(False)
    matching = {position: length for position, length in shared.items() if length}
    given_ids = found.ids[0][found.ids[0] >= 0].tolist()
    lengths = found.lengths[0][: len(given_ids)].tolist()
    assert dict(zip(given_ids, lengths, strict=True)) == matching
    assert lengths == sorted(lengths, reverse=True)
    assert found.longest[0] == lengths.count(lengths[0]) if lengths else found.longest[0] == 0


def test_matches_stop_at_document_starts() -> None:
    """The text before a document is not its context, though it stands beside it in the array."""
    tokens, entries = corpus([[1, 2, 3], [5, 6], [7, 5, 6]])
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
    context = np.array([START, 1, 2, 3, START, 5])
    found = longest_matches([SuffixArray(tokens, suffixes)], START, context, np.array([5]), 8)
    assert found.ids[0, :2].tolist() == [5, 9]
    assert found.lengths[0, :2].tolist() == [2, 1]


def test_a_match_longer_than_the_limit_counts_as_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = [1] * (suffix.MAX_MATCH + 40)
    tokens, entries = corpus([repeated])
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
    context = np.array([START, *repeated])
    found = longest_matches(
        [SuffixArray(tokens, suffixes)], START, context, np.array([len(context) - 1]), 4
    )
    assert found.lengths[0].tolist() == [suffix.MAX_MATCH] * 4
    assert found.longest[0] == 40


def test_real_text_against_a_scan(dclaw_tokens: np.ndarray) -> None:
    tokens = dclaw_tokens
    offsets = np.append(np.flatnonzero(tokens == START), len(tokens))
    memory, text = tokens[: offsets[50]], tokens[offsets[50] : offsets[52]].astype(np.int64)
    suffixes = sort_suffixes(memory, valued_mask(offsets[:51]))
    ends = np.linspace(0, len(text) - 1, 8).astype(int)
    found = longest_matches([SuffixArray(memory, suffixes)], START, text, ends, 64)
    truth = longest_matches_reference([SuffixArray(memory, suffixes)], START, text, ends, 64)
    for ours, theirs in zip(found, truth, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def dclaw_tokens() -> np.ndarray:
    """Characters of law as tokens: real repetition without a tokenizer."""
    path = Path(__file__).parents[2] / "shared" / "corpora" / "dclaw" / "valid.jsonl"
    if not path.exists():
        pytest.skip("the corpora are not here")
    import json

    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:60]]
    return np.concatenate([[START, *text[:600].encode()] for text in texts]).astype(np.uint16)
