"""Specs that we write, read as the norlund code's data set does, from the description of its files.

The reader here knows the files and nothing of ours: first chunks of documents, ids that count
through the index spec's shards, a neighbour's continuation up to its document's end, 0 for padding,
labels shifted by the data set.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from nearest.retro.data import norlund
from nearest.retro.data.dataset import RetroDataset
from nearest.retro.data.stages import TableOptions, make_table
from retro_data import M, database, documents

K, IGNORED = 2, -100
TEXTS = documents(9, longest=18)


class Shard(NamedTuple):
    chunks: np.ndarray
    first: np.ndarray
    owner: np.ndarray


def shard_of(folder: Path, files: dict[str, str]) -> Shard:
    chunks, first, owner = (
        np.load(folder / files[name]) for name in ("chunks", "seq2chunk", "chunk2seq")
    )
    assert (chunks.dtype, first.dtype, owner.dtype) == (np.uint16, np.int64, np.int32)
    return Shard(chunks, first, owner)


def items(spec: Path, max_len: int) -> list[dict[str, Any]]:
    """Every document: input [len], neighbours [chunks, k, 2m], labels [len]."""
    listed = json.loads(spec.read_text())
    index_path = spec.parent / listed["neighbours"]["index_spec"]
    searched = [shard_of(index_path.parent, s) for s in json.loads(index_path.read_text())]
    bounds = np.cumsum([0, *(len(shard.chunks) for shard in searched)])

    def passage(chunk: int) -> np.ndarray:
        if chunk < 0:
            return np.zeros(2 * M, int)
        number = int(np.searchsorted(bounds, chunk, side="right")) - 1
        shard, at = searched[number], chunk - bounds[number]
        found = np.zeros(2 * M, int)
        found[:M] = shard.chunks[at]
        if at + 1 < len(shard.chunks) and shard.owner[at + 1] == shard.owner[at]:
            found[M:] = shard.chunks[at + 1]
        return found

    found = []
    for files in listed["shards"]:
        shard = shard_of(spec.parent, files)
        neighbours = np.load(spec.parent / files["neighbours"])
        assert neighbours.dtype == np.int64
        assert len(neighbours) == len(shard.chunks)
        stops = np.append(shard.first[1:], len(shard.chunks))
        for start, stop in zip(shard.first.tolist(), stops.tolist(), strict=True):
            chosen = range(start, min(stop, start + max_len // M))
            tokens = shard.chunks[list(chosen)].astype(int).reshape(-1)
            labels = np.append(tokens[1:], 0)
            found.append(
                {
                    "input": tokens,
                    "labels": np.where(labels == 0, IGNORED, labels),
                    "neighbours": [[passage(i) for i in neighbours[c, :K]] for c in chosen],
                }
            )
    return found


@pytest.mark.parametrize("own", [True, False])
def test_their_data_set_reads_what_ours_reads(own: bool, tmp_path: Path) -> None:
    searched = database(tmp_path / "m", TEXTS)
    asked = searched if own else database(tmp_path / "q", documents(4, seed=7, longest=18))
    table = make_table(searched, asked, tmp_path / "t", TableOptions(neighbours=3))
    spec = norlund.write_spec(
        tmp_path / "spec",
        asked.chunks,
        searched.chunks,
        table,
        embeddings=np.asarray(searched.embeddings),
        neighbours=3,
    )
    theirs = items(spec, 3 * M)
    ours = RetroDataset(asked.chunks, searched.chunks, table, neighbours=K, max_len=3 * M)
    assert len(theirs) == len(ours)
    for one, other in zip(theirs, (ours[number] for number in range(len(ours))), strict=True):
        tokens = other["input_ids"].numpy()
        assert one["input"][: len(tokens)].tolist() == tokens.tolist()
        assert not one["input"][len(tokens) :].any()
        neighbours = np.maximum(other["neighbour_ids"].numpy(), 0)  # −1 is padding, and theirs is 0
        np.testing.assert_array_equal(np.array(one["neighbours"]), neighbours)
        shifted = other["labels"].numpy()[1:]
        assert one["labels"][: len(shifted)].tolist() == shifted.tolist()
        assert (one["labels"][len(shifted) :] == IGNORED).all()
