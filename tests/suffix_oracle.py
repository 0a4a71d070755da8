"""What `longest_matches` finds, by comparing each context with every entry."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.ids import random_order
from nearest.index.matches import Matches
from nearest.index.neighbours import NO_ENTRY
from nearest.index.suffix import MAX_MATCH, SuffixArray


def longest_matches_reference(
    arrays: Sequence[SuffixArray],
    start_token: int,
    context: Tokens,
    ends: Int[np.ndarray, " q"],
    most: int,
) -> Matches:
    """What `longest_matches` finds, by comparing each context with every entry."""
    found = Matches(
        np.full((len(ends), most), NO_ENTRY, dtype=np.int64),
        np.zeros((len(ends), most), dtype=np.int16),
        np.zeros(len(ends), dtype=np.int64),
    )
    ids = np.concatenate([array.suffixes.astype(np.int64) + array.first for array in arrays])
    lefts = [_reversed_context(a.tokens, int(p), start_token) for a in arrays for p in a.suffixes]
    for i, end in enumerate(ends):
        query = _reversed_context(context, int(end), start_token)
        lengths = np.array([_common(query, left) for left in lefts])
        taken = 0
        for length in sorted({n for n in lengths.tolist() if n}, reverse=True):
            level = ids[lengths == length]
            if not taken:
                found.longest[i] = len(level)
            want = min(most - taken, len(level))
            part = slice(taken, taken + want)
            order = np.argsort(random_order(level))
            found.ids[i, part] = level[np.sort(order[:want])]
            found.lengths[i, part] = length
            taken += want
    return found


def _reversed_context(tokens: Tokens, end: int, start_token: int) -> list[int]:
    """Tokens from `end` backwards, up to and with the start token, at most MAX_MATCH."""
    read: list[int] = []
    for token in tokens[end::-1][:MAX_MATCH].tolist():
        read.append(token)
        if token == start_token:
            break
    return read


def _common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
