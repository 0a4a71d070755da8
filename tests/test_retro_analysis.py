"""Overlap with neighbours, beside brute force; where the gain sits; the page."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearest.errors import FolderError, SettingError
from nearest.metrics import bootstrap_interval
from nearest.pages import overlap as report
from nearest.retro import NeighbourTable, RetroDataset
from nearest.retro.analysis.analyse import Analysis, analyse
from nearest.retro.analysis.overlap import longest_shared, match_lengths, matches_read
from retro_data import M, documents, words
from retro_training import dataset, fresh_model
from test_retro_eval import _record


def stands_in(run: list[int], neighbours: np.ndarray) -> bool:
    text = ",".join(map(str, run))
    return any(f",{text}," in f",{','.join(map(str, n))}," for n in neighbours.tolist())


def brute(tokens: list[int], neighbours: np.ndarray) -> list[int]:
    lengths = []
    for end in range(1, len(tokens) + 1):
        length = 0
        while length < end:
            run = tokens[end - length - 1 : end]
            if min(run) < 0 or not stands_in(run, neighbours):
                break
            length += 1
        lengths.append(length)
    return lengths


def test_matches_equal_brute_force(rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 4, (30, 8))
    neighbours = rng.integers(0, 4, (30, 3, 7))
    tokens[rng.random(tokens.shape) < 0.1] = -1
    neighbours[:, :, 5:][rng.random((30, 3)) < 0.4] = -1
    found = match_lengths(tokens, neighbours)
    for row, some, mine in zip(tokens.tolist(), neighbours, found.tolist(), strict=True):
        assert mine == brute(row, some)
    assert found.max() > 3


def test_shared_is_the_longest_common_substring(rng: np.random.Generator) -> None:
    before, own = rng.integers(0, 3, (2, 40, 5))
    own[::3, 3:] = -1  # a document's end
    neighbours = rng.integers(0, 3, (40, 2, 9))
    lengths, longest = matches_read(own, before, neighbours), longest_shared(own, neighbours)
    for i in range(40):
        tokens = own[i][own[i] >= 0].tolist()
        best = max(
            (b - a)
            for a in range(len(tokens) + 1)
            for b in range(a, len(tokens) + 1)
            if a == b or stands_in(tokens[a:b], neighbours[i])
        )
        assert longest[i] == best
        assert (
            lengths[i].tolist() == brute([*before[i].tolist(), *own[i].tolist()], neighbours[i])[5:]
        )
    assert longest_shared(own[:1], np.full((1, 2, 9), -1)) == 0


def made() -> Analysis:
    """Four chunks of two documents, known by hand; gain 1 nat where a match of 5 ends."""
    matches = np.array([0, 0, 5, 5, 40, 40, 0, 0])
    off = np.full(8, 3.0)
    return Analysis(
        ("on", "off"),
        {"on": off - (matches == 5), "off": off},
        np.array([0, 0, 0, 0, 1, 1, 1, 1]),
        np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        matches,
        np.array([0.0, 0.5, 1.0, 0.0]),
        np.array([4, 6, 8, 10]),
        np.array([0, 0, 1, 1]),
        ["a", "b"],
        10,
    )


def test_the_curve_is_over_chunks_that_share_at_most_so_much() -> None:
    points = {point.high: point for point in made().by_share((0.0, 0.5, 1.0))}
    none, half, whole = points[0.0], points[0.5], points[1.0]
    assert (none.chunks, none.tokens, none.gain, none.share) == (2, 4, 0, 0)
    assert none.losses["on"] == pytest.approx(4 * 3 / np.log(2) / 14)
    assert (half.chunks, half.share) == (3, 1)
    assert half.losses["on"] == pytest.approx((6 * 3 - 2) / np.log(2) / 20)
    assert half.gain == pytest.approx(2 / np.log(2) / 20)
    assert whole.gain == pytest.approx(whole.losses["off"] - whole.losses["on"])
    bits, sizes = np.array([2, 0]) / np.log(2), np.array([10.0, 18.0])
    assert whole.interval == bootstrap_interval(bits, sizes)


def test_tokens_are_grouped_by_their_match() -> None:
    groups = {(point.low, point.high): point for point in made().by_match()}
    assert set(groups) == {(0, 0), (5, 8), (33, 64)}
    five = groups[5, 8]
    assert (five.tokens, five.gain, five.share, five.documents) == (2, 1, 1, 1)
    assert five.losses == {"on": 2.0, "off": 3.0}
    leak = made().leak()
    assert (leak.chunks, leak.half, leak.whole, leak.tokens) == (4, 0.5, 0.25, 0.25)
    assert leak.documents == [("b", 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RetroDataset:
    texts = [*documents(4, longest=30), list(range(2, 34)), [3, 3, *range(2, 30)]]
    return dataset(tmp_path_factory.mktemp("data") / "db", texts)


@pytest.fixture(scope="module")
def table(data: RetroDataset) -> NeighbourTable:
    ids = np.asarray(data.table.ids)
    return NeighbourTable(ids, np.zeros(ids.shape, np.float32), _record(data))


def test_a_text_is_analysed_token_by_token(data: RetroDataset, table: NeighbourTable) -> None:
    model = fresh_model()
    found = analyse(model, data, table, words, readings=("on", "off", "shuffled"), window=16)
    assert found.compared == 4
    chunks = data.chunks
    after_first = sum(max(len(chunks.document_tokens(d)) - M, 0) for d in range(chunks.documents))
    assert len(found.matches) == len(found.gains) == after_first
    assert set(found.losses) == {"on", "off", "shuffled"}
    row = 0
    for document in range(chunks.documents):
        for chunk in chunks.of_document(document)[1:]:
            own = chunks.rows(np.array([chunk]))
            nearest = data.database.rows(table.ids[[chunk]], 1)
            assert found.shares[row] == longest_shared(own, nearest)[0] / M
            acting = data.database.rows(table.ids[[chunk - 1], :2], 1)
            lengths = matches_read(own, chunks.rows(np.array([chunk - 1])), acting)[0]
            assert found.matches[found.chunks == row].tolist() == lengths[own[0] >= 0].tolist()
            assert found.chunk_bytes[row] == len(words(own[own >= 0].tolist()))
            assert found.chunk_documents[row] == document
            row += 1
    assert row == len(found.shares)
    assert found.shares.max() == 1  # the two documents that repeat each other
    assert not np.isnan(found.gains).any()
    with pytest.raises(SettingError, match="name two, such as on,off"):
        analyse(model, data, table, words, readings=("on",))


def test_a_chunk_is_in_the_database_whatever_is_read(
    data: RetroDataset, table: NeighbourTable
) -> None:
    """Its copy is its third neighbour; the model reads one. A short chunk is never whole there."""
    ids = np.tile(np.arange(len(data.chunks))[:, None], 3)
    ids[:, :2] = -1
    copies = NeighbourTable(ids, np.zeros(ids.shape, np.float32), _record(data))
    found = analyse(fresh_model(), data, copies, words, neighbours=1, window=16)
    sizes = np.bincount(found.chunks)
    assert sizes.min() < M == sizes.max()
    np.testing.assert_array_equal(found.shares, sizes / M)
    assert not found.matches.any()  # of what is read: nothing
    assert found.leak().whole == (sizes == M).mean()


def test_a_document_named_twice_counts_once(data: RetroDataset, table: NeighbourTable) -> None:
    def of(*documents: int) -> Analysis:
        some = RetroDataset(data.chunks, data.database, table, subset=documents)
        return analyse(fresh_model(), some, table, words, window=16)

    once, twice = of(4, 5), of(4, 4, 5)
    assert twice.by_share() == once.by_share()
    assert twice.leak() == once.leak()


@pytest.mark.parametrize("window", [{"window": M}, {"window": 16, "stride": 16}])
def test_every_token_is_read_with_what_acts_on_it(
    data: RetroDataset, table: NeighbourTable, window: dict[str, int]
) -> None:
    """Else the first chunk of a passage would count as read with neighbours."""
    with pytest.raises(SettingError, match="must be below the window"):
        analyse(fresh_model(), data, table, words, **window)


def test_a_text_of_first_chunks_alone_is_refused(tmp_path: Path) -> None:
    short = dataset(tmp_path / "db", [[2, 3], [4, 5, 6]])
    ids = np.zeros((2, 2), np.int64)
    table = NeighbourTable(ids, np.zeros((2, 2), np.float32), _record(short))
    with pytest.raises(SettingError, match="no document of the text has a second chunk"):
        analyse(fresh_model(), short, table, words)


@pytest.mark.slow
def test_the_report_is_a_folder_that_needs_nothing_else(
    data: RetroDataset, table: NeighbourTable, tmp_path: Path
) -> None:
    found = analyse(fresh_model(), data, table, words, window=16)
    out = tmp_path / "report"
    report.check_folder(out)
    report.write_report(out, found, "model<1>", "a & b")
    names = {path.name for path in out.iterdir()}
    assert names == {"chunks.csv", "tokens.csv", "overlap.png", "overlap.html"}
    page = (out / "overlap.html").read_text()
    assert "model&lt;1&gt;" in page
    assert "a &amp; b" in page
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "$" not in page
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO((out / "chunks.csv").read_text())))
    for row, point in zip(rows, found.by_share(), strict=True):
        assert float(row["up_to"]) == point.high
        assert float(row["gain"]) == point.gain
        assert float(row["bpb_on"]) == point.losses["on"]
    report.check_folder(out)  # its own report may be replaced
    (out / "mine.txt").write_text("")
    with pytest.raises(FolderError, match=r"mine\.txt, which is not of an earlier analysis"):
        report.check_folder(out)


def test_chunks_without_text_make_no_point() -> None:
    """A chunk may hold nothing but the end token."""
    analysis = replace(made(), chunk_bytes=np.array([0, 6, 8, 0]))
    assert [point.high for point in analysis.by_share((0.0, 0.5, 1.0))] == [0.5, 1.0]
