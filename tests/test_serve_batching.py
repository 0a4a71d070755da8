"""Requests that run together: each gets what it would get alone, while others come and go."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import make_documents, make_model, pass_widths
from nearest import Memory, attach, evaluate
from nearest.encode.layers import find_key_layer
from nearest.models.drafting import Experience
from nearest.serve import living, provenance
from nearest.serve.app import ServeOptions, make_service
from nearest.serve.drafts import Drafts
from nearest.serve.passes import Passes
from nearest.serve.schema import NearestOptions
from nearest.serve.shelf import version_of
from nearest.serve.vocabulary import Stops, _overlap
from nearest.serve.work import Failure, News, Wanted, Work
from serving import CHAT_TEMPLATE, Running, roomy_model, serving, with_gates

WRITE_KEY = "a-key-to-write"
METHODS = ("base", "knn", "retomaton", "suffix")
GATED = ("hybrid", "knn+buckets", "knn+meta-k", "knn+adaptret")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return roomy_model()


@pytest.fixture
def server(
    model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Running]:
    memory = build_memory(model, make_documents(12, 30))
    with serving(
        model, tiny_tokenizer, [memory], chat_template=CHAT_TEMPLATE, write_key=WRITE_KEY
    ) as running:
        yield running


def asked(server: Running, number: int, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """A request of its own length, method and options."""
    rng = np.random.default_rng(number)
    prompt = [0, *rng.integers(60, 120, size=int(rng.integers(1, 90))).tolist()]
    body: dict[str, Any] = {
        "model": f"tiny@{methods[number % len(methods)]}",
        "prompt": prompt,
        "max_tokens": int(rng.integers(1, 24)),
        "temperature": 0,
        "logprobs": 2,
        "echo": number % 5 == 0,
    }
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()["choices"][0]["logprobs"]
    return told


def assert_same(alone: dict[str, Any], together: dict[str, Any]) -> None:
    """Log-probabilities within 1e-4, and the same tokens wherever the choice was clear."""
    for n, (one, other) in enumerate(zip(alone["tokens"], together["tokens"], strict=True)):
        if one != other:
            best = sorted(alone["top_logprobs"][n].values(), reverse=True)
            assert best[0] - best[1] <= 1e-4
            return  # what follows goes on from another token
        if alone["token_logprobs"][n] is not None:
            assert together["token_logprobs"][n] == pytest.approx(
                alone["token_logprobs"][n], abs=1e-4
            )


@pytest.mark.slow
def test_what_else_runs_changes_nothing(server: Running) -> None:
    count = 24
    alone = [asked(server, number) for number in range(count)]
    with ThreadPoolExecutor(12) as clients:
        together = list(clients.map(lambda number: asked(server, number), range(count)))
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


def test_prompts_take_turns(
    model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """First come, first served; a long one lets short ones pass, and none waits for ever."""
    service = make_service(model, tiny_tokenizer, [build_memory(model)], ServeOptions(method="knn"))
    nothing = service.library.retrieval("base", None).ensemble
    ended: list[int] = []

    def work(number: int, length: int) -> Work:
        def listener(news: Any) -> None:
            assert isinstance(news, News)
            if news.finished:
                ended.append(number)

        return Work([0] * length, Wanted(1, temperature=0), nothing, listener)

    lengths = [500, *[100] * 9]
    service.engine._waiting.extend(work(n, length) for n, length in enumerate(lengths))
    later = itertools.count(len(lengths))
    for _ in range(12):
        service.engine._waiting.append(work(next(later), 100))  # somebody always comes
        service.engine._round()
    assert ended[:12] == [*range(1, 11), 0, 11]


def test_drafts_change_no_token(
    model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of every method, greedy and sampled, that end and join while others draft."""
    memory = build_memory(model, make_documents(12, 30))
    followed = {"lam": 0.9, "temperature": 1000.0}
    monkeypatch.setattr(Experience, "length", lambda _, rates: len(rates))  # whatever it costs
    monkeypatch.setattr(Experience, "resting", property(lambda _: False, lambda *_: None))
    accepted: list[list[int]] = []
    saw = Drafts.saw
    monkeypatch.setattr(
        Drafts, "saw", lambda self, found, right: (accepted.append(right), saw(self, found, right))
    )
    results, counts = [], []
    for drafts in (False, True):
        options = ServeOptions(method="suffix", settings=followed, draft=drafts)
        service = make_service(model, tiny_tokenizer, [memory], options)
        told: dict[tuple[int, int], list[tuple[int, float | None]]] = {}

        def listen(number: int, news: News | Failure, told: Any = told) -> None:
            assert isinstance(news, News)
            told.setdefault((number, news.choice), []).extend(
                (t.token, t.log_prob) for t in news.told
            )

        works = []
        for number in range(10):
            method = METHODS[number % len(METHODS)]
            asked = None
            if method != "base":
                asked = NearestOptions.model_validate({"settings": followed})
            ensemble = service.library.retrieval(method, asked).ensemble
            prompt = memory.document_tokens(number)[: 4 + 3 * number].tolist()
            wanted = Wanted(
                9 + 2 * number if asked else 8,
                n=1 + number % 2,
                temperature=number % 3 / 2,
                seed=number,
                stops=("of the",) if number == 5 else (),
            )
            works.append(Work(prompt, wanted, ensemble, partial(listen, number)))
        with pass_widths(model) as seen:
            while works or service.engine.busy:
                service.engine._waiting.extend(works[:2])
                del works[:2]
                service.engine._round()
        results.append(told)
        counts.append(len(seen))
    alone, drafted = results
    assert len(alone) == 15
    for key, tokens in alone.items():
        assert [token for token, _ in drafted[key]] == [token for token, _ in tokens]
        assert [p for _, p in drafted[key]] == pytest.approx([p for _, p in tokens], abs=1e-4)
    assert any(len({*right}) > 2 for right in accepted)  # some rows more than others
    assert sum(map(sum, accepted)) > 40
    assert counts[1] < counts[0]


@torch.inference_mode()
def test_a_row_at_its_last_position_is_filled_up_beside_a_draft() -> None:
    model = roomy_model(12)
    passes = Passes(model, find_key_layer(model, "last_hidden"))
    texts = [list(range(60, 72)), [60, 61, 65, 66, 67]]
    batch, other = passes.begin(), passes.begin()
    batch.read(texts[0][:-1], 1)
    other.read(texts[1][:2], 1)
    batch.share()
    batch.join(other)
    given = batch.verify([texts[0][-1:], texts[1][2:]]).log_probs
    each = [model(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]
    torch.testing.assert_close(given[0, 0], each[0][-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(given[1], each[1][2:], atol=1e-4, rtol=0)
    batch.take_back([2, 1])  # the fill, and a false token
    assert batch.keep([1]) == [1]
    again = batch.verify([[68, 69]]).log_probs[0]
    expected = model(torch.tensor([[60, 61, 65, 66, 68, 69]])).logits[0, 4:].log_softmax(-1)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_gates_and_guards_are_each_requests_own(
    model: PreTrainedModel,
    build_memory: Callable[..., Memory],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Alone, together, and as the attached model scores it: the same log-probabilities."""
    memory = with_gates(model, build_memory(model), tiny_tokenizer, GATED)
    with serving(model, tiny_tokenizer, [memory]) as server:
        alone = [asked(server, number, GATED) for number in range(16)]
        with ThreadPoolExecutor(16) as clients:
            together = list(clients.map(lambda n: asked(server, n, GATED), range(16)))
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)
        text = "the court shall the law"
        tokens = [0, *tiny_tokenizer(text)["input_ids"]]
        for method in GATED:
            answer = server.complete(
                tokens, max_tokens=0, model=f"tiny@{method}", logprobs=1, echo=True
            )
            told = answer["choices"][0]["logprobs"]["token_logprobs"]
            ids = torch.tensor([tokens])
            with torch.inference_mode(), attach(model, memory, method, replay="full"):
                expected = model(ids).logits[0, :-1].log_softmax(-1)
            right = expected.gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(told[1:], right, atol=1e-4, err_msg=method)
            scored = evaluate(model, memory, [text], method, tokenizer=tiny_tokenizer)
            assert -np.mean(told[1:]) == pytest.approx(scored.nll, abs=1e-4)


def test_writers_and_leaving_clients_disturb_nobody(server: Running) -> None:
    """Each answer is that of one version: of memory before, or after, some of the writes."""
    count = 12
    headers = {"Authorization": f"Bearer {WRITE_KEY}"}
    done = threading.Event()

    def write() -> int:
        for number in itertools.count():
            if done.is_set():
                return number
            document = {"id": f"new-{number}", "text": "~" * 5}  # far from every prompt
            answer = server.post(
                "/v1/nearest/documents/test", {"documents": [document]}, headers=headers
            )
            assert answer.status_code == 200, answer.text

    def leave(number: int) -> None:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "stream": True, "seed": number}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())

    numbers = [n for n in range(4 * count) if METHODS[n % 4] in ("base", "suffix")][:count]
    alone = [asked(server, number) for number in numbers]
    with ThreadPoolExecutor(8) as clients:
        writing = clients.submit(write)
        leaving = [clients.submit(leave, number) for number in range(6)]
        together = list(clients.map(lambda number: asked(server, number), numbers))
        for one in leaving:
            one.result()
        done.set()
        assert writing.result() > 0
    for number, one, other in zip(numbers, alone, together, strict=True):
        assert len(one["tokens"]) == len(other["tokens"])
        if METHODS[number % 4] == "base":
            assert_same(one, other)


def test_documents_are_added_replaced_and_removed(server: Running) -> None:
    url, key = "/v1/nearest/documents/test", {"Authorization": f"Bearer {WRITE_KEY}"}
    new = {"documents": [{"id": "é/1", "text": "zebra zebra", "metadata": {"licence": "CC0"}}]}
    assert server.post(url, new).status_code == 401
    added = server.post(url, new, headers=key).json()
    assert (added["version"], added["documents"]) == (2, 13)
    again = server.post(url, new, headers=key)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "document_exists")
    assert "send replace: true" in again.json()["error"]["message"]
    answer = server.complete("zebra ze", max_tokens=3, model="tiny@suffix", nearest={})
    assert answer["choices"][0]["text"] == "bra"
    source = answer["choices"][0]["nearest"]["tokens"][0]["sources"][0]
    assert (source["document"], source["licence"]) == ("é/1", "CC0")
    assert answer["choices"][0]["nearest"]["memories"][0]["version"] == 2
    changed = {"documents": [{"id": "é/1", "text": "zebra zeal"}], "replace": True}
    assert server.post(url, changed, headers=key).status_code == 200
    assert server.complete("zebra ze", max_tokens=2, model="tiny@suffix")["choices"][0][
        "text"
    ].startswith("al")
    # What was made of the versions before is not kept.
    kept = server.service.library._ensembles.values()
    assert {version_of(memory) for one in kept for memory in one.memories} == {3}
    gone = server.client.delete(url, params={"id": "é/1"}, headers=key)
    assert gone.json()["documents"] == 12
    assert server.client.get(url, params={"id": "é/1"}).status_code == 404
    assert server.post("/v1/nearest/compact/test", {}, headers=key).status_code == 200
    for ids in (["no"], ["doc-0", "no"]):  # all are removed, or none
        refused = server.client.delete(url, params={"id": ids}, headers=key)
        assert refused.status_code == 404
        assert "no document 'no'" in refused.json()["error"]["message"]


def test_new_documents_and_changed_ones_come_together(server: Running) -> None:
    url, key = "/v1/nearest/documents/test", {"Authorization": f"Bearer {WRITE_KEY}"}
    first = {"documents": [{"id": "there", "text": "zebra"}]}
    before = server.post(url, first, headers=key).json()
    blank = {"documents": [{"id": "good", "text": "a"}, {"id": "blank", "text": " \n"}]}
    refused = server.post(url, blank, headers=key)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents.1.text")
    both = {"documents": [{"id": "there", "text": "okapi"}, {"id": "new", "text": "gnu"}]}
    after = server.post(url, {**both, "replace": True}, headers=key).json()
    assert after["version"] == before["version"] + 1
    assert after["documents"] == before["documents"] + 1
    told = [server.client.get(url, params={"id": one}).json()["text"] for one in ("there", "new")]
    assert told == ["okapi", "gnu"]


def test_versions_in_use_are_few(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change waits while requests keep older versions in RAM, and says so after a while."""
    monkeypatch.setattr(living, "_VERSIONS", 4)  # the first one is the fixture's own, too
    monkeypatch.setattr(living, "_PATIENCE", 0.2)
    url, key = "/v1/nearest/documents/test", {"Authorization": f"Bearer {WRITE_KEY}"}

    def add(name: str) -> int:
        document = {"id": name, "text": "zebra"}
        return server.post(url, {"documents": [document]}, headers=key).status_code

    assert [add(f"free-{n}") for n in range(5)] == [200] * 5  # versions that nobody uses are gone
    used = []
    for number in range(2):
        used.append(server.service.library.memory("test"))
        assert add(f"used-{number}") == 200
    assert add("one-more") == 503
    used.pop()
    assert add("one-more") == 200


def test_without_a_document_is_as_if_it_were_removed(server: Running) -> None:
    key = {"Authorization": f"Bearer {WRITE_KEY}"}
    for method in ("knn", "retomaton", "suffix"):
        options = {"model": f"tiny@{method}", "max_tokens": 12, "logprobs": 1}
        found = server.complete("the court", **options, nearest={})["choices"][0]["nearest"]
        used = found["documents"][0]["document"]
        without = {"without": [{"memory": "test", "id": used}]}
        masked = server.complete("the court", **options, nearest=without)["choices"][0]
        assert used not in [one["document"] for one in masked["nearest"]["documents"]]
        url = "/v1/nearest/documents/test"
        server.client.delete(url, params={"id": used}, headers=key).raise_for_status()
        removed = server.complete("the court", **options)["choices"][0]
        assert removed["logprobs"]["tokens"] == masked["logprobs"]["tokens"]
        np.testing.assert_allclose(
            removed["logprobs"]["token_logprobs"], masked["logprobs"]["token_logprobs"], atol=1e-4
        )


def test_verbatim_runs_are_found(server: Running) -> None:
    key = {"Authorization": f"Bearer {WRITE_KEY}"}
    text = "0123456789 quick brown foxes jump"
    document = {"id": "copied", "text": text, "metadata": {"license": "MIT"}}
    server.post("/v1/nearest/documents/test", {"documents": [document]}, headers=key)
    options = {"memories": [{"name": "test", "weight": 1}], "settings": {"lam": 1}}
    answer = server.complete("0123456", max_tokens=20, model="tiny@suffix", nearest=options)[
        "choices"
    ][0]
    assert answer["text"] == text[7:27]
    run = answer["nearest"]["verbatim"][0]
    assert (run["document"], run["licence"], run["tokens"]) == ("copied", "MIT", 20)
    assert answer["text"][run["start"] : run["end"]] == text[7:27]
    assert run["position"] == 8  # of the text's tokens, after the start token


@given(st.lists(st.integers(0, 3), min_size=12, max_size=40), st.data())
def test_copies_longer_than_what_is_compared_are_one(text: list[int], data: st.DataObject) -> None:
    """Beside a scan that compares everything."""
    begin = data.draw(st.integers(0, len(text) - 2))
    copy = text[begin : data.draw(st.integers(begin + 2, len(text)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "MAX_MATCH", 4)
        whole = [
            [common_suffix(text[: entry + 2], copy[: n + 1]) for entry in range(len(text) - 1)]
            for n in range(1, len(copy))
        ]
        ids = np.tile(np.arange(len(text) - 1), (len(whole), 1))
        lengths = np.minimum(np.array(whole), 5)
        assert provenance.whole_lengths(ids, lengths).tolist() == whole


def common_suffix(one: list[int], other: list[int]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_texts_of_one_request_are_continued_as_if_alone(
    build_memory: Callable[..., Memory], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama")
    memory = build_memory(model)
    with serving(model, tiny_tokenizer, [memory]) as running:
        alone = running.complete([0, 70, 71], max_tokens=8)["choices"][0]["text"]
        several = running.complete([[0, 70, 71], [0, 90], [0, 80, 81, 82]], max_tokens=8)
        assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
        assert several["choices"][0]["text"] == alone


@given(
    st.text("ab", max_size=12),
    st.lists(st.integers(1, 3), min_size=1),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, sizes: list[int], stops: list[str]
) -> None:
    finder, final, at = Stops(stops), 0, 0
    for size in itertools.cycle(sizes):
        if at >= len(text) or finder.found is not None:
            break
        final = finder.push(text[at : at + size])
        at += size
        assert final <= min(at, len(text))
        begins = [n for stop in stops if (n := text[:at].find(stop)) >= 0]
        assert final <= min(begins, default=len(text))  # nothing of a stop string is given out
    ends = sorted(n + len(stop) for stop in stops if (n := text.find(stop)) >= 0)
    if ends:
        assert finder.found is not None
        assert any(text.startswith(stop, finder.found) for stop in stops)
    else:
        assert finder.found is None


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=6))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stop: str) -> None:
    longest = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
    assert _overlap(text, stop) == longest


def test_stop_strings_are_compared_where_they_may_begin_alone() -> None:
    class Counted(str):
        compared = 0

        def __getitem__(self, at: Any) -> str:
            self.compared += isinstance(at, slice)
            return str.__getitem__(self, at)

        def startswith(self, *given: Any) -> bool:
            self.compared += 1
            return str.startswith(self, *given)

    stop = Counted("a" * 1000)
    assert _overlap("b" * 997 + "aaa", stop) == 3
    assert stop.compared == 1
