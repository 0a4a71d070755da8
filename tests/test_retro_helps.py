"""From training to its verdict, on texts of which every second chunk's rest can be copied."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nearest.retro import NeighbourTable, RetroDataset, RetroForCausalLM
from nearest.retro.analysis.analyse import analyse
from nearest.retro.data.chunks import Chunks
from nearest.retro.evaluation.evaluate import evaluate_retro
from nearest.retro.passages import Passages
from nearest.retro.training import TrainingSettings, train
from retro_data import words
from retro_models import CHUNK, tiny_config
from retro_training import QUIET
from test_retro_training import SHALLOW


def copied(documents: int, seed: int) -> tuple[RetroDataset, NeighbourTable]:
    """Random documents; the neighbour of each chunk is that chunk in a copy, the next one after it.

    Half of the documents have the neighbours of the one before them instead: nothing to copy.
    """
    random = np.random.default_rng(seed)
    chunks = Chunks.of(random.integers(2, 8, (documents, 4 * CHUNK)).tolist(), CHUNK)
    ids = np.arange(len(chunks)).reshape(documents, 4)
    ids[1::2] = ids[::2]
    record = {"chunk_size": CHUNK, "queries": chunks.digest, "database": chunks.digest}
    table = NeighbourTable(ids.reshape(-1, 1), np.zeros((len(chunks), 1), np.float32), record)
    return RetroDataset(chunks, chunks, table, neighbours=1), table


@pytest.mark.slow
def test_a_trained_model_is_found_to_copy_and_where(tmp_path: Path) -> None:
    data, _ = copied(400, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RetroForCausalLM(tiny_config("paper", **QUIET, **SHALLOW))
        settings = TrainingSettings(
            max_steps=130, batch_size=16, learning_rate=1e-2, weight_decay=0, save_every=None
        )
        train(model, Passages(data, 16), tmp_path / "run", settings)
    fresh, table = copied(60, seed=1)
    on, off, shuffled = evaluate_retro(
        model, fresh, table, ["on", "off", "shuffled"], neighbours=1, window=16
    )
    for other in (off, shuffled):
        assert other.delta_low is not None
        assert other.delta_low > 0.1  # nats a token, whole interval
    found = analyse(model, fresh, table, words, neighbours=1, window=16)
    whole = [point for point in found.by_match() if point.low >= 5]
    nothing = [point for point in found.by_match() if point.high == 0]
    assert min(point.gain for point in whole) > 0.5 > max(point.gain for point in nothing)
    assert on.nll < off.nll
