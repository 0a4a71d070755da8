"""Models that read something beside the text over HTTP: RETRO's neighbours, passages before it."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import BYTES_AND_SPECIALS, make_documents
from nearest import Memory, attach, evaluate
from nearest.errors import ModelError, SettingError
from nearest.models.writing import write_with_passages
from nearest.retro import RetroConfig, RetroForCausalLM, retrofit
from nearest.retro.data.live import MemoryNeighbours
from nearest.retro.data.stages import chunk_memory
from nearest.retro.lookup import looking_up
from nearest.serve.app import ServeOptions, make_service
from nearest.serve.readings import NeighbourSearch
from retro_data import embedder
from retro_models import SIZES, stir
from serving import CHAT_TEMPLATE, Running, roomy_model, serving

WRITE_KEY = "a-key-to-write"
CHUNK = 8
PROMPT = "the court shall hear a case of law"
KNN = {"k": 8, "lam": 0.4, "temperature": 1.0}
SHORT = {"passages": 2, "passage_tokens": 16, "passage_stride": 8, "query_tokens": 12}


def chunked(memory: Memory) -> Memory:
    """The memory, its documents cut into chunks that can be found."""
    database = chunk_memory(memory, CHUNK)
    assert database.embed(embedder(), by_number)
    database.build_index()
    return Memory.open(memory.path)


def by_number(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def search(**settings: int) -> NeighbourSearch:
    return NeighbourSearch(embedder(), by_number, **settings)


def make_fitted(base: PreTrainedModel) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fitted = retrofit(base, [0, 1], chunk_size=CHUNK)
    stir(fitted.adapter)
    return fitted


def make_retro() -> PreTrainedModel:
    sizes = {**SIZES, "vocab_size": BYTES_AND_SPECIALS, "chunk_size": CHUNK}
    config = RetroConfig.preset("paper", **{**sizes, "max_position_embeddings": 512})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RetroForCausalLM(config).eval()
    stir(model)
    return model


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return roomy_model()


@pytest.fixture(scope="module")
def fitted(base: PreTrainedModel) -> PreTrainedModel:
    return make_fitted(base)


@pytest.fixture(scope="module")
def memory(base: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    return chunked(build_memory(base, make_documents(12, 30)))


@pytest.fixture(scope="module")
def neighbours(memory: Memory) -> MemoryNeighbours:
    return MemoryNeighbours(memory, embedder(), by_number)


@pytest.fixture(scope="module")
def server(
    fitted: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Running]:
    with serving(
        fitted, tiny_tokenizer, [memory], chat_template=CHAT_TEMPLATE, retro=search()
    ) as running:
        yield running


def log_probs_of(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, by one call of the model."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        every = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return every.gather(1, ids[0, 1:, None])[:, 0].numpy()


def told(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]["nearest"]
    return found


@pytest.mark.parametrize("kind", ["retrofit", "retro"])
def test_answers_are_those_of_generate_with_live_neighbours(
    kind: str,
    fitted: PreTrainedModel,
    memory: Memory,
    neighbours: MemoryNeighbours,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Greedy tokens, log-probabilities with and without neighbours, and the neighbours' places."""
    model: Any = fitted
    if kind == "retro":
        model = make_retro()
        memory = chunked(build_memory(model, make_documents(12, 30)))
    prompt = tiny_tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    with serving(model, tiny_tokenizer, [memory], retro=search()) as server:
        answer = server.complete(PROMPT, max_tokens=20, logprobs=1, echo=True, nearest={})
        alone = server.complete(
            prompt, max_tokens=20, logprobs=1, echo=True, nearest={"method": "base"}
        )
    found = told(answer)
    tokens = [one["id"] for one in found["tokens"]]
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids, max_new_tokens=20, do_sample=False, neighbours=neighbours, eos_token_id=1
    )[0].tolist()
    assert tokens == expected
    with looking_up(model, neighbours):
        read = log_probs_of(model, tokens)
    off = log_probs_of(model, tokens)
    assert np.abs(read - off).max() > 0.01  # neighbours matter
    np.testing.assert_allclose([t["logprob"] for t in found["tokens"][1:]], read, atol=1e-4)
    np.testing.assert_allclose([t["base_logprob"] for t in found["tokens"][1:]], off, atol=1e-4)
    weights = [t["passage_weight"] for t in found["tokens"][1:]]
    acting = np.arange(1, len(tokens)) >= CHUNK
    gained = np.where(acting, np.maximum(0, 1 - np.exp(off - read)), 0)
    np.testing.assert_allclose(weights, gained, atol=1e-3)
    without = [t["id"] for t in told(alone)["tokens"]]
    np.testing.assert_allclose(
        [t["logprob"] for t in told(alone)["tokens"][1:]], log_probs_of(model, without), atol=1e-4
    )
    assert told(alone)["reads"] == []
    for n, one in enumerate(found["tokens"]):
        if n < CHUNK:
            assert one["read"] is None
            continue
        chunk = torch.tensor([tokens[n // CHUNK * CHUNK - CHUNK : n // CHUNK * CHUNK]])
        given = neighbours(chunk)[0]
        passages = found["reads"][one["read"]]["passages"]
        for rows, source, passage in zip(
            given.tolist(), neighbours.sources[0], passages, strict=True
        ):
            assert passage["document"] == source.document
            assert passage["distance"] == pytest.approx(source.distance, abs=1e-5)
            number = next(n for n in range(12) if memory.document(n).id == source.document)
            first, length = passage["position"], passage["length"]
            stored = memory.document_tokens(number)[first : first + length].tolist()
            assert stored == [t for t in rows if t >= 0]
            assert passage["text"] + passage["after"] == tiny_tokenizer.decode(stored)


def test_streams_chats_and_continuations(
    server: Running, fitted: PreTrainedModel, neighbours: MemoryNeighbours
) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "nearest": {}}
    whole = told(server.post("/v1/completions", body).json())
    lines = server.post("/v1/completions", {**body, "stream": True}).text.split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0]["nearest"] for line in lines if line[6:7] == "{"]
    assert [t for piece in pieces for t in piece["tokens"]] == whole["tokens"]
    assert [r for piece in pieces for r in piece["reads"]] == whole["reads"] != []
    chat = server.post(
        "/v1/chat/completions",
        {"model": "tiny", "max_tokens": 16, "temperature": 0, "nearest": {}}
        | {"messages": [{"role": "user", "content": PROMPT}]},
    ).json()["choices"][0]
    assert chat["nearest"]["reads"]
    spans = chat["nearest"]["spans"]
    cited = [one["url_citation"]["title"] for one in chat["message"]["annotations"]]
    assert cited == [one["title"] for one in spans]
    several = server.complete(
        [5, *range(60, 80)], max_tokens=15, n=3, temperature=1, seed=3, nearest={}
    )["choices"]
    assert len({one["text"] for one in several}) == 3
    for one in several:
        tokens = [5, *range(60, 80), *(t["id"] for t in one["nearest"]["tokens"])]
        with looking_up(fitted, neighbours):
            expected = log_probs_of(fitted, tokens)[20:]
        given = [t["logprob"] for t in one["nearest"]["tokens"]]
        np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.slow
def test_what_else_runs_changes_nothing(server: Running) -> None:
    methods = ("retro", "base", "retro+suffix", "knn", "in-context")

    def ask(number: int) -> list[float]:
        way = methods[number % len(methods)]
        settings = SHORT if way.startswith("in-context") else {}
        answer = server.complete(
            [0, *np.random.default_rng(number).integers(60, 120, 5 + 3 * number).tolist()],
            max_tokens=12,
            nearest={"method": way, "settings": settings},
        )
        return [t["logprob"] for t in told(answer)["tokens"]]

    alone = [ask(number) for number in range(15)]
    with ThreadPoolExecutor(15) as clients:
        together = list(clients.map(ask, range(15)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_memory_of_the_base_beside_neighbours(
    server: Running, base: PreTrainedModel, fitted: PreTrainedModel, memory: Memory,
    neighbours: MemoryNeighbours,
) -> None:  # fmt: skip
    """It is looked up by the states that it holds, those of the text alone."""
    tokens = [0, *range(60, 90)]
    answer = server.complete(
        tokens, max_tokens=0, echo=True, nearest={"method": "retro+knn", "settings": KNN}
    )
    given = np.array([t["logprob"] for t in told(answer)["tokens"][1:]])
    with attach(base, memory, "knn", **KNN):
        together = log_probs_of(base, tokens)
    alone = log_probs_of(base, tokens)
    with looking_up(fitted, neighbours):
        read = log_probs_of(fitted, tokens)
    of_memory = np.exp(together) - 0.6 * np.exp(alone)  # λ·p_memory
    np.testing.assert_allclose(given, np.log(of_memory + 0.6 * np.exp(read)), atol=1e-3)
    one = told(answer)["tokens"][-1]
    share = 1 - 0.6 * math.exp(read[-1]) / math.exp(given[-1])
    assert one["memory_weight"] == pytest.approx(share, abs=1e-3)


def test_a_memory_of_states_with_neighbours(
    fitted: PreTrainedModel,
    memory: Memory,
    neighbours: MemoryNeighbours,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Its methods are those of the attached model, with neighbours alone."""
    with looking_up(fitted, neighbours):
        own = chunked(build_memory(fitted, make_documents(12, 30)))
    tokens = [0, *range(60, 90)]
    with serving(fitted, tiny_tokenizer, [own], retro=search()) as server:
        methods = server.client.get("/v1/nearest").json()["methods"]
        assert "retro+knn" in methods
        assert "knn" not in methods
        answer = server.complete(
            tokens, max_tokens=0, echo=True, nearest={"method": "retro+knn", "settings": KNN}
        )
    with looking_up(fitted, neighbours), attach(fitted, own, "knn", **KNN):
        expected = log_probs_of(fitted, tokens)
    given = [t["logprob"] for t in told(answer)["tokens"][1:]]
    np.testing.assert_allclose(given, expected, atol=1e-4)


@pytest.mark.slow
def test_documents_that_go_are_no_neighbours(
    fitted: PreTrainedModel,
    base: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Left out, or removed, over HTTP: the same answer; new ones come once they have vectors."""
    memory = chunked(build_memory(base, make_documents(12, 30)))
    with serving(fitted, tiny_tokenizer, [memory], retro=search(), write_key=WRITE_KEY) as server:
        server.client.headers["Authorization"] = f"Bearer {WRITE_KEY}"

        def ask(**options: Any) -> dict[str, Any]:
            return told(server.complete(PROMPT, max_tokens=20, nearest=options))

        before = ask()
        gone = before["reads"][0]["passages"][0]["document"]
        without = ask(without=[{"memory": "test", "id": gone}])
        assert gone not in documents_of(without)
        url = "/v1/nearest/documents/test"
        assert server.client.delete(url, params={"id": gone}).status_code == 200
        after = ask()
        assert after["tokens"] == without["tokens"]
        assert after["reads"] == without["reads"] != before["reads"]
        new = {"id": "new", "text": PROMPT * 2}
        assert server.post(url, {"documents": [new]}).status_code == 200
        assert ask()["reads"] == after["reads"]  # no vectors yet
        chunked(Memory.open(memory.path))
        assert "new" in documents_of(ask())


def test_neighbours_of_several_memories_name_their_own(
    fitted: PreTrainedModel,
    base: PreTrainedModel,
    memory: Memory,
    build_memory: Callable[..., Memory],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    built = chunked(build_memory(base, make_documents(12, 30, seed=5)))
    other = Memory.open(shutil.copytree(built.path, tmp_path / "other.memory"))
    memories = {"test": memory, "other": other}
    with serving(fitted, tiny_tokenizer, [memory, other], retro=search()) as server:
        found = told(server.complete(PROMPT * 2, max_tokens=8, echo=True, nearest={}))
    passages = [passage for read in found["reads"] for passage in read["passages"]]
    assert {passage["memory"] for passage in passages} == set(memories)
    for passage in passages:
        own = memories[passage["memory"]]
        number = next(n for n in range(12) if own.document(n).id == passage["document"])
        first = passage["position"]
        tokens = own.document_tokens(number)[first : first + passage["length"]]
        assert passage["text"] + passage["after"] == tiny_tokenizer.decode(tokens)


def documents_of(found: dict[str, Any]) -> set[str]:
    return {p["document"] for read in found["reads"] for p in read["passages"]}


@pytest.mark.parametrize("method", ["in-context", "in-context+knn", "in-context+retomaton"])
def test_in_context_is_that_of_the_library(
    method: str, base: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Written as `generate` writes it, and scored as `evaluate` scores it."""
    settings = SHORT if method == "in-context" else {**SHORT, **KNN}
    options = {"method": method, "settings": settings}
    text = "the court shall hear a case"
    prompt = [0, *tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]
    with serving(base, tiny_tokenizer, [memory]) as server:
        answer = server.complete(text, max_tokens=30, nearest=options)
        score = server.complete(text, max_tokens=0, echo=True, nearest=options)
        several = server.complete(text, max_tokens=30, n=2, nearest=options)["choices"]
    written, _, _ = write_with_passages(
        base,
        [memory],
        method,
        prompt,
        {"do_sample": False, "pad_token_id": 1},
        settings=settings,
        new_tokens=30,
        session={"tokenizer": tiny_tokenizer},
        replay=0,
    )
    if "retomaton" not in method:  # whose pointers there are found anew with every choice
        assert [t["id"] for t in told(answer)["tokens"]] == written
    assert {one["text"] for one in several} == {answer["choices"][0]["text"]}
    scored = evaluate(base, memory, [text], method, tokenizer=tiny_tokenizer, **settings)
    given = [t["logprob"] for t in told(score)["tokens"] if t["logprob"] is not None]
    assert -np.mean(given) == pytest.approx(scored.nll, abs=1e-4)
    (read, *_) = told(answer)["reads"]
    for passage in read["passages"]:
        number = next(n for n in range(12) if memory.document(n).id == passage["document"])
        tokens = memory.document_tokens(number)
        first = passage["position"]
        assert passage["text"] == tiny_tokenizer.decode(tokens[first : first + passage["length"]])
        assert passage["length"] <= 16
    alone = [t["base_logprob"] for t in told(score)["tokens"][1:]]
    np.testing.assert_allclose(alone, log_probs_of(base, prompt), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"settings": {"neighbours": 0}}, "neighbours must be a whole number"),
        ({"settings": {"neighbours": 1.5}}, "neighbours must be a whole number"),
        ({"settings": {"continuations": 99}}, "continuations must be a whole number"),
        ({"settings": {"lam": 0.5}}, "'lam'"),
        ({"memories": [{"name": "test", "weight": 0.5}]}, "mixes no memory"),
        ({"method": "in-context", "settings": {"passages": 99}}, "positions"),
        ({"method": "in-context", "settings": {"passages": 1 << 40}}, "before a text"),
        ({"method": "in-context+nothing"}, "is not served"),
    ],
)
def test_what_makes_no_sense_is_refused(
    server: Running, options: dict[str, Any], reason: str
) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "nearest": options}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


def test_passages_and_text_must_fit_the_model(server: Running) -> None:
    body = {"model": "tiny@in-context", "prompt": [60] * 400, "max_tokens": 10}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert "129 of passages" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_an_empty_text_has_no_tokens(server: Running) -> None:
    """Texts are read without a start token, as the model was trained."""
    response = server.post("/v1/completions", {"model": "tiny", "prompt": ""})
    assert response.status_code == 400
    assert "no tokens" in response.json()["error"]["message"]
    assert server.complete("", model="tiny@base")["choices"]


def test_models_and_memories_that_do_not_fit(
    base: PreTrainedModel,
    fitted: PreTrainedModel,
    memory: Memory,
    tmp_path: Path,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = build_memory(base, make_documents(3, 30))
    options = ServeOptions(retro=search())
    with pytest.raises(SettingError, match="nearest retro prepare"):
        make_service(fitted, tiny_tokenizer, [plain], options)
    with pytest.raises(ModelError, match="reads no neighbours"):
        make_service(base, tiny_tokenizer, [memory], options)
    with torch.random.fork_rng():
        other: Any = retrofit(base, [0], chunk_size=2 * CHUNK)
    with pytest.raises(SettingError, match=f"--chunk-size {2 * CHUNK}"):
        make_service(other, tiny_tokenizer, [memory], options)
    with pytest.raises(SettingError, match="at most 16"):
        make_service(fitted, tiny_tokenizer, [memory], ServeOptions(retro=search(neighbours=17)))
