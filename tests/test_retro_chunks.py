"""Chunks, the filters of candidates, and lexical search, against plain Python."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearest.errors import CorpusError, SettingError
from nearest.index.bm25 import K1, B, Bm25
from nearest.index.neighbours import Neighbours
from nearest.retro.data.chunks import Chunks, joined, owners
from nearest.retro.data.filters import REASONS, Filters, Judge, jaccard, shares_run
from nearest.retro.data.fusion import fused
from retro_data import documents

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=5)


def plain_rows(texts: list[list[int]], m: int, continuation: int) -> list[list[int]]:
    rows = []
    for text in texts:
        for start in range(0, len(text), m):
            row = text[start : start + m * (1 + continuation)]
            rows.append(row + [-1] * (m * (1 + continuation) - len(row)))
    return rows


@given(texts=TEXTS, m=st.integers(2, 4), continuation=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_chunks_are_slices_of_documents(texts: list[list[int]], m: int, continuation: int) -> None:
    chunks = Chunks.of(texts, m)
    expected = plain_rows(texts, m, continuation)
    assert chunks.rows(np.arange(len(chunks)), continuation).tolist() == expected
    owner = [d for d, text in enumerate(texts) for _ in range(0, len(text), m)]
    assert chunks.document_of(np.arange(len(chunks))).tolist() == owner
    for number, text in enumerate(texts):
        assert chunks.document_tokens(number).tolist() == text
    assert (chunks.rows(np.array([-1])) == -1).all()


@given(
    texts=TEXTS,
    m=st.integers(2, 4),
    ends=st.tuples(st.none() | st.just(7), st.none() | st.just(8)),
)
@settings(max_examples=60, deadline=None)
def test_ends_that_are_not_stored_are_read(
    texts: list[list[int]], m: int, ends: tuple[int | None, int | None]
) -> None:
    """As if they stood among the tokens."""
    start, end = ends
    read = dataclasses.replace(Chunks.of(texts, m), start=start, end=end)
    put = [[t for t in (start, *text, end) if t is not None] for text in texts]
    expected = Chunks.of(put, m)
    assert read.digest == expected.digest
    assert read.largest >= expected.tokens.max(initial=0)
    ids = np.arange(len(expected))
    np.testing.assert_array_equal(read.rows(ids, 1), expected.rows(ids, 1))


@given(parts=st.lists(TEXTS, min_size=1, max_size=3), m=st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_joined_corpora_are_one_corpus(parts: list[list[list[int]]], m: int) -> None:
    both, whole = (
        joined([Chunks.of(part, m) for part in parts]),
        Chunks.of([text for part in parts for text in part], m),
    )
    ids = np.arange(len(whole))
    assert len(both) == len(whole)
    assert both.rows(ids, 1).tolist() == whole.rows(ids, 1).tolist()
    assert both.digest == whole.digest


def test_tokens_between_chunks_are_left_out() -> None:
    """As a layout has it that stores the next chunk's first token at the end of each."""
    tokens = np.array([1, 2, 3, 3, 4, 0, 7, 0, 0])
    chunks = Chunks(tokens, np.array([0, 6]), np.array([4, 7]), size=2, stride=3)
    assert chunks.rows(np.arange(3), 1).tolist() == [[1, 2, 3, 4], [3, 4, -1, -1], [7, -1, -1, -1]]
    assert (
        joined([chunks, chunks]).rows(np.arange(6)).tolist()
        == [*chunks.rows(np.arange(3)).tolist()] * 2
    )


def test_equal_documents_have_one_owner_in_whatever_corpus() -> None:
    one, other = owners(Chunks.of([[1, 2], [3], [1, 2]]), Chunks.of([[3], [4], [1, 2]]))
    assert one[0] == one[2] == other[2]
    assert one[1] == other[0]
    assert len({*one.tolist(), *other.tolist()}) == 3


def test_bad_chunks() -> None:
    with pytest.raises(SettingError, match="chunk_size"):
        Chunks.of([[1]], size=1)
    with pytest.raises(CorpusError, match="-3"):
        Chunks.of([[1, -3]])
    with pytest.raises(SettingError, match="2 chunks"):
        Chunks.of([[1, 2, 3]], 2).rows(np.array([2]))
    with pytest.raises(SettingError, match="2 and 3"):
        joined([Chunks.of([[1]], 2), Chunks.of([[1]], 3)])
    with pytest.raises(SettingError, match="no chunks"):
        joined([])


def longest_run(a: list[int], b: list[int]) -> int:
    best = 0
    for i in range(len(a)):
        for j in range(len(b)):
            length = 0
            while (
                i + length < len(a)
                and j + length < len(b)
                and a[i + length] == b[j + length]
                and a[i + length] >= 0
            ):
                length += 1
            best = max(best, length)
    return best


ROW = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@given(a=ROW, b=ROW, cut=st.integers(1, 12), length=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_common_runs(a: list[int], b: list[int], cut: int, length: int) -> None:
    b = b[:cut] + [-1] * (12 - cut)
    found = shares_run(np.array([a, b]), np.array([b, b]), length)
    assert found.tolist() == [longest_run(a, b) >= length, cut >= length]


@pytest.mark.slow
@given(a=ROW, b=ROW, cut=st.integers(1, 12), n=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_jaccard_of_ngrams(a: list[int], b: list[int], cut: int, n: int) -> None:
    def grams(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}

    one, other = grams(a), grams(b[:cut])
    expected = len(one & other) / len(one | other) if one and other else 0.0
    padded = b[:cut] + [-1] * (12 - cut)
    assert jaccard(np.array([a]), np.array([padded]), n)[0] == pytest.approx(expected)


def test_reasons() -> None:
    """One query's candidates: the same text, too young, a copied run, alike, and kept."""
    query = [1, 2, 3, 4, 5, 6, 7, 8]
    texts = [
        query,  # its own text under another name
        [9, 10, 11, 12],  # younger
        [20, 21, 3, 4, 5, 6, 22],  # four in a row, over the end of the chunk
        [1, 2, 3, 30, 4, 5, 6, 31],  # many of the same bigrams
        [13, 14, 15, 16],
    ]
    dates = ["2019-01-01", "2021-01-01", "2019-01-01", "2019-01-01", "2019-01-01"]
    whole = Chunks.of(texts, 8)
    database = Chunks(whole.tokens, whole.starts, whole.stops, 8, dates=dates)
    own = Chunks.of([query], 8)
    own = Chunks(own.tokens, own.starts, own.stops, 8, dates=["2020-06-01"])
    candidates = np.array([[0, 1, 2, 3, 4, -1]])

    def reasons(**settings: object) -> list[str]:
        judge = Judge(own, database, Filters(**settings))
        found = judge(np.array([0]), candidates)[0].tolist()
        return ["" if reason == 0 else REASONS[reason - 1] for reason in found]

    assert reasons() == ["same_document", "", "", "", "", ""]
    assert reasons(same_document=False) == [""] * 6
    assert reasons(dates="older") == ["same_document", "not_older", "", "", "", ""]
    assert reasons(longest_run=4) == ["same_document", "", "common_run", "", "", ""]
    assert reasons(ngram=2, jaccard=0.3) == [
        *("same_document", "", "common_ngrams", "common_ngrams", "", "")
    ]
    assert reasons(same_document=False, longest_run=8)[0] == "common_run"


def test_dates_that_cannot_be_compared() -> None:
    plain = Chunks.of([[1, 2]], 2)
    with pytest.raises(SettingError, match="date"):
        Judge(plain, plain, Filters(dates="older"))
    wrong = Chunks(plain.tokens, plain.starts, plain.stops, 2, names=["x"], dates=["yesterday"])
    with pytest.raises(SettingError, match=r"'x'.*yesterday"):
        Judge(wrong, wrong, Filters(dates="older"))


@pytest.mark.parametrize(
    "wrong", [{"longest_run": -1}, {"ngram": -1}, {"jaccard": 0.0}, {"dates": "newer"}]
)
def test_bad_filters(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Filters(**wrong)


def plain_bm25(texts: list[list[int]], query: list[int]) -> list[float]:
    lengths = [len(text) for text in texts]
    mean = sum(lengths) / len(lengths)
    scores = []
    for text in texts:
        score = 0.0
        for token in query:
            frequency = sum(token in other for other in texts)
            idf = np.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
            count = text.count(token)
            score += idf * count / (count + K1 * (1 - B + B * len(text) / mean))
        scores.append(score)
    return scores


def test_bm25_is_its_formula_and_bm25s_ranking() -> None:
    pytest.importorskip("bm25s")
    texts = documents(30, longest=8, vocab=12)
    chunks = Chunks.of(texts, 8)
    bm25 = Bm25(chunks)
    queries = chunks.rows(np.arange(5))
    every = np.tile(np.arange(len(chunks)), (5, 1))
    measured = -bm25.distances(queries, every)
    for row, query in zip(measured, queries, strict=True):
        expected = plain_bm25(texts, query[query >= 0].tolist())
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    found = bm25.search(queries, 6)
    for row in range(5):
        scores = np.sort(measured[row])[::-1][:6]
        held = found.ids[row] >= 0
        np.testing.assert_allclose(-found.distances[row][held], scores[held], rtol=1e-5)
        np.testing.assert_allclose(measured[row][found.ids[row][held]], scores[held], rtol=1e-5)
    assert np.isinf(bm25.distances(queries[:1], np.array([[-1]]))[0, 0])


def test_bm25_finds_nothing_that_shares_no_token() -> None:
    pytest.importorskip("bm25s")
    found = Bm25(Chunks.of([[1, 2], [3, 4], [1, 5]], 2)).search(np.array([[1, -1], [9, 9]]), 3)
    assert np.sort(found.ids, axis=1).tolist() == [[-1, 0, 2], [-1, -1, -1]]


def test_reciprocal_ranks() -> None:
    first = Neighbours(np.array([[7, 3, -1]]), np.array([[0.1, 0.2, np.inf]], np.float32))
    second = Neighbours(np.array([[3, 9, 7]]), np.array([[1.0, 2.0, 3.0]], np.float32))
    found = fused([first, second], 4)
    assert found.ids.tolist() == [[3, 7, 9, -1]]
    expected = [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62]
    np.testing.assert_allclose(-found.distances[0, :3], expected, rtol=1e-6)
    assert np.isinf(found.distances[0, 3])


def test_chunks_of_a_tokenizer_that_overflows_two_bytes(tmp_path: Path) -> None:
    assert Chunks.of([[70_000, 1]], 2).tokens.dtype == np.uint32
    assert Chunks.of([[65_535, 1]], 2).tokens.dtype == np.uint16


def test_joined_corpora_stay_on_disk(tmp_path: Path) -> None:
    """A corpus larger than RAM is read where it lies, a few chunks at a time."""
    size = 4_000_000
    files = [
        np.memmap(tmp_path / f"{n}", np.uint16, "w+", shape=size) for n in range(3)
    ]  # without blocks on the disk
    for number, file in enumerate(files):
        file[-1] = number + 1
    parts = [Chunks(file, np.array([0]), np.array([size])) for file in files]
    last = size // 64 * np.arange(1, 4) - 1
    tracemalloc.start()
    both = joined([joined(parts[:2]), parts[2]])
    assert both.rows(last)[:, -1].tolist() == [1, 2, 3]
    assert both.rows(np.arange(0, len(both), 500)).sum() == 0
    assert both.largest == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size  # bytes, of 6 * size
