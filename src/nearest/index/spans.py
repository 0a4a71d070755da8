"""Whether a text's own words stand in a corpus: spans of it, and whole documents.

Answered by the suffix array: the entries whose left context is a span but for its last token stand
side by side, and the last token is the value of one of them.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Int

from nearest.corpus.tokens import Tokens
from nearest.index.neighbours import NO_ENTRY
from nearest.index.suffix import insertion, shared_length
from nearest.index.threads import in_threads


def spans_stand(
    tokens: Tokens,
    suffixes: Int[np.ndarray, " m"],
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    length: int,
) -> Bool[np.ndarray, " q"]:
    """Whether context[end − length + 1 : end + 1] stands in one document, for each end.

    Args:
        tokens, suffixes: as in `suffix.sort_suffixes`.
        context: int64 token ids.
        ends: at least length − 1; no span may hold a start token.
        length: at least 2.
    """
    found = np.zeros(len(ends), dtype=bool)

    def work(part: slice) -> None:
        _find_spans(tokens, suffixes, context, ends[part], length, found[part])

    in_threads(work, len(ends))
    return found


def equal_documents(
    tokens: Tokens,
    suffixes: Int[np.ndarray, " m"],
    offsets: Int[np.ndarray, " stored_plus_1"],
    documents: Sequence[Tokens],
) -> Int[np.ndarray, " documents"]:
    """Where the first document with exactly the same tokens begins, -1 where there is none.

    Args:
        tokens, suffixes: as in `suffix.sort_suffixes`.
        offsets: where each document of `tokens` begins, and the end of the last.
        documents: int64 token ids, the start token first.
    """
    found = np.full(len(documents), NO_ENTRY, dtype=np.int64)
    for i, document in enumerate(documents):
        if len(document) > 1:
            found[i] = _find_document(tokens, suffixes, offsets, document)
    return found


# fmt: off
@no_type_check  # numba compiles the bare functions
@numba.njit(nogil=True, cache=True)
def _find_spans(
    tokens: Any, suffixes: Any, context: Any, ends: Any, length: Any, found: Any
) -> None:
    for i in range(len(ends)):
        end, limit = ends[i] - 1, length - 1
        at, longest = insertion(tokens, suffixes, context, end, limit)
        if longest < limit:
            continue
        while at < len(suffixes):
            position = np.int64(suffixes[at])
            if shared_length(tokens, position, context, end, 0, limit) < limit:
                break
            if tokens[position + 1] == context[end + 1]:
                found[i] = True
                break
            at += 1


@no_type_check
@numba.njit(nogil=True, cache=True)
def _find_document(tokens: Any, suffixes: Any, offsets: Any, document: Any) -> Any:
    limit = len(document) - 1
    at, longest = insertion(tokens, suffixes, document, limit - 1, limit)
    first = np.int64(-1)
    if longest < limit:
        return first
    while at < len(suffixes):
        position = np.int64(suffixes[at])
        if shared_length(tokens, position, document, limit - 1, 0, limit) < limit:
            break
        begin = position - limit + 1
        number = np.searchsorted(offsets, begin)
        whole = offsets[number] == begin and offsets[number + 1] == position + 2
        if whole and tokens[position + 1] == document[limit] and (first < 0 or begin < first):
            first = begin
        at += 1
    return first
# fmt: on
