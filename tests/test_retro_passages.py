"""Documents cut into passages: what is read, what is predicted, and in which order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nearest.errors import CorpusError, SettingError
from nearest.retro.data.dataset import NOT_SCORED, Collate
from nearest.retro.passages import Course, PassageCollate, Passages, Variation, next_labels
from retro_data import M, documents
from retro_training import dataset

TEXTS = [*documents(5, longest=30), [7], list(range(2, 34))]


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 4), (8, 4), (64, 32)])
def test_each_token_but_the_first_is_predicted_once_with_enough_context(
    tmp_path: Path, window: int, stride: int
) -> None:
    data = dataset(tmp_path / "db", TEXTS)
    read = Passages(data, window, stride)
    predicted: dict[int, list[int]] = {}
    for number in range(len(read)):
        item, begin = read[number], read.begin(number)
        document = int(item["document"])
        assert begin % M == 0
        assert len(item["input_ids"]) == read.sizes[number] <= window
        text = TEXTS[document]
        assert item["input_ids"].tolist() == text[begin : begin + window]
        places = np.flatnonzero((item["labels"][1:] != NOT_SCORED).numpy()) + 1
        assert item["labels"][places].tolist() == [text[begin + p] for p in places]
        predicted.setdefault(document, []).extend((begin + places).tolist())
        assert begin == 0 or places.min() >= window - stride
        whole = data[int(np.flatnonzero(data.documents == document)[0])]["neighbour_ids"]
        expected = whole[begin // M : (begin + window) // M]
        assert torch.equal(item["neighbour_ids"], expected)
    assert predicted == {n: list(range(1, len(t))) for n, t in enumerate(TEXTS) if len(t) > 1}


def test_without_overlap_nothing_is_read_twice(tmp_path: Path) -> None:
    read = Passages(dataset(tmp_path / "db", TEXTS), 8)
    tokens = sum(int(size) for size in read.sizes)
    alone = [len(text) % 8 == 1 for text in TEXTS]  # a passage of one token predicts nothing
    assert tokens == sum(map(len, TEXTS)) - sum(alone)


def test_short_passages_are_left_out(tmp_path: Path) -> None:
    data = dataset(tmp_path / "db", TEXTS)
    assert Passages(data, 16, least=M + 1).sizes.min() > M
    with pytest.raises(CorpusError, match="no document has a passage of 99 tokens"):
        Passages(data, 16, least=99)


@pytest.mark.parametrize(("window", "stride"), [(10, None), (0, None), (16, 6), (8, 16)])
def test_windows_are_whole_chunks(tmp_path: Path, window: int, stride: int | None) -> None:
    with pytest.raises(SettingError, match=r"multiple of the chunk size, 4|exceeds the window"):
        Passages(dataset(tmp_path / "db"), window, stride)


def test_variation_leaves_out_and_reorders_whole_neighbours() -> None:
    ids = torch.arange(200 * 3 * 2).reshape(200, 3, 2)
    shuffled = Variation(shuffle=True).of(ids, np.random.default_rng(0))
    assert torch.equal(shuffled.sort(1).values, ids)  # the neighbours of each chunk, all of them
    assert 0.2 < (shuffled == ids).all(-1).float().mean() < 0.5  # a third stays by chance
    dropped = Variation(dropout=0.25).of(ids, np.random.default_rng(0))
    gone = (dropped == -1).all(-1)
    assert 0.18 < gone.float().mean() < 0.32
    assert torch.equal(dropped[~gone], ids[~gone])
    assert torch.equal(Variation().of(ids, np.random.default_rng(0)), ids)
    with pytest.raises(SettingError, match=r"neighbour_dropout must lie in \[0, 1\], got 1.5"):
        Variation(1.5)


def test_a_course_is_a_function_of_the_seed_and_the_place(tmp_path: Path) -> None:
    read = Passages(dataset(tmp_path / "db", TEXTS), 16)
    variation = Variation(0.5, shuffle=True)
    course, again = Course(read, 3, 40, variation), Course(read, 3, 99, variation)
    for place in (39, 0, 17, len(read)):  # in any order, as workers and resumed runs ask
        assert all(torch.equal(course[place][n], again[place][n]) for n in course[place])
        assert course.document(place) == int(again[place]["document"])
    epoch = sorted(int(course[i]["document"]) for i in range(len(read)))
    assert epoch == sorted(read.documents.tolist())
    other = Course(read, 4, 40, variation)
    assert [other.document(i) for i in range(20)] != [course.document(i) for i in range(20)]


def test_labels_of_a_batch_are_what_each_position_predicts(tmp_path: Path) -> None:
    read = Passages(dataset(tmp_path / "db", TEXTS), 16, 8)
    items = [read[i] for i in range(4)]
    batch = PassageCollate(Collate(0, M))(items)
    following = next_labels(batch["labels"])
    for row, item in enumerate(items):
        for at in range(batch["input_ids"].shape[1]):
            there = at + 1 < len(item["labels"])
            assert following[row, at] == (item["labels"][at + 1] if there else NOT_SCORED)
    assert batch["documents"].tolist() == [int(item["document"]) for item in items]
