"""Texts that a model writes while others write what it searches, or serve it, or stop to."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nearest import Memory, RemoteNeighbours
from nearest.errors import FolderError, ModelError, RemoteError, SettingError
from nearest.remote.servers import Patience
from nearest.retro import NeighbourCache
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.data.stages import Ends, chunk_documents
from nearest.retro.writing import Written, write
from retro_data import M, database, documents, embedder, stored, tokenizer, words
from retro_models import tiny_model
from serving import Running, free_port, roomy_model, serving
from test_retro_retrofit import make_fitted

HASTY = Patience(connect=1.0, answer=20.0, tries=2, pause=0.01, failures=9, rest=0.01)
Served = tuple[PreTrainedModel, Any, list[Memory]]
TEXTS = documents(20, longest=20)
PROMPT = words(TEXTS[0][:1] * 6)


def found_in(written: Written) -> set[str]:
    shown = [n for chunk in written.chunks for n in chunk.neighbours if n.source is not None]
    return {n.source.document for n in shown if n.source is not None}


def says(neighbours: Any, prompt: str = PROMPT, **options: Any) -> Written:
    chosen = {"max_new_tokens": 10, "eos_token_id": None, **options}
    return write(tiny_model("norlund"), tokenizer(), prompt, neighbours, **chosen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return database(tmp_path / "d", TEXTS).path


@pytest.fixture(scope="module")
def served(build_memory: Callable[..., Memory], tiny_tokenizer: Any) -> Served:
    """A model, its tokenizer and a memory of its own: a server has them beside the chunks."""
    model = roomy_model()
    return model, tiny_tokenizer, [build_memory(model, tune=False)]


class Service:
    """A server of chunks that may stop and begin again at its address."""

    def __init__(self, folder: Path, served: Served) -> None:
        self._folder, self._served, self._port = folder, served, free_port()
        self._running = ExitStack()

    def start(self) -> Running:
        chunks = MemoryNeighbours(self._folder, embedder(), words)
        made = serving(*self._served, self._port, chunks=chunks)
        return self._running.enter_context(made)

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def service(folder: Path, served: Served) -> Iterator[Service]:
    made = Service(folder, served)
    yield made
    made.stop()


@pytest.mark.slow
def test_what_was_removed_is_shown_no_more(folder: Path, service: Service) -> None:
    """Whoever removed it, and however often the chunk was asked for."""
    url = service.start().url
    here = MemoryNeighbours(folder, embedder(), words)
    there = RemoteNeighbours(url, tokenizer=tokenizer(), patience=HASTY)
    sources = [NeighbourCache(here), NeighbourCache(there)]
    before = [says(source) for source in sources]
    assert before[0] == before[1] == says(sources[1])
    gone = sorted(found_in(before[0]))[0]
    Memory.open(folder).remove([gone])
    after = [says(source) for source in sources]
    assert after[0] == after[1]
    assert gone not in found_in(after[0])
    assert found_in(after[0])
    fresh = MemoryNeighbours(folder, embedder(), words)
    assert after[0] == says(fresh)


def test_a_text_is_of_one_snapshot(folder: Path, service: Service) -> None:
    there = RemoteNeighbours(service.start().url, patience=HASTY)
    there(torch.full((1, M), 3))
    Memory.open(folder).remove(["doc-1"])
    with pytest.raises(FolderError, match="have changed meanwhile: begin the text anew"):
        there(torch.full((1, M), 4))
    there.refresh()
    there(torch.full((1, M), 4))


def test_a_cache_asks_anew_where_the_answer_is_of_another_version() -> None:
    class Changing:
        version: str | None = None

        def __init__(self) -> None:
            self.now = "first"
            self.asked: list[int] = []

        def __call__(self, chunks: torch.Tensor) -> torch.Tensor:
            self.asked += chunks[:, 0].tolist()
            self.version = self.now
            return chunks[:, None] + (100 if self.now == "second" else 0)

    changing = Changing()
    cache = NeighbourCache(changing)
    chunks = torch.arange(3)[:, None].expand(3, M)
    assert torch.equal(cache(chunks[:2]), chunks[:2, None])
    cache(chunks[:2])
    assert changing.asked == [0, 1]  # the first answer, which told the version, is remembered
    changing.now = "second"
    assert torch.equal(cache(chunks), chunks[:, None] + 100)
    assert torch.equal(cache(chunks[:1]), chunks[:1, None] + 100)
    assert changing.asked == [0, 1, 2, 0, 1, 2]


@pytest.mark.slow
def test_a_service_that_stops_in_the_middle_leaves_what_was_written(service: Service) -> None:
    there = RemoteNeighbours(service.start().url, patience=HASTY)
    told: list[str] = []

    def stop(chunk: Any) -> None:
        told.append(chunk.text)
        service.stop()

    with pytest.raises(RemoteError, match="no server answers") as gone:
        says(there, tell=stop)
    assert told == [words(TEXTS[0][:1] * M)]
    service.start()
    whole = says(there)
    until_then = str(gone.value).partition("Written until then: ")[2].split()
    assert until_then == whole.text.split()[: len(until_then)]
    assert len(until_then) == 2 * M - 6  # the next chunk had ended


def test_chunks_are_told_as_they_stand_in_the_prompt(folder: Path) -> None:
    """One that comes twice is looked up once."""
    told: list[str] = []
    prompt = [[9] * M, [3] * M, [9] * M, [5] * M]
    live = MemoryNeighbours(folder, embedder(), words)
    says(live, " ".join(map(words, prompt)), tell=lambda chunk: told.append(chunk.text))
    assert told[:3] == [words(prompt[0]), words(prompt[1]), words(prompt[3])]


def test_a_service_of_other_words_is_refused(
    service: Service, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    there = RemoteNeighbours(service.start().url, tokenizer=tiny_tokenizer, patience=HASTY)
    with pytest.raises(ModelError, match="were cut with another tokenizer than the model's"):
        says(there)


def test_a_service_says_how_documents_begin(tmp_path: Path, served: Served) -> None:
    own = chunk_documents(stored(TEXTS), tokenizer(), tmp_path / "d", M, Ends(0, None))
    own.embed(embedder(), words)
    own.build_index()
    chunks = MemoryNeighbours(own, embedder(), words)
    with serving(*served, chunks=chunks) as running:
        assert RemoteNeighbours(running.url, patience=HASTY).refresh() == 0


@pytest.mark.parametrize("kind", ["gpt2", "retro-pytorch"])
def test_texts_beyond_the_positions_are_refused(kind: str) -> None:
    model: Any = make_fitted(kind) if kind == "gpt2" else tiny_model(kind)
    assert model.config.max_position_embeddings == 64
    with pytest.raises(SettingError, match="6 tokens and 59 new ones exceed the model's 64 pos"):
        write(model, tokenizer(), PROMPT, max_new_tokens=59)
    assert write(model, tokenizer(), PROMPT, max_new_tokens=1).prompt == PROMPT
