"""What chunks share with their neighbours, token by token."""

import numpy as np
from jaxtyping import Int

_ELSE = -2  # equal to no token and to no padding


def match_lengths(
    tokens: Int[np.ndarray, "chunks n"], neighbours: Int[np.ndarray, "chunks k length"]
) -> Int[np.ndarray, "chunks n"]:
    """For each token, how many tokens in a row, that one the last, stand in one of the neighbours.

    Negative ids are padding and match nothing. A match lies within one neighbour.

    >>> match_lengths(np.array([[5, 6, 7, 9]]), np.array([[[4, 6, 7], [5, 8, -1]]])).tolist()
    [[1, 1, 2, 0]]
    """
    chunks, n = tokens.shape
    own = np.where(tokens < 0, _ELSE, tokens)
    # a column of padding ends each neighbour, so that no run goes on into the next one
    ended = np.pad(neighbours, ((0, 0), (0, 0), (1, 0)), constant_values=-1).reshape(chunks, -1)
    runs = np.zeros(ended.shape, np.int64)
    found = np.empty((chunks, n), np.int64)
    for i in range(n):
        before = np.zeros_like(runs)
        before[:, 1:] = runs[:, :-1]
        runs = np.where(ended == own[:, i, None], before + 1, 0)
        found[:, i] = runs.max(1, initial=0)
    return found


def longest_shared(
    tokens: Int[np.ndarray, "chunks m"], neighbours: Int[np.ndarray, "chunks k length"]
) -> Int[np.ndarray, " chunks"]:
    """The longest common substring of each chunk and one of its neighbours, in tokens."""
    longest: np.ndarray = match_lengths(tokens, neighbours).max(1, initial=0)
    return longest


def matches_read(
    own: Int[np.ndarray, "chunks m"],
    before: Int[np.ndarray, "chunks m"],
    neighbours: Int[np.ndarray, "chunks k length"],
) -> Int[np.ndarray, "chunks m"]:
    """Matches that end at each token of a chunk, and may begin in the chunk before.

    Args:
        own: a chunk's tokens, negative past its document's end.
        before: those of the chunk before it.
        neighbours: retrieved for the chunk before, with their continuations: these act on it.
    """
    return match_lengths(np.concatenate([before, own], axis=1), neighbours)[:, own.shape[1] :]
