"""Batches of windows: nothing lost, nothing doubled, little padding, within a budget."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearest.corpus.batches import WindowBatch, batch_windows
from nearest.errors import SettingError

SORTED_TOGETHER = 32  # budgets of inputs that are sorted by length at a time


def distinct_documents(lengths: list[int], dtype: str = "int64") -> list[np.ndarray]:
    """Documents in which every token of all is another one, and none is the padding's 0."""
    ends = np.cumsum([0, *lengths]) + 1
    return [
        np.arange(start, stop, dtype=dtype) for start, stop in itertools.pairwise(ends.tolist())
    ]


def predictions(batch: WindowBatch) -> Iterator[tuple[int, int, int, int, int]]:
    """(row, column, document, position, target) in the order the batch promises."""
    rows, columns = np.nonzero(batch.predicts)
    yield from zip(
        rows.tolist(),
        columns.tolist(),
        batch.documents.tolist(),
        batch.positions.tolist(),
        batch.targets.tolist(),
        strict=True,
    )


def check(documents: list[np.ndarray], window: int, stride: int, batch_size: int) -> None:
    """Everything that batches of windows promise."""
    budget = batch_size * window
    batches = list(batch_windows(iter(documents), window, stride, batch_size))
    found: list[tuple[int, int, int]] = []
    used = cells = 0
    for batch in batches:
        height, width = batch.inputs.shape
        assert batch.predicts.shape == (height, width)
        assert 1 <= width <= window
        assert height * width <= budget
        assert batch.predicts.any(axis=1).all()  # no row without a prediction
        lengths = np.zeros(height, dtype=int)
        for row, column, number, position, target in predictions(batch):
            document = documents[number]
            start = position - column  # where the row's window starts in its document
            assert start >= 0
            seen = batch.inputs[row, : column + 1]
            assert seen.tolist() == document[start : position + 1].tolist()
            assert len(seen) >= min(position + 1, window - stride)
            assert target == document[position + 1]
            lengths[row] = column + 1
            found.append((number, position, target))
        for row in range(height):
            assert not batch.inputs[row, lengths[row] :].any()  # padding
        used += int(lengths.sum())
        cells += height * width
        assert batch.inputs.dtype == batch.targets.dtype == np.int64
    expected = [
        (number, position, int(tokens[position + 1]))
        for number, tokens in enumerate(documents)
        for position in range(len(tokens) - 1)
    ]
    assert sorted(found) == expected  # exactly once
    # Rows are sorted by length within a run of `SORTED_TOGETHER` budgets, so what a batch pads is
    # at most its budget times the relative drop in length to the next: ln(window) budgets a run.
    runs = 1 + used // (SORTED_TOGETHER * budget)
    assert cells - used <= runs * budget * math.log(window)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), max_size=12),
    window=st.integers(2, 20),
    stride_below=st.integers(1, 19),
    batch_size=st.integers(1, 5),
)
def test_batches_hold_every_prediction_once(
    lengths: list[int], window: int, stride_below: int, batch_size: int
) -> None:
    stride = max(1, window - stride_below)
    check(distinct_documents(lengths), window, stride, batch_size)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_a_document_longer_than_the_sorting_buffer(dtype: str) -> None:
    window, batch_size = 8, 1
    length = 5 * SORTED_TOGETHER * batch_size * window + 3
    check(distinct_documents([5, length, 2, 1, length, 7], dtype), window, 3, batch_size)


def test_short_documents_share_batches_with_little_padding(rng: np.random.Generator) -> None:
    documents = distinct_documents(rng.integers(2, 66, size=3000).tolist())
    batches = list(batch_windows(documents, 64, 32, 4))
    cells = sum(batch.inputs.size for batch in batches)
    used = sum(len(document) - 1 for document in documents)
    assert sum(len(batch.targets) for batch in batches) == used
    assert used <= cells < 1.05 * used


def test_a_closed_example() -> None:
    first, second = np.array([10, 11, 12, 13, 14]), np.array([20, 21, 22])
    (wide, narrow) = batch_windows([first, second], window=3, stride=2, batch_size=2)
    # Windows: first[0:3], first[2:4] (predicting only position 3), second[0:2].
    assert wide.inputs.tolist() == [[10, 11, 12], [12, 13, 0]]
    assert wide.predicts.tolist() == [[True, True, True], [False, True, False]]
    assert wide.documents.tolist() == [0, 0, 0, 0]
    assert wide.positions.tolist() == [0, 1, 2, 3]
    assert wide.targets.tolist() == [11, 12, 13, 14]
    assert narrow.inputs.tolist() == [[20, 21]]
    assert narrow.predicts.tolist() == [[True, True]]
    assert narrow.documents.tolist() == [1, 1]
    assert narrow.positions.tolist() == [0, 1]
    assert narrow.targets.tolist() == [21, 22]


@pytest.mark.parametrize("documents", [[], [np.array([1])], [np.array([1]), np.array([], int)]])
def test_nothing_to_predict_gives_no_batch(documents: list[np.ndarray]) -> None:
    assert list(batch_windows(documents, 8, 4, 2)) == []


def test_batches_come_before_the_corpus_has_ended() -> None:
    window, stride, batch_size = 8, 4, 2
    taken: list[int] = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(len(taken))
            yield np.arange(1, 10)  # one window of 8 inputs

    batches = batch_windows(endless(), window, stride, batch_size)
    drawn = [next(batches) for _ in range(SORTED_TOGETHER)]
    assert len(taken) == SORTED_TOGETHER * batch_size  # one buffer, and nothing beyond it
    assert [batch.documents[0] for batch in drawn] == [2 * i for i in range(SORTED_TOGETHER)]


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 0), (1, 1)])
def test_windows_that_lose_tokens_are_refused(window: int, stride: int) -> None:
    with pytest.raises(SettingError, match="must be at least 1 and below the window"):
        list(batch_windows([np.arange(20)], window, stride, 2))
