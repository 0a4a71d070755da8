"""In-context retrieval: passages of the memory before the text, against plain re-computation."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

from conftest import POSITIONS, make_documents, make_model, make_tokenizer, random_documents
from nearest import Document, Memory, evaluate, read_text, sweep, tune
from nearest.corpus.windows import windows
from nearest.errors import ModelError, NearestError, SettingError
from nearest.index.bm25 import K1, B
from nearest.models.in_context import PassageChooser, read_with_passages
from nearest.retrieval.passages import Passages
from nearest.retrieval.settings import Settings, method_named, resolve_settings
from nearest.verbs.chat import Chat
from nearest.verbs.generate import generate
from nearest.verbs.weights import tune_weights
from oracle import keys_and_logits, knn_lm_log_probs

pytest.importorskip("bm25s")
TOKENIZER = make_tokenizer()
SEED = 0
TEXT = [
    Document(
        f"text-{i}", bytes(np.random.default_rng((SEED, i)).integers(33, 127, n).tolist()).decode()
    )
    for i, n in enumerate((70, 9))
]  # such that never are two passages equally good
TOKENS = [np.array([0, *TOKENIZER(d.text, add_special_tokens=False)["input_ids"]]) for d in TEXT]
PASSAGES = {"passages": 2, "passage_tokens": 12, "passage_stride": 8, "query_tokens": 10}
LOOKUP = {"lam": 0.4, "temperature": 30.0}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(scope="module")
def memory(model: PreTrainedModel, build_memory: Callable[..., Memory]) -> Memory:
    return build_memory(model, random_documents())


def by_hand(memory: Memory, query: list[int], without: int = -1) -> tuple[list[list[int]], bool]:
    """The tokens of the two best passages, best first, by BM25's formula; and no ties."""
    size = PASSAGES["passage_tokens"]
    passages = []
    for number in range(memory.documents):
        tokens = memory.document_tokens(number)[1:].tolist()
        passages += [(number, tokens[at : at + size]) for at in range(0, len(tokens), size)]
    mean = sum(len(tokens) for _, tokens in passages) / len(passages)
    held = Counter(token for _, tokens in passages for token in set(tokens))
    scores = []
    for number, tokens in passages:
        score = 0.0
        for token in query:
            idf = math.log1p((len(passages) - held[token] + 0.5) / (held[token] + 0.5))
            count = tokens.count(token)
            score += idf * count / (count + K1 * (1 - B + B * len(tokens) / mean))
        scores.append(-math.inf if number == without else score)
    best = sorted(range(len(passages)), key=lambda i: -scores[i])[: PASSAGES["passages"] + 1]
    gaps = [scores[a] - scores[b] for a, b in itertools.pairwise(best)]
    return [passages[i][1] for i in best[:-1] if scores[i] > 0], min(gaps) > 1e-5


def front_of(memory: Memory, tokens: np.ndarray, position: int, without: int = -1) -> list[int]:
    at = position - position % PASSAGES["passage_stride"]
    query = tokens[max(1, at + 1 - PASSAGES["query_tokens"]) : at + 1].tolist()
    if not query:
        return []
    found, clear = by_hand(memory, query, without)
    assert clear, "this text cannot tell which passage is better: take another seed"
    return [] if not found else [0, *(t for one in reversed(found) for t in one)]


def oracle_nll(model: PreTrainedModel, memory: Memory, method: str, window: int) -> np.ndarray:
    """Summed nll of each document, one position at a time, each with passages of its own."""
    stride, sums = window // 2, []
    for tokens in TOKENS:
        total = 0.0
        for part in windows(len(tokens), window, stride):
            for position in range(part.first, part.stop):
                at = position - position % PASSAGES["passage_stride"]
                if position in (at, part.first):
                    front = front_of(memory, tokens, position)
                stop = min(part.stop, at + PASSAGES["passage_stride"])
                start = max(part.start, stop - (64 - len(front)))  # of 64 positions
                inputs = [*front, *tokens[start : position + 1].tolist()]
                hidden, logits = keys_and_logits(model, torch.tensor(inputs))
                if method == "knn":
                    settings = {**LOOKUP, "k": memory.entries}
                    log_probs = knn_lm_log_probs(memory, hidden[-1:], logits[-1:], **settings)
                else:
                    log_probs = torch.log_softmax(logits[-1:].double(), -1).numpy()
                total -= log_probs[0, tokens[position + 1]]
        sums.append(total)
    return np.array(sums)


def test_every_log_probability_equals_one_computed_by_hand(
    model: PreTrainedModel, memory: Memory
) -> None:
    # All of GPT-2's positions: there passages take the place of the oldest context.
    window = 64 if model.config.model_type == "gpt2" else 32
    methods = ["base", "in-context", "in-context+knn"]
    options: dict[str, Any] = {**PASSAGES, **LOOKUP, "k": memory.entries}
    base, alone, knn = evaluate(
        model,
        memory,
        TEXT,
        methods,
        tokenizer=TOKENIZER,
        window=window,
        stride=window // 2,
        **options,
    )
    np.testing.assert_allclose(
        alone.document_nll, oracle_nll(model, memory, "base", window), rtol=1e-4
    )
    np.testing.assert_allclose(
        knn.document_nll, oracle_nll(model, memory, "knn", window), rtol=1e-4
    )
    assert abs(alone.nll - base.nll) > 1e-3
    assert alone.delta_nll == pytest.approx(alone.nll - base.nll)
    assert alone.added_ms != 0  # it is counted that more is read
    assert (base.settings_from, base.k) == (None, None)


def test_a_text_that_stands_in_the_memory_gives_itself_no_passages(
    model: PreTrainedModel, memory: Memory
) -> None:
    chooser = PassageChooser.of([memory], model, Settings(**PASSAGES))
    own = 3
    tokens = memory.document_tokens(own).astype(np.int64)
    position = 16
    expected = front_of(memory, tokens, position, without=own)
    assert chooser.before(tokens, position, own).tolist() == expected
    assert chooser.before(tokens, position).tolist() != expected
    with_own, without = (
        evaluate(
            model, memory, [memory.document(own)], "in-context",
            tokenizer=TOKENIZER, leave_one_out=one, **PASSAGES,
        )
        for one in (False, True)
    )  # fmt: skip
    assert with_own.nll != without.nll


def test_passages_are_all_of_the_memory(memory: Memory) -> None:
    passages = Passages(memory, 12)
    read: dict[int, list[int]] = {number: [] for number in range(memory.documents)}
    for number in range(len(passages)):
        read[int(passages.documents[number])] += passages.tokens(number).tolist()
    assert read == {n: memory.document_tokens(n)[1:].tolist() for n in read}
    assert passages.best(np.array([], dtype=np.int64), 3) == []
    assert passages.best(np.array([257]), 3) == []  # no text has this byte


def test_greedy_text_is_what_the_passages_make_likeliest(
    model: PreTrainedModel, memory: Memory
) -> None:
    prompt = TEXT[0].text[:12]
    shown: list[str] = []
    written = generate(
        model, TOKENIZER, memory, prompt, method="in-context", settings=PASSAGES,
        max_new_tokens=17, do_sample=False, stream=shown.append, eos_token_id=None,
    )  # fmt: skip
    tokens = np.array([0, *TOKENIZER(prompt, add_special_tokens=False)["input_ids"]])
    expected: list[int] = []
    chooser = PassageChooser.of([memory], model, Settings(**PASSAGES))
    for _ in range(17):
        text = np.array([*tokens, *expected])
        front = chooser.before(text, chooser.chosen_at(len(text) - 1))
        inputs = [*front.tolist(), *text.tolist()]
        _, logits = keys_and_logits(model, torch.tensor(inputs))
        expected.append(int(logits[-1].argmax()))
    text = TOKENIZER.decode([*tokens[1:], *expected], skip_special_tokens=True)[len(prompt) :]
    assert written.text == text
    assert "".join(shown) == text.rstrip("\ufffd")
    assert [token.memory_weight for token in written.tokens] == [0.0] * 17


def greedy(
    model: PreTrainedModel, memory: Memory, prompt: str, new: int, first: int | None = None
) -> str:
    """What follows a prompt, whose first new token may be given: every round read anew."""
    begun = [0, *TOKENIZER(prompt, add_special_tokens=False)["input_ids"]]
    tokens = list(begun)
    chooser = PassageChooser.of([memory], model, Settings(**PASSAGES))
    while len(tokens) < len(begun) + new:
        at = chooser.chosen_at(len(tokens) - 1)
        front = chooser.before(np.array(tokens), at).tolist()
        stop = min(at + PASSAGES["passage_stride"] + 1, len(begun) + new)
        oldest = max(0, len(front) + stop - 1 - POSITIONS)
        while len(tokens) < stop:
            _, logits = keys_and_logits(model, torch.tensor([*front, *tokens[oldest:]]))
            constrained = first is not None and len(tokens) == len(begun)
            tokens.append(first if constrained else int(logits[-1].argmax()))
    return TOKENIZER.decode(tokens[1:], skip_special_tokens=True)[len(prompt) :]


def test_where_positions_do_not_suffice_the_oldest_of_the_text_gives_way(
    model: PreTrainedModel, memory: Memory
) -> None:
    prompt = TEXT[0].text[:30]
    written = generate(
        model, TOKENIZER, memory, prompt, method="in-context", settings=PASSAGES,
        max_new_tokens=20, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert written.text == greedy(model, memory, prompt, 20)


def test_a_healed_prompt_decides_on_the_first_token_alone(
    model: PreTrainedModel, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where text and passages together are later as long as they were at first."""
    (first,) = TOKENIZER("Z", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("nearest.verbs.prompt._beginning_with", lambda *_: [first])
    monkeypatch.setattr(
        PassageChooser, "before", lambda _, text, __: np.arange(40, 40 + 30 - len(text))
    )
    written = generate(
        model, TOKENIZER, memory, "the ", heal=True, method="in-context", settings=PASSAGES,
        max_new_tokens=17, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    expected = greedy(model, memory, "the", 17, first)
    assert expected.startswith("Z")
    assert set(expected[1:]) != {"Z"}
    assert written.text == expected


class Dictates(LogitsProcessor):
    """Gives the tokens that are to be written, by the length of the text so far."""

    def __init__(self, prompt: int, text: list[int], rather: int | None) -> None:
        self._prompt, self._text, self._rather = prompt, text, rather

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self._text[input_ids.shape[1] - self._prompt]] += 1e4
        if self._rather is not None:  # wherever it may stand
            scores[:, self._rather] += 2e4
        return scores


@pytest.fixture
def dictated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, int]]:
    """A text that is dictated, in pieces of four tokens and then of eight, without passages."""
    monkeypatch.setattr(PassageChooser, "before", lambda *_: np.empty(0, dtype=np.int64))

    def write(
        model: PreTrainedModel, memory: Memory, rather: int | None = None, **options: Any
    ) -> tuple[str, int]:
        tokens = TOKENIZER("abcdefghijklmnopq", add_special_tokens=False)["input_ids"]
        written = generate(
            model, TOKENIZER, memory, "text", method="in-context", settings=PASSAGES,
            do_sample=False, logits_processor=[Dictates(5, tokens, rather)],
            **{"max_new_tokens": 17, **options},
        )  # fmt: skip
        return written.text, len(written.tokens)

    return write


@pytest.mark.parametrize("least", [{"min_new_tokens": 6}, {"min_length": 11}], ids=str)
def test_the_least_number_of_tokens_is_of_the_text_not_of_each_piece(
    model: PreTrainedModel,
    memory: Memory,
    dictated: Callable[..., tuple[str, int]],
    least: dict[str, int],
) -> None:
    assert dictated(model, memory, rather=1, **least) == ("abcdef", 7)
    assert dictated(model, memory, rather=1) == ("", 1)
    assert dictated(model, memory, max_new_tokens=None, max_length=14) == ("abcdefghi", 9)


@pytest.mark.parametrize("stop", ["cd", "de", "h", "ijkl"])  # pieces end with d, and with l
def test_a_stop_string_ends_the_text_wherever_a_piece_does(
    model: PreTrainedModel, memory: Memory, dictated: Callable[..., tuple[str, int]], stop: str
) -> None:
    text = "abcdefghijklmnopq"
    text = text[: text.index(stop) + len(stop)]
    assert dictated(model, memory, stop_strings=[stop]) == (text, len(text))


def test_an_end_whose_number_is_0_ends_the_text_at_the_end_of_a_piece(
    model: PreTrainedModel, memory: Memory, dictated: Callable[..., tuple[str, int]]
) -> None:
    assert dictated(model, memory, rather=0, min_new_tokens=3, eos_token_id=0) == ("abc", 4)


def test_a_chat_leaves_room_for_passages(model: PreTrainedModel, memory: Memory) -> None:
    """The oldest exchanges are left out whole, and passages are cut but once."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cut: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        made = Passages.__init__
        patched.setattr(Passages, "__init__", lambda *a: (cut.append(a[2]), made(*a))[1])
        settings = {**PASSAGES, "passage_tokens": 11}
        talk = Chat(model, tokenizer, memory, "in-context", settings=settings, **options)
        for _ in range(3):  # with two passages, what was said before has no room
            assert talk.say(TEXT[0].text[:20]).text == talk.answer
            first = talk.answer
            assert talk.say(TEXT[0].text[20:50]).text == talk.answer
            last = talk.answer
            talk.begin_anew()
            assert talk.say(TEXT[0].text[20:50]).text == last
            talk.begin_anew()
        assert first
        assert len(talk.say(TEXT[0].text[:56]).tokens) == 4  # passages leave out what does not fit
    assert cut == [11]


def test_a_memory_without_weight_writes_as_passages_alone_do(
    model: PreTrainedModel, memory: Memory
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = TEXT[0].text[:12]
    looked_up = {**PASSAGES, "lam": 0.999, "temperature": 1e-3, "k": 4}
    written = generate(
        model, TOKENIZER, memory, prompt, method="in-context+knn", settings=looked_up,
        weights=[0.0], **options,
    )  # fmt: skip
    assert written.text == greedy(model, memory, prompt, 12)
    assert {token.memory_weight for token in written.tokens} == {0.0}


def test_passages_of_another_tokenizer_are_refused(model: PreTrainedModel, memory: Memory) -> None:
    other = make_tokenizer()
    other.add_tokens(["court"])
    options: dict[str, Any] = {"method": "in-context", "settings": PASSAGES, "max_new_tokens": 2}
    with pytest.raises(ModelError, match="tokenizer differs"):
        generate(model, other, memory, "the", **options)
    assert len(generate(model, other, memory, "the", force=True, **options).tokens) <= 2


def test_a_memory_is_looked_up_beside_the_passages(model: PreTrainedModel, memory: Memory) -> None:
    """With λ near 1 the nearest entries decide, found by what is read with passages."""
    options = {**PASSAGES, "lam": 0.999, "temperature": 1e-3, "k": 4}
    written = generate(
        model, TOKENIZER, memory, TEXT[0].text[:12], method="in-context+knn", settings=options,
        max_new_tokens=12, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert len(written.tokens) == 12
    assert all(token.memory_weight > 0.99 for token in written.tokens)
    assert all(token.sources for token in written.tokens)


def test_settings_are_found_with_passages_and_stored(
    model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    memory = build_memory(model, make_documents(12, 30))
    options = {"window": 32, "stride": 16, "tokenizer": TOKENIZER}
    tuned = tune(model, memory, TEXT, method="in-context+knn", **PASSAGES, **options)
    settings = resolve_settings("in-context+knn", memory)
    assert (settings.passages, settings.passage_tokens) == (2, 12)
    assert settings.lam == tuned.settings.lam
    read = read_with_passages(model, memory, TEXT, settings=settings, **options)
    for text in (TEXT, read):  # what was read for several is what each would read
        scored = evaluate(model, memory, text, "in-context+knn", **options)
        assert scored.nll == pytest.approx(tuned.nll, rel=1e-5)
    plain = tune(model, memory, TEXT, method="knn", **options)
    assert plain.base_nll != pytest.approx(tuned.base_nll, rel=1e-5)  # the model read other text
    assert memory.settings("knn") != memory.settings("in-context+knn")


def test_what_a_method_has(memory: Memory) -> None:
    assert method_named("in-context").settings == tuple(PASSAGES)
    assert set(PASSAGES) < set(method_named("in-context+hybrid").settings)
    assert not set(PASSAGES) & set(method_named("hybrid").settings)


def test_refusals(model: PreTrainedModel, memory: Memory, tiny_memory: Memory) -> None:
    def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(NearestError) as error:
            call(*arguments, **options)
        return str(error.value)

    text = {"tokenizer": TOKENIZER}
    for name in PASSAGES:
        assert f"{name} must be at least 1" in refused(Settings, **{name: 0})
        assert "whole number" in refused(Settings, **{name: 1.5})
        assert "no setting of" in refused(evaluate, model, memory, TEXT, "knn", **{name: 1}, **text)
    assert "exceed the model's 64 positions" in refused(
        evaluate, model, memory, TEXT, "in-context", **text
    )
    assert "one memory" in refused(
        evaluate, model, [memory, memory], TEXT, "in-context", **PASSAGES, **text
    )
    read = read_text(model, memory, TEXT, **text)
    assert "read already" in refused(evaluate, model, memory, read, "in-context", **PASSAGES)
    again = read_with_passages(model, memory, TEXT, settings=Settings(**PASSAGES), **text)
    assert "is to be read without passages" in refused(evaluate, model, memory, again, "knn")
    assert "nothing that tuning finds" in refused(
        tune, model, memory, TEXT, method="in-context", **text
    )
    assert "nearest tune" in refused(
        evaluate, model, memory, TEXT, "in-context+hybrid", **PASSAGES, **text
    )
    assert "--method in-context+hybrid --text" in refused(
        evaluate, model, memory, TEXT, "in-context+hybrid", **PASSAGES, **text
    )
    assert "exceed the model's 64 positions" in refused(
        sweep, model, memory, TEXT, ["in-context"], **text
    )
    assert "'lam' is no setting of in-context" in refused(
        sweep, model, memory, TEXT, ["in-context"], lam=0.5, **text
    )
    assert "unknown" in refused(
        tune_weights, model, [memory, memory], TEXT, "in-context+knn", **text
    )
    writing = {"method": "in-context", "settings": PASSAGES}
    assert "num_beams asks for more" in refused(
        generate, model, TOKENIZER, memory, "the", num_beams=2, **writing
    )
    assert "64 positions" in refused(
        generate, model, TOKENIZER, memory, TEXT[0].text[:40], max_new_tokens=24, **writing
    )
    for name, value in {
        "forced_eos_token_id": 1,
        "exponential_decay_length_penalty": (2, 1.5),
        "begin_suppress_tokens": [1],
        "max_time": 5.0,
        "stopping_criteria": [lambda *_: torch.tensor([False])],
    }.items():
        assert f"{name} would be of each" in refused(
            generate, model, TOKENIZER, memory, "the", **{name: value}, **writing
        )
    with pytest.raises(SettingError, match="one memory"):
        generate(model, TOKENIZER, [memory, memory], "the", **writing)
