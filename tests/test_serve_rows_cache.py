"""The cache that rows share: whatever comes and goes, each row has its own states, in order."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from nearest.serve.rows_cache import RowsCache

HEADS, DIM, LAYERS = 2, 3, 2


def states(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=(rows, HEADS, columns, DIM)).astype(np.float32))


def prompt(rng: np.random.Generator, length: int, rows: int = 1) -> DynamicCache:
    """A cache as a prompt leaves it."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(states(rng, rows, length), states(rng, rows, length), layer)
    return cache


def contents(cache: DynamicCache, row: int) -> list[Tensor]:
    return [part[row] for layer in cache.layers for part in (layer.keys, layer.values)]


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(5))
def test_each_row_keeps_its_own_states(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = prompt(rng, int(rng.integers(1, 9)))
    shared, own = RowsCache(first), [contents(first, 0)]
    for _ in range(60):
        what = rng.integers(4)
        if what == 0 and len(own) < 30:
            rows = int(rng.integers(1, 4))
            more = prompt(rng, int(rng.integers(1, 90)), rows)
            shared.add(more)
            own += [contents(more, row) for row in range(rows)]
        elif what == 1 and len(own) > 1:
            kept = np.flatnonzero(rng.random(len(own)) < 0.7).tolist() or [0]
            order = shared.keep(kept)
            assert sorted(order) == kept
            own = [own[number] for number in order]
        else:
            width = int(rng.integers(1, 5)) if what == 2 else 1
            shared.make_room(width)
            kept = torch.from_numpy(np.pad(shared.kept, ((0, 0), (0, width)), constant_values=True))
            assert shared.get_mask_sizes(width, 0) == (kept.shape[1], 0)
            new = [states(rng, len(own), width) for _ in range(2 * LAYERS)]
            for layer in range(LAYERS):
                seen = shared.update(new[2 * layer], new[2 * layer + 1], layer)
                for number, part in enumerate(seen, 2 * layer):
                    assert torch.isfinite(part).all()
                    for row, columns in enumerate(kept):
                        expected = torch.cat([own[row][number], new[number][row]], dim=1)
                        torch.testing.assert_close(part[row][:, columns], expected)
            shared.appended(width)
            back = rng.integers(width, size=len(own)).tolist()  # of each row one is true at least
            shared.take_back(back)
            own = [
                [
                    torch.cat([part, new[n][row, :, : width - back[row]]], dim=1)
                    for n, part in enumerate(parts)
                ]
                for row, parts in enumerate(own)
            ]
        assert shared.lengths == shared.kept.sum(1).tolist() == [p[0].shape[1] for p in own]
        assert shared.get_seq_length() == shared.kept.shape[1] >= max(shared.lengths)


@torch.inference_mode()
def test_gaps_do_not_outgrow_the_rows() -> None:
    """A row that takes all its drafts back beside one that takes none."""
    rng = np.random.default_rng(0)
    shared = RowsCache(prompt(rng, 3, 2))
    for _ in range(200):
        shared.make_room(9)
        for layer in range(LAYERS):
            shared.update(states(rng, 2, 9), states(rng, 2, 9), layer)
        shared.appended(9)
        shared.take_back([8, 7])
    assert shared.lengths == [203, 403]
    assert shared.kept.shape[1] < 403 + 403 // 2 + 64 + 9
