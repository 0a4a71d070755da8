"""What clients see: the API's fields, errors, streams, keys, and agreement with the library."""

import base64
import gc
import hashlib
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from jsonschema_rs import Draft202012Validator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents
from nearest import Document, Memory, attach
from nearest.corpus.tokens import SpecialTokensWarning
from nearest.serve.app import ServeOptions, make_service
from nearest.serve.mixing import Spoke
from nearest.serve.provenance import Provenance
from nearest.serve.retrieval import TextSearch, _text
from nearest.serve.schema import NearestOptions
from nearest.serve.work import Told
from nearest.store.snapshot import Snapshot
from serving import CHAT_TEMPLATE, Running, roomy_model, serving

PROMPT = "the court shall"


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
    with serving(model, tiny_tokenizer, [memory], chat_template=CHAT_TEMPLATE) as running:
        yield running


def mixed_log_probs(
    model: PreTrainedModel, memory: Memory | None, tokens: list[int], method: str = "knn"
) -> np.ndarray:
    """Log-probabilities of every position of one sequence, in one call of the (attached) model."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        if memory is None:
            return model(ids).logits[0].float().log_softmax(-1).numpy()
        with attach(model, memory, method):
            return model(ids).logits[0].float().log_softmax(-1).numpy()


@pytest.mark.parametrize("method", ["base", "knn", "retomaton", "suffix"])
def test_greedy_completion_is_that_of_generate(
    server: Running,
    model: PreTrainedModel,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    method: str,
) -> None:
    answer = server.complete(PROMPT, max_tokens=12, model=f"tiny@{method}", logprobs=1)
    ids = torch.tensor([[0, *tiny_tokenizer(PROMPT)["input_ids"]]])
    if method == "base":
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    else:
        with attach(model, memory, method):
            out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
    expected = out[0, ids.shape[1] :].tolist()
    choice = answer["choices"][0]
    said = [t["id"] for t in _tokens(server, PROMPT, 12, f"tiny@{method}")]
    assert said == expected
    assert choice["text"] == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == len(expected)


def _tokens(server: Running, prompt: str, count: int, model: str) -> list[dict[str, Any]]:
    answer = server.complete(prompt, max_tokens=count, model=model, nearest={})
    tokens: list[dict[str, Any]] = answer["choices"][0]["nearest"]["tokens"]
    return tokens


@pytest.mark.parametrize("method", ["base", "knn", "retomaton", "suffix"])
def test_echo_gives_the_log_probs_of_one_call_of_the_model(
    server: Running, model: PreTrainedModel, memory: Memory, method: str
) -> None:
    rng = np.random.default_rng(1)
    prompts = [[0, *rng.integers(60, 110, size=n).tolist()] for n in (3, 40, 70)]
    answer = server.complete(
        prompts, max_tokens=1, echo=True, logprobs=1, model=f"tiny@{method}", seed=1234
    )
    for tokens, choice in zip(prompts, answer["choices"], strict=True):
        expected = mixed_log_probs(model, None if method == "base" else memory, tokens, method)
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        assert len(told["token_logprobs"]) == len(tokens) + 1  # exactly one is generated
        scored = np.array(told["token_logprobs"][1:-1])
        right = expected[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(scored, right, atol=1e-4)
        for own, top, row in zip(scored, told["top_logprobs"][1:-1], expected, strict=False):
            assert own in top.values()  # the very same float
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-4)


def test_a_prompt_that_is_scored_has_to_fit_the_model(server: Running) -> None:
    body = {"model": "tiny@base", "max_tokens": 0, "echo": True, "logprobs": 0}
    refused = server.post("/v1/completions", {**body, "prompt": [70] * 513})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert server.post("/v1/completions", {**body, "prompt": [70] * 512}).status_code == 200


def test_texts_are_scored_without_the_start_token(server: Running) -> None:
    choice = server.complete("law", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == "law"
    assert choice["logprobs"]["tokens"] == ["l", "a", "w"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert all(isinstance(value, float) for value in choice["logprobs"]["token_logprobs"])


def test_sources_say_what_was_mixed(
    server: Running, model: PreTrainedModel, memory: Memory, tiny_tokenizer: Any
) -> None:
    tokens = _tokens(server, PROMPT, 10, "tiny@knn")
    ids = torch.tensor([[0, *tiny_tokenizer(PROMPT)["input_ids"]]])
    with attach(model, memory, "knn") as session:
        model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=1)
        sources = session.sources(0)
    assert len(sources) == len(tokens)
    for told, known in zip(tokens, sources, strict=True):
        assert told["memory_weight"] == pytest.approx(known.memory_weight, abs=1e-4)
        strongest = known.sources[0] if known.sources else None
        assert bool(told["sources"]) == (strongest is not None)
        if strongest is not None:
            assert told["sources"][0]["weight"] == pytest.approx(strongest.weight, abs=1e-4)
        for source in told["sources"]:
            number = next(
                n for n in range(memory.documents) if memory.document(n).id == source["document"]
            )
            stored = memory.document_tokens(number)
            assert stored[source["position"] + 1] == told["id"]
            assert source["value"] == told["token"]
            assert source["kind"] == "dense"


def test_alternatives_of_the_model_alone(server: Running, model: PreTrainedModel) -> None:
    tokens = _tokens(server, PROMPT, 6, "tiny@knn")
    ids = [0, *(b for b in server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"])]
    for told in tokens:
        expected = mixed_log_probs(model, None, ids)[-1]
        best = told["base_alternatives"][0]
        assert best["logprob"] == pytest.approx(expected.max(), abs=1e-4)
        assert told["base_logprob"] == pytest.approx(expected[told["id"]], abs=1e-4)
        ids.append(told["id"])


def test_chat_has_citations_of_characters(server: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the law"}], "temperature": 0}
    answer = server.post("/v1/chat/completions", {**body, "max_tokens": 24}).json()
    message = answer["choices"][0]["message"]
    assert message["annotations"]
    for annotation in message["annotations"]:
        citation = annotation["url_citation"]
        assert 0 <= citation["start_index"] < citation["end_index"] <= len(message["content"])
        assert server.client.get(citation["url"]).status_code == 200
    base = server.post("/v1/chat/completions", {**body, "model": "tiny@base", "max_tokens": 4})
    assert base.json()["choices"][0]["message"]["annotations"] == []


def test_special_tokens_that_messages_mention_are_text(
    server: Running, tiny_tokenizer: Any
) -> None:
    said = f"a{tiny_tokenizer.eos_token}b"
    tokens = server.service.vocabulary.conversation([{"role": "user", "content": said}])
    assert tiny_tokenizer.eos_token_id not in tokens
    plain = server.service.vocabulary.conversation([{"role": "user", "content": "ab"}])
    assert plain == server.service.vocabulary.encode(
        tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": "ab"}],
            chat_template=CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
    )


def test_openai_client(server: Running) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert "tiny" in [model.id for model in client.models.list()]
    whole = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "the mayor"}],
        temperature=0,
        max_tokens=16,
        logprobs=True,
        top_logprobs=2,
    )
    message = whole.choices[0].message
    assert message.annotations
    assert message.annotations[0].url_citation.title.startswith("Title")
    content = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert len(content) == whole.usage.completion_tokens  # type: ignore[union-attr,arg-type]
    pieces, usage = [], None
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "the mayor"}],
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == message.content
    assert usage == whole.usage
    text = client.completions.create(
        model="tiny", prompt=["the law", "a person"], n=2, seed=7, max_tokens=5, logprobs=3
    )
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_stream_equals_the_whole_answer(server: Running) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 1}
    whole = server.post("/v1/completions", {**body, "nearest": {}}).json()["choices"][0]
    with server.client.stream(
        "POST", "/v1/completions", json={**body, "nearest": {}, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    choices = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [whole["finish_reason"]]
    tokens = [token for choice in choices for token in choice["nearest"]["tokens"]]
    assert tokens == whole["nearest"]["tokens"]
    assert choices[-1]["nearest"]["documents"] == whole["nearest"]["documents"]
    offsets = [o for choice in choices for o in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


def test_stop_strings_end_the_text_before_them(server: Running) -> None:
    whole = server.complete(PROMPT, max_tokens=20)["choices"][0]["text"]
    stop = whole[6:9]
    cut = whole[: whole.index(stop)]
    answer = server.complete(PROMPT, max_tokens=20, stop=["never said", stop], logprobs=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (cut, "stop")
    assert "".join(choice["logprobs"]["tokens"]).startswith(cut)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    with server.client.stream(
        "POST", "/v1/completions", json={**body, "stop": stop, "stream": True}
    ) as response:
        lines = [line[6:] for line in response.iter_lines() if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == cut


def test_a_seed_gives_the_same_text_and_choices_differ(server: Running) -> None:
    options = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 5, "n": 3}
    one, two = (server.complete(PROMPT, **options)["choices"] for _ in range(2))
    assert [c["text"] for c in one] == [c["text"] for c in two]
    assert len({c["text"] for c in one}) > 1
    other = server.complete(PROMPT, **{**options, "seed": 6})["choices"]
    assert [c["text"] for c in other] != [c["text"] for c in one]


UNSUPPORTED = {
    "tools": [{}],
    "best_of": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": False,  # a truth value is no number
    "logit_bias": {"5": 1},
    "user": "someone",
    "suffix": "end",
    "unheard_of": 1,
    "store": 0,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(server: Running, field: str) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, field: UNSUPPORTED[field]}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert field in response.json()["error"]["message"]


def test_parts_of_messages_that_are_no_text_are_refused_by_name(server: Running) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    message = {"role": "user", "content": [{"type": "text", "text": "what is"}, picture]}
    response = server.post("/v1/chat/completions", {"model": "tiny", "messages": [message]})
    assert response.status_code == 400
    assert "'image_url' are not supported" in response.json()["error"]["message"]


def test_values_that_ask_for_nothing_are_accepted(server: Running) -> None:
    server.complete(
        "x", max_tokens=1, presence_penalty=0, frequency_penalty=0.0, logit_bias=None, best_of=1
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt"),
    "empty": ({"prompt": []}, "prompt"),
    "token": ({"prompt": [0, 100_000]}, "prompt"),
    "negative token": ({"prompt": [-1]}, "prompt"),
    "mixed": ({"prompt": ["a", 1]}, "prompt"),
    "surrogate": ({"prompt": "\ud800"}, "prompt"),
    "too long": ({"prompt": [5] * 600}, "prompt"),
    "too many": ({"prompt": "x", "max_tokens": 5000}, "max_tokens"),
    "type": ({"max_tokens": "5"}, "max_tokens"),
    "bool": ({"max_tokens": True}, "max_tokens"),
    "temperature": ({"temperature": -1}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "n": ({"n": 1000}, "n"),
    "logprobs": ({"logprobs": 100}, "logprobs"),
    "method": ({"nearest": {"method": "magic"}}, "nearest.method"),
    "setting": ({"nearest": {"settings": {"lambda": 1}}}, "nearest.settings"),
    "weight as a setting": ({"nearest": {"settings": {"weight": 1}}}, "nearest.settings"),
    "range": ({"nearest": {"settings": {"lam": 3}}}, "nearest.settings"),
    "memory": ({"nearest": {"memories": [{"name": "no"}]}}, "nearest.memories"),
    "weight": (
        {"nearest": {"memories": [{"name": "test", "weight": 2}]}},
        "nearest.memories.0.weight",
    ),
    "extension": ({"nearest": {"colour": "red"}}, "nearest.colour"),
    "version": ({"nearest": {"version": 2}}, "nearest.version"),
    "no number": ({"nearest": {"version": True}}, "nearest.version"),
    "temperature that is none": ({"temperature": True}, "temperature"),
    "two methods": ({"model": "tiny@knn", "nearest": {"method": "suffix"}}, "nearest.method"),
    "alternatives of nothing": ({"nearest": {"sources": False, "alternatives": 3}}, "nearest"),
    "replay without state": ({"nearest": {"method": "knn", "replay": 3}}, "nearest.replay"),
    "replay alone": ({"nearest": {"method": "base", "replay": "full"}}, "nearest.replay"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_by_field(server: Running, case: str) -> None:
    fields, param = WRONG[case]
    body = {"model": "tiny", "prompt": "x", **fields}
    content = json.dumps(body).encode()
    response = server.client.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"model": "ti', "application/json", 400),
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"model": "tiny", "prompt": "x"}', "text/plain", 400),  # what a foreign page can send
        (b'{"model": "tiny", "prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"x" * (9 << 20), "application/json", 413),
    ],
)
def test_bodies_that_are_no_request(
    server: Running, content: bytes, kind: str, status: int
) -> None:
    response = server.client.post(
        "/v1/completions", content=content, headers={"Content-Type": kind}
    )
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/query", "/search/memory/search"])
def test_bodies_without_a_length_are_limited_too(server: Running, path: str) -> None:
    """In pieces, as a client sends them that does not know how much will come."""
    pieces = (b"x" * (1 << 20) for _ in range(9))
    kind = {"Content-Type": "application/json"}
    response = server.client.post(path, content=pieces, headers=kind)
    assert response.status_code == 413
    assert "limit of 8,388,608 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models?limit=3"),
        ("GET", "/v1/nearest/documents/test?ids=doc-1"),
        ("GET", "/search/memory?name=test"),
        ("GET", "/health?x=1"),
        ("POST", "/v1/completions?model=tiny"),
        ("POST", "/search/memory/values?q=1"),
    ],
)
def test_unknown_parameters_are_refused(server: Running, method: str, path: str) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1} if method == "POST" else None
    response = server.client.request(method, path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == path.partition("?")[2].partition("=")[0]
    assert server.client.get("/?from=a-link").status_code == 200


def test_sources_that_are_not_wanted_are_not_cited(server: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the law"}], "max_tokens": 24}
    answer = server.post(
        "/v1/chat/completions", {**body, "temperature": 0, "nearest": {"sources": False}}
    ).json()
    assert answer["choices"][0]["message"]["annotations"] == []


def test_unknown_models_and_paths(server: Running) -> None:
    for path, told in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert server.post(path, {**told, "model": "tiny@knn"}).status_code == 200
        unknown = server.post(path, {**told, "model": "gpt-9"})
        assert unknown.json()["error"]["code"] == "model_not_found"
    response = server.post("/v1/completions", {"model": "gpt-9", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "error" in server.client.get("/v2/nothing").json()
    assert server.client.get("/v1/models/tiny@knn").json()["id"] == "tiny@knn"


def test_tokenizer_routes(server: Running) -> None:
    tokens = server.post("/tokenize", {"prompt": "law é", "add_special_tokens": False}).json()
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "law é"}
    info = server.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    assert info["chat_template"] == CHAT_TEMPLATE


def test_documents(server: Running, memory: Memory) -> None:
    listed = server.client.get("/v1/nearest/documents/test").json()
    assert [one["id"] for one in listed["documents"]] == [f"doc-{n}" for n in range(12)]
    whole = server.client.get("/v1/nearest/documents/test", params={"id": "doc-3"}).json()
    assert whole["text"] == "".join(whole["pieces"]) == memory.document(3).text
    missing = server.client.get("/v1/nearest/documents/test", params={"id": "no"})
    assert missing.status_code == 404


def test_special_tokens_that_prompts_name_are_text_unless_they_are_to_be_read(
    server: Running,
) -> None:
    scored = {"max_tokens": 0, "echo": True, "logprobs": 0}
    plain = server.complete("a<eos>b", **scored)["choices"][0]["logprobs"]["tokens"]
    assert plain == list("a<eos>b")
    read = server.complete("a<eos>b", **scored, special_tokens=True)["choices"][0]
    assert read["logprobs"]["tokens"] == ["a", "<eos>", "b"]


def test_a_text_is_looked_up_as_the_documents_of_its_memory_are_read(
    build_memory: Callable[..., Memory],
    model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "ab <eos> cd"
    documents = [*make_documents(3, 20), Document("named", text + "e", {}, "named")]
    with pytest.warns(SpecialTokensWarning):
        memory = build_memory(model, documents)
    service = make_service(model, tiny_tokenizer, [memory], ServeOptions(model_name="tiny"))
    found = _text(service, TextSearch(text=text, k=1))["matches"][0]
    assert (found["document"], found["position"]) == ("named", len(text))
    assert found["length"] >= len(text)


def test_what_stands_around_an_entry_ends_with_its_document(
    server: Running,
    memory: Memory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is read without the rest of the document, however long that is."""
    documents = [memory.document_tokens(number).tolist() for number in range(memory.documents)]
    starts = np.cumsum([0, *map(len, documents)])
    library = server.service.library
    retrieval = library.retrieval("knn", None)
    provenance = Provenance(retrieval, library, server.service.vocabulary, "")
    monkeypatch.delattr(Snapshot, "document_tokens")
    for number in (0, 3, memory.documents - 1):
        tokens = documents[number]
        places = [0, 5, len(tokens) // 2, len(tokens) - 5, len(tokens) - 2]
        spoke = [Spoke(0, int(starts[number]) + at, 0.1, "dense", 0, 1.0) for at in places]
        told = provenance.token(Told(70, "", -1.0, -1.0, [], [], spoke))["sources"]
        for at, source in zip(places, told, strict=True):
            assert source["position"] == at
            parts = tokens[max(1, at - 11) : at + 1], [tokens[at + 1]], tokens[at + 2 : at + 14]
            for name, part in zip(("before", "value", "after"), parts, strict=True):
                assert source[name] == tiny_tokenizer.decode(part)


def test_what_is_as_long_as_a_memory_is_kept_for_few_requests(server: Running) -> None:
    library, large = server.service.library, []
    for number in range(10):
        name = {"memory": "test", "id": f"doc-{number}"}
        without = NearestOptions.model_validate({"without": [name]})
        large.append(weakref.ref(library.retrieval("suffix", without).memories[0]))
        size = NearestOptions.model_validate({"settings": {"passage_tokens": 16 + number}})
        reading: Any = library.retrieval("in-context", size).reading
        large.append(weakref.ref(reading.chooser.passages))
        del reading
    gc.collect()
    assert sum(one() is not None for one in large) <= 6


def test_documents_are_not_kept_whole(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], Snapshot.document

    def noting(memory: Memory, number: int) -> Document:
        document = real(memory, number)
        read.append(weakref.ref(document))
        return document

    monkeypatch.setattr(Snapshot, "document", noting)
    assert len(server.client.get("/v1/nearest/documents/test").json()["documents"]) == 12
    server.client.get("/v1/nearest/documents/test", params={"id": "doc-3"}).raise_for_status()
    server.post("/search/text", {"text": PROMPT}).raise_for_status()
    server.complete(PROMPT, max_tokens=4, model="tiny@knn", nearest={})
    gc.collect()
    assert len(read) > 12
    assert not [one for one in read if one() is not None]


def test_answers_are_as_the_published_schema_says(server: Running) -> None:
    schemas = server.client.get("/v1/nearest/schema").json()
    assert schemas == json.loads(Path("docs/nearest-extension.json").read_text("utf-8"))
    answer, piece = (Draft202012Validator(schemas[name]) for name in ("answer", "piece"))
    options = {"settings": {"lam": 1.0}, "sources": True}
    for method in ("base", "knn", "suffix", "retomaton"):
        nearest = {} if method == "base" else options
        asked = {"model": f"tiny@{method}", "max_tokens": 12, "nearest": nearest}
        told = server.complete(PROMPT, echo=True, n=2, **asked)
        for choice in told["choices"]:
            answer.validate(choice["nearest"])
        assert told["choices"][0]["nearest"]["tokens"]
        body = {"prompt": PROMPT, "stream": True, **asked}
        lines = server.post("/v1/completions", body).text.splitlines()
        pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        for one in pieces[:-1]:
            piece.validate(one["choices"][0]["nearest"])
        answer.validate(pieces[-1]["choices"][0]["nearest"])
    request = Draft202012Validator(schemas["request"])
    request.validate(options)
    assert not request.is_valid({"sorces": True})
    broken = {**told["choices"][0]["nearest"], "spans": None}
    assert not answer.is_valid(broken)


def test_the_page_has_its_style_inside(server: Running) -> None:
    page = server.client.get("/")
    inside = re.search(r"<style>(.*)</style>", page.text, re.DOTALL)
    assert inside is not None
    assert inside[1] == server.client.get("/page/viewer.css").text
    digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in page.headers["Content-Security-Policy"]


def test_health_and_metrics(server: Running) -> None:
    assert server.client.get("/health").text == "ok"  # the RETRO line's client looks for it
    as_json = server.client.get("/health", headers={"Accept": "application/json"})
    assert as_json.json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready"}
    server.complete("x", max_tokens=3)
    text = server.client.get("/metrics").text
    assert 'vllm:generation_tokens_total{model_name="tiny"}' in text
    assert 'route="/v1/completions",status="200"' in text
    assert 'nearest:memory_documents{memory="test"} 12.0' in text
    assert re.search(r'nearest:memory_version\{memory="test"\} [1-9]', text)


def test_another_host_or_page_is_refused_without_a_key(server: Running) -> None:
    evil = server.client.get("/v1/models", headers={"Host": "evil.example"})
    assert evil.status_code == 403
    page = server.client.post(
        "/tokenize", json={"prompt": "x"}, headers={"Sec-Fetch-Site": "cross-site"}
    )
    assert page.status_code == 403


def test_no_cross_origin_access_is_granted(server: Running) -> None:
    answer = server.client.options(
        "/v1/models",
        headers={"Origin": "https://example.org", "Access-Control-Request-Method": "GET"},
    )
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_key_guards_everything_but_health(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    key = "a-long-secret-clé"
    with (
        serving(model, tiny_tokenizer, [memory], api_key=key) as running,
        httpx.Client(base_url=running.url) as stranger,
    ):
        assert stranger.get("/health").status_code == 200
        paths = {"/", "/page/main.js", "/metrics", "/ready", "/tokenizer_info", "/v1/models"}
        for path in {*paths, "/openapi.json", "/v1/nearest", "/nowhere"}:
            assert stranger.get(path).status_code == 401, path
        wrong = stranger.get("/v1/models", headers={"Authorization": "Bearer wrong-secret"})
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        basic = base64.b64encode(f"me:{key}".encode()).decode()
        browser = stranger.get("/v1/models", headers={"Authorization": f"Basic {basic}"})
        assert browser.status_code == 200
        assert running.client.get("/v1/models").status_code == 200


def test_a_request_that_takes_too_long_gives_504(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with serving(model, tiny_tokenizer, [memory], timeout=0.3) as running:
        body = {"model": "tiny", "prompt": "x", "n": 32, "max_tokens": 500, "temperature": 0}
        response = running.post("/v1/completions", body)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 500, "temperature": 1.0, "n": 8}
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    deadline = time.monotonic() + 20
    while server.service.engine.busy:
        assert time.monotonic() < deadline, "the work goes on without its client"
        time.sleep(0.02)


def test_shutdown_ends_running_answers_with_503(
    model: PreTrainedModel, memory: Memory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 500, "n": 8, "stream": True}
    with (
        serving(model, tiny_tokenizer, [memory], grace=0.1) as running,
        running.client.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        running.server.should_exit = True
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2][6:])["error"]
    assert "shutting down" in error["message"]
