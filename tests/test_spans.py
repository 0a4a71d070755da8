"""Spans and documents of a text that stand in a corpus, against sets of all that stand there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearest.index.neighbours import NO_ENTRY
from nearest.index.spans import equal_documents, spans_stand
from nearest.index.suffix import sort_suffixes
from test_suffix import START, corpus, mask, small_documents

small_queries = st.lists(st.lists(st.integers(1, 4), max_size=14), min_size=1, max_size=6)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(small_documents, small_queries, st.integers(2, 6))
@settings(max_examples=150)
def test_spans_equal_a_set_of_all(
    dtype: type, documents: list[list[int]], queries: list[list[int]], length: int
) -> None:
    """Those at the ends of documents too, where the last token is no entry."""
    tokens, entries = corpus(documents, dtype)
    suffixes = sort_suffixes(tokens, mask(tokens, entries))
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
    found = spans_stand(tokens, suffixes, context, ends, length)
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
        tokens,
        sort_suffixes(tokens, mask(tokens, entries)),
        offsets,
        [np.array([START, *q]) for q in wanted],
    )
    expected = [
        offsets[documents.index(query)] if query in documents else NO_ENTRY for query in wanted
    ]
    assert found.tolist() == expected
