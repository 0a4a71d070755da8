"""Neighbours looked up while a model writes: straight from memories, with sources."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nearest.errors import FolderError, SettingError
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.data.stages import Ends, chunk_documents
from retro_data import M, database, documents, embedder, stored, tokenizer, words
from retro_models import tiny_model
from test_retro_retrofit import make_fitted

TEXTS = documents(20, longest=20)


def test_live_neighbours_continue_within_their_document(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS)
    live = MemoryNeighbours(own, embedder(), words, neighbours=2, continuation=2)
    asked = own.chunks.rows(np.array([0, 9]))
    found = live(torch.from_numpy(np.maximum(asked, 2)))
    assert found.shape == (2, 2, 3 * M)
    for row, sources in zip(found.numpy(), live.sources, strict=True):
        for tokens, source in zip(row, sources, strict=True):
            text = TEXTS[int(source.document.removeprefix("doc-"))]
            expected = text[source.position : source.position + 3 * M]
            assert tokens[tokens >= 0].tolist() == expected
            assert source.position % M == 0
    whole = live(torch.from_numpy(asked))
    assert live.sources[0][0].chunk == 0  # it finds itself: filters are for tables
    assert live.sources[0][0].distance == pytest.approx(0, abs=1e-3)
    assert whole.shape == found.shape
    both = MemoryNeighbours([own, own], embedder(), words, neighbours=2, continuation=0)
    both(torch.from_numpy(asked[:1]))
    assert sorted(s.chunk for s in both.sources[0]) == [0, len(own.chunks)]


def test_a_model_generates_with_live_neighbours(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS)
    model = tiny_model("norlund")
    live = MemoryNeighbours(own, embedder(), words)
    prompt = torch.tensor([TEXTS[0][:1] * 6])
    on = model.generate(prompt, neighbours=live, max_new_tokens=9, eos_token_id=None)
    assert on.shape == (1, 15)
    assert live.sources
    whole = 12 // M
    ids = torch.full((1, model.config.chunks(14), 2, 2 * M), -1)
    ids[0, : 14 // M] = live(on[0, : 14 // M * M].reshape(-1, M))
    mask = torch.ones_like(on[:, :-1])
    logits = model(on[:, :-1], attention_mask=mask, neighbour_ids=ids).logits
    assert logits[0, 5:].argmax(-1).tolist() == on[0, 6:].tolist()
    assert whole == 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_retrofitted_model_generates_with_sources(kind: str, tmp_path: Path) -> None:
    """Greedy tokens are those of reading the whole text with the same neighbours."""
    own = database(tmp_path / "d", TEXTS)
    live = MemoryNeighbours(own.memory, embedder(), words)  # an open memory
    model = make_fitted(kind)
    prompt = torch.tensor([TEXTS[0][:1] * 6])
    out = model.generate(prompt, neighbours=live, max_new_tokens=7, eos_token_id=None)
    (last,) = live.sources
    assert all(source.document.startswith("doc-") for source in last)
    whole = 12 // M
    ids = live(out[0, : whole * M].reshape(whole, M))[None]
    with torch.no_grad():
        logits = model(out[:, :-1], neighbour_ids=ids, use_cache=False).logits
    assert logits[0, 5:].argmax(-1).tolist() == out[0, 6:].tolist()


def test_a_continuation_ends_with_its_document(tmp_path: Path) -> None:
    """Also where an end token that is not stored stands in the last chunk."""
    texts = [[5, 6, 7, 8, 9], [10, 11, 12, 13]]
    own = chunk_documents(stored(texts), tokenizer(), tmp_path / "m", M, Ends(None, 1))
    own.embed(embedder(), words)
    own.build_index()
    live = MemoryNeighbours(own, embedder(), words, neighbours=1, continuation=2)
    found = live(torch.tensor([[5, 6, 7, 8], [10, 11, 12, 13]]))
    assert found[0, 0].tolist() == [5, 6, 7, 8, 9, 1, *[-1] * 6]
    assert found[1, 0].tolist() == [10, 11, 12, 13, 1, *[-1] * 7]
    assert [(s.document, s.position) for (s,) in live.sources] == [("doc-0", 0), ("doc-1", 0)]


def test_what_is_missing_says_which_stage_makes_it(tmp_path: Path) -> None:
    own = database(tmp_path / "d", TEXTS[:4], indexed=False)
    with pytest.raises(FolderError, match="nearest retro embed"):
        MemoryNeighbours(own.path, embedder(), words)
    own.embed(embedder(), words)
    with pytest.raises(FolderError, match="nearest retro index"):
        MemoryNeighbours(own.path, embedder(), words)
    assert MemoryNeighbours(own.path, None, words, method="bm25", neighbours=1).chunk_size == M
    with pytest.raises(SettingError, match="must be at least 1"):
        MemoryNeighbours(own, embedder(), words, neighbours=0)
