"""Spans and documents of a text that stand in a corpus, against sets of all that stand there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearest.index.neighbours import NO_ENTRY
from nearest.index.ngrams import equal_documents, spans_stand
from nearest.index.suffix import SuffixArray, sort_suffixes
from test_suffix import START, corpus, documents_with_dead, mask, small_documents, with_dead

small_queries = st.lists(st.lists(st.integers(1, 4), max_size=14), min_size=1, max_size=6)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(small_documents, small_queries, st.integers(2, 6))
@settings(max_examples=150)
def test_spans_equal_a_set_of_all(
    dtype: type, documents: list[list[int]], queries: list[list[int]], length: int
) -> None:
    """Those at the ends of documents too, where the last token is no entry."""
    tokens, entries = corpus(documents, dtype)
    array = SuffixArray(tokens, sort_suffixes(tokens, mask(tokens, entries)))
    everything = {
        tuple(document[i : i + length])
        for document in documents
        for i in range(len(document) - length + 1)
    }
    context = np.concatenate([[START, *query] for query in queries])
    spans = [
        context[end - length + 1 : end + 1].tolist() for end in range(length - 1, len(context))
    ]
    ends = np.array([i + length - 1 for i, span in enumerate(spans) if START not in span], int)
    found = spans_stand(array, context, ends, length)
    expected = [tuple(context[end - length + 1 : end + 1].tolist()) in everything for end in ends]
    assert found.tolist() == expected


@given(small_documents, small_queries)
@settings(max_examples=150)
def test_equal_documents_are_the_first_of_them(
    documents: list[list[int]], queries: list[list[int]]
) -> None:
    """Not those that only begin alike, end alike or hold the same words."""
    documents = [document for document in documents if document]
    tokens, entries = corpus(documents)
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents)])
    wanted = [*queries, *documents, *(document[:-1] for document in documents)]
    found = equal_documents(
        SuffixArray(tokens, sort_suffixes(tokens, mask(tokens, entries))),
        offsets,
        [np.array([START, *q]) for q in wanted],
    )
    expected = [
        offsets[documents.index(query)] if query in documents else NO_ENTRY for query in wanted
    ]
    assert found.tolist() == expected


@given(documents_with_dead, small_queries, st.integers(2, 6))
@settings(max_examples=150)
def test_dead_documents_hold_no_spans_and_equal_none(
    documents: list[tuple[list[int], bool]], queries: list[list[int]], length: int
) -> None:
    array, filtered, offsets = with_dead(documents)
    wanted = [np.array([START, *query]) for query in [*queries, *(d for d, _ in documents)]]
    ours, theirs = (equal_documents(one, offsets, wanted) for one in (array, filtered))
    np.testing.assert_array_equal(ours, theirs)
    context = np.concatenate(wanted)
    ends = np.array(
        [
            end
            for end in range(length - 1, len(context))
            if START not in context[end - length + 1 : end + 1]
        ],
        int,
    )
    ours, theirs = (spans_stand(one, context, ends, length) for one in (array, filtered))
    np.testing.assert_array_equal(ours, theirs)
