"""Losses with, without and with wrong neighbours; the public code's figure."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from torch.nn import functional as F  # noqa: N812

from nearest.errors import SettingError
from nearest.metrics import bootstrap_interval
from nearest.retro import NeighbourTable, RetroDataset, RetrofitForCausalLM, retrofit
from nearest.retro.convert import from_norlund
from nearest.retro.data.chunks import Chunks
from nearest.retro.evaluation.evaluate import evaluate_retro
from nearest.retro.evaluation.readings import others, readings_of
from nearest.retro.evaluation.scoring import scored_tokens
from nearest.retro.passages import Passages
from retro_data import M, documents, words
from retro_models import CHUNK, stir
from retro_training import dataset, fresh_model
from test_retro_retrofit import make_base

TEXTS = [*documents(5, longest=30), [7], list(range(2, 34))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RetroDataset:
    return dataset(tmp_path_factory.mktemp("data") / "db", TEXTS)


@pytest.fixture(scope="module")
def table(data: RetroDataset) -> NeighbourTable:
    return NeighbourTable(data._ids, np.zeros(data._ids.shape, np.float32), _record(data))


def _record(data: RetroDataset) -> dict[str, Any]:
    digest = data.chunks.digest
    return {"chunk_size": M, "queries": digest, "database": digest}


@pytest.fixture(scope="module")
def fitted() -> RetrofitForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = retrofit(make_base("gpt2"), [1, 4], chunk_size=CHUNK)
    stir(model.adapter)
    return model


def brute(model: Any, data: RetroDataset, ids: Any, window: int, stride: int) -> np.ndarray:
    """The summed loss of each document, passage after passage, each alone; `ids` of all chunks."""
    sums = np.zeros(data.chunks.documents)
    for document, text in enumerate(TEXTS):
        first, predicted = int(data.chunks.first[document]), 1
        for begin in range(0, len(text), stride):
            part = torch.tensor([text[begin : begin + window]])
            given = {}
            if ids is not None:
                chunks = model.retro_config.chunks(part.shape[1])
                numbers = np.arange(begin // M, begin // M + chunks) + first
                given["neighbour_ids"] = ids(numbers)[None]
            logits = model(part, **given, use_cache=False).logits[0]
            for place in range(predicted, begin + part.shape[1]):
                nll = -logits[place - begin - 1].log_softmax(-1)[text[place]]
                sums[document] += nll.item()
            predicted = max(predicted, begin + part.shape[1])
            if predicted >= len(text):
                break
    return sums


def test_each_reading_is_the_brute_force(
    data: RetroDataset, table: NeighbourTable, fitted: RetrofitForCausalLM
) -> None:
    names = ["on", "off", "base", "shuffled", "no-continuation", "k=1"]
    found = evaluate_retro(
        fitted, data, table, names, text="t", decode=words, window=16, stride=8, batch_size=3
    )
    assert [result.reading for result in found] == names
    shuffled = table.ids[others(data.chunks)]

    def rows(ids: np.ndarray, k: int, following: int) -> Any:
        return lambda numbers: torch.from_numpy(data.database.rows(ids[numbers, :k], following))

    with torch.no_grad():
        expected = {
            "on": brute(fitted, data, rows(table.ids, 2, 1), 16, 8),
            "off": brute(fitted, data, None, 16, 8),
            "base": brute(fitted.base, data, None, 16, 8),
            "shuffled": brute(fitted, data, rows(shuffled, 2, 1), 16, 8),
            "no-continuation": brute(fitted, data, rows(table.ids, 2, 0), 16, 8),
            "k=1": brute(fitted, data, rows(table.ids, 1, 1), 16, 8),
        }
    count = sum(len(text) - 1 for text in TEXTS)
    for result in found:
        np.testing.assert_allclose(result.document_nll, expected[result.reading], atol=1e-9)
        assert result.tokens == count
        assert result.nll == pytest.approx(expected[result.reading].sum() / count)
        assert result.ppl == pytest.approx(math.exp(result.nll))
        lengths = sum(len(words(text)) - len(words(text[:1])) for text in TEXTS)
        assert result.bpb == pytest.approx(result.nll * count / math.log(2) / lengths)
        if result.reading != "on":
            difference = expected[result.reading] - expected["on"]
            assert result.delta_nll == pytest.approx(difference.sum() / count)
            low, high = bootstrap_interval(difference, result.document_tokens)
            assert (result.delta_low, result.delta_high) == pytest.approx((low, high))
    assert found[0].delta_nll is None
    assert len({result.nll for result in found}) == 5  # off is base, all others differ


@pytest.mark.parametrize("lengths", [[9, 1, 30, 2], [40, 3], [12], [3], [2, 2]])
def test_shuffled_neighbours_are_of_another_document(lengths: list[int]) -> None:
    """Of another chunk where there is one document, and a chunk's own where there is one chunk."""
    chunks = Chunks.of([[5] * length for length in lengths], 4)
    ids, order = np.arange(len(chunks)), others(chunks)
    if len(lengths) > 1:
        assert (chunks.document_of(order) != chunks.document_of(ids)).all()
    elif len(ids) > 1:
        assert (order != ids).all()
    assert set(order.tolist()) <= set(ids.tolist())


def test_off_is_base_bit_for_bit(
    data: RetroDataset, table: NeighbourTable, fitted: RetrofitForCausalLM
) -> None:
    off, base = evaluate_retro(fitted, data, table, ["off", "base"], window=16)
    assert np.array_equal(off.document_nll, base.document_nll)
    assert (base.delta_nll, base.delta_low, base.delta_high) == (0, 0, 0)


def test_a_model_in_training_is_left_so_and_read_without_dropout(
    data: RetroDataset, table: NeighbourTable
) -> None:
    model = fresh_model(residual_dropout=0.5).train()
    first, second = (evaluate_retro(model, data, table, ["on"], window=16) for _ in range(2))
    assert first[0].nll == second[0].nll
    assert model.training


def test_readings_by_name(table: NeighbourTable, fitted: RetrofitForCausalLM) -> None:
    every = readings_of(["on", "k"], fitted, table, 2, 1)
    assert [reading.name for reading in every] == ["on", "k=1", "k=2"]
    scratch = fresh_model()
    for names, message in (
        (["k=3"], "3 neighbours are asked for, but the table stores 2"),
        (["best"], "reading 'best' is unknown: choose on, off, base"),
        (["on", "on"], "each only once"),
        ([], "name at least one reading"),
    ):
        with pytest.raises(SettingError, match=message):
            readings_of(names, fitted, table)
    with pytest.raises(SettingError, match="this model was trained from scratch"):
        readings_of(["base"], scratch, table)


def test_a_table_of_another_corpus_is_refused(
    data: RetroDataset, table: NeighbourTable, fitted: RetrofitForCausalLM
) -> None:
    short = NeighbourTable(table.ids[:-1], table.distances[:-1], table.record)
    with pytest.raises(SettingError, match=r"the table has \d+ rows for \d+ query chunks"):
        evaluate_retro(fitted, data, short, window=16)
    other = NeighbourTable(table.ids, table.distances, {**table.record, "queries": "0"})
    with pytest.raises(SettingError, match="was made for other queries"):
        evaluate_retro(fitted, data, other, window=16)
    with pytest.raises(SettingError, match="must be below the window"):
        evaluate_retro(fitted, data, table, window=16, stride=16)


def test_shares_of_processes_are_the_whole(data: RetroDataset) -> None:
    model, read = fresh_model(), Passages(data, 16, 8)
    whole = sum(some.nll.sum() for some in scored_tokens(model, read, batch_size=2))
    parts = [
        sum(some.nll.sum() for some in scored_tokens(model, read, batch_size=2, share=(i, 3)))
        for i in range(3)
    ]
    assert sum(parts) == pytest.approx(whole)
    assert min(parts) > 0


def test_norlunds_figure_is_that_of_the_public_code(tmp_path: Path) -> None:
    """Their logits, kept in the fixture; their rule: no BOS, first max_len tokens, micro-average.

    Inputs are 2 × 14 tokens of documents that go on; labels are the next token, −100 at the end of
    what is read and for padding.
    """
    fixture = Path(__file__).parent / "fixtures/retro/norlund.safetensors"
    with safetensors.safe_open(fixture, "pt") as file:
        names = set(file.keys())
        state = {
            n.removeprefix("weights/"): file.get_tensor(n).float()
            for n in names
            if n.startswith("weights/")
        }
        cases = [
            {part: file.get_tensor(f"{i}/{part}") for part in ("input_ids", "logits")}
            | {"neighbour_ids": file.get_tensor(f"{i}/neighbour_ids")}
            for i in range(4)
            if f"{i}/neighbour_ids" in names and file.get_tensor(f"{i}/input_ids").shape[1] == 12
        ]
    model = from_norlund(state, chunk_size=4).eval()
    total, count, rows, found = 0.0, 0, [], []
    for case in cases:
        ids = case["input_ids"].long()
        labels = F.pad(ids[:, 1:], (0, 1), value=-100).masked_fill(
            F.pad(ids[:, 1:], (0, 1)) == 0, -100
        )
        nll = F.cross_entropy(case["logits"].double().transpose(1, 2), labels, reduction="none")
        total, count = total + float(nll.sum()), count + int((labels != -100).sum())
        for row, given in zip(ids.tolist(), case["neighbour_ids"].long(), strict=True):
            rows.append([token for token in row if token])
            found.append(given)
    assert count > 0
    data, table = _with_neighbours(rows, found)
    result = evaluate_retro(model, data, table, ["on"], window=12, first_only=True, continuation=0)
    assert result[0].tokens == count
    assert result[0].nll == pytest.approx(total / count, abs=1e-5)


def _with_neighbours(
    rows: list[list[int]], found: list[torch.Tensor]
) -> tuple[RetroDataset, NeighbourTable]:
    """Documents whose chunks have exactly these neighbours, of any length: rows of a database."""
    # documents go on after what is read: the public code cuts them there
    own = Chunks.of([row + [5] * 3 if len(row) == 12 else row for row in rows], 4)

    class Given:
        """A database that answers with the fixture's neighbours."""

        size = 4
        digest = "given"
        largest = 1

        def __len__(self) -> int:
            return len(own) * 2

        def rows(self, ids: np.ndarray, continuation: int = 0) -> np.ndarray:
            every = np.full((len(own) * 2, found[0].shape[-1]), -1)
            for document, given in enumerate(found):
                for chunk in range(len(own.of_document(document))):
                    if chunk < given.shape[0]:
                        place = int(own.first[document]) + chunk
                        every[2 * place : 2 * place + 2] = given[chunk].numpy()
            every[every == 0] = -1
            return every[ids]

    ids = np.arange(len(own) * 2).reshape(-1, 2)
    record = {"chunk_size": 4, "queries": own.digest, "database": "given"}
    table = NeighbourTable(ids, np.zeros(ids.shape, np.float32), record)
    return RetroDataset(own, Given(), table, neighbours=2), table  # type: ignore[arg-type]


def test_padding_in_a_batch_changes_no_loss(data: RetroDataset) -> None:
    model, read = fresh_model("paper"), Passages(data, 16, 8)
    alone = {
        (s.document, int(s.positions[0])): s.nll for s in scored_tokens(model, read, batch_size=1)
    }
    for some in scored_tokens(model, read, batch_size=5):
        expected = alone[some.document, int(some.positions[0])]
        np.testing.assert_allclose(some.nll, expected, atol=1e-10)
