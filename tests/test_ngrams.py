"""Counts and fertility of n-grams, against a scan of the corpus."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearest import Memory
from nearest.index import ngrams
from nearest.index.ngrams import Ngrams
from nearest.index.suffix import SuffixArray, sort_suffixes
from nearest.store.parts.corpus import valued_mask

START = 0
LONGEST = 4

documents_of_tokens = st.lists(
    st.lists(st.integers(1, 3), min_size=0, max_size=12), min_size=1, max_size=8
).filter(lambda documents: any(documents))


def scan(documents: list[list[int]], context: list[int], longest: int) -> Ngrams:
    """By looking at every position of every document; all begin with START."""
    counts = np.zeros((len(context), longest), int)
    fertility = np.zeros((len(context), longest), int)
    for end in range(len(context)):
        for n in range(1, longest + 1):
            wanted = context[end + 1 - n : end + 1] if n <= end + 1 else []
            if not wanted or START in wanted[1:]:
                continue
            following = [
                whole[at + n]
                for whole in ([START, *tokens] for tokens in documents)
                for at in range(len(whole) - n)
                if whole[at : at + n] == wanted
            ]
            counts[end, n - 1], fertility[end, n - 1] = len(following), len(set(following))
    return Ngrams(counts, fertility)


def found(
    segments: list[list[list[int]]], context: list[int], longest: int, dtype: type = np.uint16
) -> Ngrams:
    arrays: list[SuffixArray] = []
    for documents in segments:
        whole = [[START, *tokens] for tokens in documents]
        tokens = np.concatenate(whole).astype(dtype)
        suffixes = sort_suffixes(tokens, valued_mask(np.cumsum([0, *map(len, whole)])))
        first = sum(len(array.tokens) for array in arrays)
        arrays.append(SuffixArray(tokens, suffixes, first))
    return ngrams.ngrams(arrays, START, np.array(context), np.arange(len(context)), longest)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(
    segments=st.lists(documents_of_tokens, min_size=1, max_size=3),
    query=st.lists(st.integers(0, 4), max_size=12),
    begun=st.booleans(),
)
def test_counts_and_fertility_equal_a_scan(
    dtype: type, segments: list[list[list[int]]], query: list[int], begun: bool
) -> None:
    context = [START, *query] if begun else [*query, 1]  # the start may have been cut off
    truth = scan([tokens for documents in segments for tokens in documents], context, LONGEST)
    ours = found(segments, context, LONGEST, dtype)
    np.testing.assert_array_equal(ours.counts, truth.counts)
    np.testing.assert_array_equal(ours.fertility, truth.fertility)


@pytest.mark.parametrize("parts", [1, 3])
def test_fertility_of_a_frequent_token_is_that_of_a_sample(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one, however many parts the corpus has."""
    documents = [[1, other] for other in range(2, 42)]
    segments = [documents[part::parts] for part in range(parts)]
    assert found(segments, [1], 1) == scan(documents, [1], 1)
    monkeypatch.setattr(ngrams, "SAMPLED", 10)
    ours = found(segments, [1], 1)
    assert (ours.counts.item(), ours.fertility.item()) == (40, 10)


def test_a_memory_counts_in_its_corpus(tiny_memory: Memory) -> None:
    documents = [
        tiny_memory.document_tokens(number).tolist() for number in range(tiny_memory.documents)
    ]
    context = documents[3]
    start = tiny_memory.manifest.model.start_token
    assert all(tokens[0] == start == START for tokens in documents)
    ours = tiny_memory.ngrams(np.array(context), np.arange(len(context)), LONGEST)
    truth = scan([tokens[1:] for tokens in documents], context, LONGEST)
    np.testing.assert_array_equal(ours.counts, truth.counts)
    np.testing.assert_array_equal(ours.fertility, truth.fertility)
