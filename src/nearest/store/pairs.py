"""Documents of an encoder–decoder by their tokens and their source together."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from nearest.corpus.tokens import Tokens
from nearest.index.neighbours import NO_ENTRY
from nearest.store.segment import Segment


def equal_pairs(
    segments: Iterable[tuple[Segment, int]], pairs: Sequence[tuple[Tokens, Tokens]]
) -> Int[np.ndarray, " pairs"]:
    """The first entry of the first document that has exactly this text and source; -1 for none.

    Args:
        segments: each with the id of its first entry.
        pairs: token ids of texts and of their sources.
    """
    wanted = [_bytes_of(*pair) for pair in pairs]
    found = dict.fromkeys(wanted, NO_ENTRY)
    for segment, first in segments:
        for number in segment.numbers.tolist():
            pair = _bytes_of(segment.tokens_of(number), segment.source_of(number))
            if found.get(pair) == NO_ENTRY:
                found[pair] = first + int(segment.offsets[number])
    return np.array([found[pair] for pair in wanted], dtype=np.int64)


def _bytes_of(text: Tokens, source: Tokens | None) -> tuple[bytes, bytes]:
    """Equal for the same text and source, whatever the dtypes of their tokens."""
    read = b"" if source is None else source.astype(np.int64).tobytes()
    return text.astype(np.int64).tobytes(), read
