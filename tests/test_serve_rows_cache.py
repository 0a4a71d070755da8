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
            shared.make_room(1)
            new = [states(rng, len(own), 1) for _ in range(2 * LAYERS)]
            for layer in range(LAYERS):
                seen = shared.update(new[2 * layer], new[2 * layer + 1], layer)
                for number, part in enumerate(seen, 2 * layer):
                    for row, padding in enumerate(shared.padding):
                        expected = torch.cat([own[row][number], new[number][row]], dim=1)
                        torch.testing.assert_close(part[row, :, padding:], expected)
                        assert torch.isfinite(part[row]).all()
            shared.appended(1)
            own = [
                [torch.cat([part, new[n][row]], dim=1) for n, part in enumerate(parts)]
                for row, parts in enumerate(own)
            ]
        assert shared.lengths == [parts[0].shape[1] for parts in own]
        assert shared.get_seq_length() == max(shared.lengths)
        assert shared.get_mask_sizes(1, 0) == (max(shared.lengths) + 1, 0)
