"""Tokens of a long text, made piece by piece: at once, a tokenizer takes a hundred times its size.

Pieces overlap, and are joined in the overlap where both give the same tokens at the same places.
A piece is wrong only near its ends: tokenizers that first split a text into words (byte-level BPE,
WordPiece, most SentencePiece models) read it from left to right and treat every word by itself, so
what stands a few words from both ends is what the whole text gives. Of tokenizers that know no
words this cannot be promised for every text; where no long run of tokens agrees, the overlap is
made longer, and in the end the text is tokenised at once.
"""

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

LONG = 1 << 18  # characters; what is shorter is tokenised at once
_OVERLAP = 1 << 13
_AGREEING = 64  # tokens in a row


class _Piece(NamedTuple):
    """Token ids with the characters of the text that each stands for."""

    ids: Int[np.ndarray, " n"]
    places: Int[np.ndarray, "n 2"]


def tokenise_long(
    text: str,
    tokenizer: Callable[..., Any],
    piece: int = LONG,
    overlap: int = _OVERLAP,
    **options: Any,
) -> Int[np.ndarray, " n"]:
    """Token ids of a text, as `tokenizer(text, add_special_tokens=False, **options)` gives them.

    A tokenizer that cannot say where its tokens stand (one not written in Rust) reads the text at
    once.
    """
    if not getattr(tokenizer, "is_fast", False) or len(text) <= piece:
        made = tokenizer([text], add_special_tokens=False, verbose=False, **options)
        (ids,) = made["input_ids"]
        return np.array(ids, dtype=np.int32)
    found = array("i")  # grows in place, where many arrays would leave holes in the heap
    left = _tokenised(text, 0, piece, tokenizer, options)
    stop, taken = piece, 0  # left's tokens before `taken` are in `found`
    while stop < len(text):
        start = stop - overlap
        right = _tokenised(text, start, start + piece, tokenizer, options)
        joint = _joint(left, right, taken)
        if joint is None:
            if overlap * 4 > piece:
                return tokenise_long(text, tokenizer, piece * 4, overlap * 2, **options)
            return tokenise_long(text, tokenizer, piece, overlap * 2, **options)
        found.frombytes(left.ids[taken : joint[0]].tobytes())
        left, taken, stop = right, joint[1], start + piece
    found.frombytes(left.ids[taken:].tobytes())
    return np.frombuffer(found, np.int32)


def _tokenised(
    text: str, start: int, stop: int, tokenizer: Callable[..., Any], options: dict[str, Any]
) -> _Piece:
    made = tokenizer(
        text[start:stop],
        add_special_tokens=False,
        verbose=False,
        return_offsets_mapping=True,
        **options,
    )
    places = np.array(made["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return _Piece(np.array(made["input_ids"], dtype=np.int32), places + start)


def _joint(left: _Piece, right: _Piece, taken: int) -> tuple[int, int] | None:
    """Where to go over: a token of `left` not `taken` yet, and the same one in `right`.

    It stands in the middle of the overlap, amid _AGREEING tokens that are the same in both; None
    where they are not.
    """
    half = _AGREEING // 2
    if not len(left.ids) or not len(right.ids):
        return None
    i = int(np.searchsorted(left.places[:, 0], (left.places[-1, 0] + right.places[0, 0]) // 2))
    run = slice(i - half, i + half)
    if i < max(taken, half) or i + half > len(left.ids):
        return None
    for j in np.flatnonzero(right.places[:, 0] == left.places[i, 0]).tolist():
        same = slice(j - half, j + half)
        if j >= half and all(
            np.array_equal(a[run], b[same]) for a, b in zip(left, right, strict=True)
        ):
            return i, j
    return None
