"""Searches over HTTP, the RETRO line's protocol, and lm-evaluation-harness against the server."""

import base64
import io
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from nearest import Memory, attach
from serving import Running, roomy_model, serving


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return roomy_model()


@pytest.fixture(scope="module")
def memory(build_memory: Callable[..., Memory], model: PreTrainedModel) -> Memory:
    return build_memory(model, make_documents(12, 30))


@pytest.fixture(scope="module")
def server(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Running]:
    with serving(model, tiny_tokenizer, [memory]) as running:
        yield running


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_token_search_is_that_of_the_memory(server: Running, memory: Memory) -> None:
    queries = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    expected = memory.search(queries, 5)
    body = {"queries": base64.b64encode(as_npy(queries)).decode(), "k": 5}
    answer = server.post("/search/tokens", body).json()
    assert answer["version"] == 1
    told = {
        name: np.load(io.BytesIO(base64.b64decode(answer[name])))
        for name in ("ids", "distances", "values")
    }
    binary = server.client.post("/search/tokens/npy", params={"k": 5}, content=as_npy(queries))
    assert binary.headers["X-Nearest-Version"] == "1"
    with np.load(io.BytesIO(binary.content)) as archive:
        for name, array in told.items():
            np.testing.assert_array_equal(archive[name], array)
    np.testing.assert_array_equal(told["ids"], expected.ids)
    np.testing.assert_allclose(told["distances"], expected.distances, rtol=1e-6)
    np.testing.assert_array_equal(told["values"], memory.values(expected.ids))


def test_the_retro_lines_query(server: Running, memory: Memory) -> None:
    """As its client reads it: a stored zip of three `.npy` members without a suffix."""
    queries = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    response = server.client.post("/query", params={"k": 3}, content=as_npy(queries))
    assert response.headers["Content-Type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert sorted(archive.namelist()) == ["distances", "embeddings", "indices"]
        told = {name: np.load(io.BytesIO(archive.read(name))) for name in archive.namelist()}
    expected = memory.search(queries, 3)
    np.testing.assert_array_equal(told["indices"], expected.ids)
    assert told["distances"].dtype == told["embeddings"].dtype == np.float32
    kept = memory.keys.rows(expected.ids.reshape(-1)).reshape(2, 3, 32)
    np.testing.assert_allclose(told["embeddings"], kept)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        as_npy(np.zeros((2, 3), np.float32)),  # another dimension
        as_npy(np.full((1, 32), np.nan, np.float32)),
        as_npy(np.zeros((2, 32), np.int64)),
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O'",
        as_npy(np.zeros((1, 32), np.float32)).replace(b"(1, 32)", b"(9, 32)"),
    ],
)
def test_queries_that_are_none(server: Running, content: bytes) -> None:
    for path in ("/query", "/search/tokens/npy"):
        response = server.client.post(path, content=content)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


def test_text_search_names_the_place(server: Running, memory: Memory) -> None:
    text = memory.document(4).text[:40]
    answer = server.post("/search/text", {"text": text, "k": 3}).json()
    best = answer["matches"][0]
    assert best["length"] >= 40
    assert "doc-4" in [match["document"] for match in answer["matches"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "knn", "suffix"])
def test_lm_evaluation_harness_agrees_with_its_own_model(
    server: Running,
    model: PreTrainedModel,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    method: str,
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("the court", " shall"), ("a person of", " the law section"), ("mayor", " xyz")]
    asked: list[Any] = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    api = LocalCompletionsAPI(
        model=f"tiny@{method}",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="remote",
        num_concurrent=2,
        batch_size=2,
    )
    told = api.loglikelihood(asked, disable_tqdm=True)
    own = HFLM(pretrained=model, tokenizer=tiny_tokenizer, max_length=512)
    if method == "base":
        expected = own.loglikelihood(asked, disable_tqdm=True)
    else:
        with attach(model, memory, method):
            expected = own.loglikelihood(asked, disable_tqdm=True)
    for (log_prob, greedy), (right, right_greedy) in zip(told, expected, strict=True):
        assert log_prob == pytest.approx(right, abs=1e-3)
        assert greedy == right_greedy
