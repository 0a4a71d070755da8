"""Methods that look at the tokens before: generation against an oracle that forgets everything.

Each expected distribution is computed from the whole prefix anew, without cache or state.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from automaton_oracle import Corpus, Oracle, Prediction, states_of
from conftest import (
    documents_apart,
    gates_trained_at_once,
    make_documents,
    make_model,
    make_tokenizer,
)
from gate_oracle import GateOracle
from nearest import Memory, attach, evaluate, tune
from nearest.build.cluster import KMeans, cluster_memory
from nearest.errors import ModelError, SettingError
from nearest.models.attach import Session
from nearest.models.prefixes import Prefixes
from nearest.retrieval.settings import method_named

NEW = 10
WEIGHING = {"lam": 0.7, "temperature": 60.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "retomaton": ("retomaton", {**WEIGHING, "k": 12, "min_knns": 2, "max_knns": 40}),
    "retomaton that measures matches": (
        "retomaton",
        {**WEIGHING, "k": 12, "min_knns": float("inf"), "dedup": True, "length_power": 2.0},
    ),
    "suffix": ("suffix", {**WEIGHING, "suffix_k": 20, "length_power": 3.0}),
    "knn that measures matches": ("knn", {**WEIGHING, "k": 12, "length_power": 2.0}),
    "hybrid": ("hybrid", {"k": 12, "max_knns": 40, "suffix_k": 20, "skip": 0.4, "guard": True}),
    "adaptret": ("knn+adaptret", {"k": 12, "skip": 0.0}),
}
DOCUMENTS = documents_apart(9, 20, seed=3)
TUNING = make_documents(8, 20, seed=4)
TOKENIZER = make_tokenizer()


@dataclass(frozen=True)
class World:
    """A model to attach to, an untouched copy for the oracle, and a memory of it with clusters."""

    model: PreTrainedModel
    copy: PreTrainedModel
    layer: str
    memory: Memory
    corpus: Corpus
    method: str
    given: dict[str, Any]

    def attached(self, **options: Any) -> Session:
        return attach(self.model, self.memory, self.method, **self.given, **options)

    def predictions(self, tokens: Tensor, first: int) -> list[Prediction]:
        """Of every position from `first` on, where the state is empty."""
        sequence = tokens.tolist()
        oracle: Oracle | GateOracle
        if method_named(self.method).gate is None:
            oracle = Oracle(self.corpus, self.method, **self.given)
        else:
            oracle = GateOracle(self.memory, self.method, self.given)
        return oracle.predict(*states_of(self.copy, sequence, self.layer), sequence, first)


LAYERS = {"gpt2": "last_ffn_input", "llama": "last_hidden"}
# Every method with one model; with the other, whose key layer cuts its states, those of most state.
WORLDS = [*(("gpt2", method) for method in METHODS), ("llama", "retomaton"), ("llama", "hybrid")]
Made = Callable[[str], tuple[PreTrainedModel, PreTrainedModel, str, Memory]]


@pytest.fixture(scope="module")
def made(build_memory: Callable[..., Memory]) -> Made:
    """A model, an untouched copy, its key layer, and a memory with clusters and gates, by kind."""

    @functools.cache
    def make(kind: str) -> tuple[PreTrainedModel, PreTrainedModel, str, Memory]:
        model = make_model(kind)
        memory = build_memory(model, DOCUMENTS, key_layer=LAYERS[kind])
        cluster_memory(memory.path, KMeans(80))
        for method, given in (METHODS[name] for of, name in WORLDS if of == kind):
            if method_named(method).gate is not None:
                opened = Memory.open(memory.path)
                with gates_trained_at_once():
                    tune(model, opened, TUNING, method=method, tokenizer=TOKENIZER, **given)
        return model, make_model(kind), LAYERS[kind], Memory.open(memory.path)

    return make


def world_of(made: Made, kind: str, name: str) -> World:
    return World(*made(kind), Corpus(made(kind)[-1]), *METHODS[name])


@pytest.fixture(params=WORLDS, ids="-".join)
def world(request: pytest.FixtureRequest, made: Made) -> World:
    return world_of(made, *request.param)


STATES: list[tuple[tuple[str, str], int | str]] = [  # a replay is of no use without state
    (("gpt2", "retomaton"), 0),
    (("llama", "retomaton"), 3),
    (("gpt2", "retomaton"), "full"),
    (("gpt2", "retomaton that measures matches"), "full"),
    (("gpt2", "suffix"), "full"),
    (("gpt2", "hybrid"), 3),
    (("llama", "hybrid"), "full"),
    (("gpt2", "adaptret"), "full"),
]
REPLAYED = {"0": 0, "3": 3, "full": 1000}
with_replays = pytest.mark.parametrize(("world", "replay"), STATES, indirect=["world"])


@pytest.fixture
def follower(made: Made) -> World:
    """The method with the most to remember."""
    return world_of(made, "llama", "retomaton")


def prompt_of(memory: Memory, document: int, start: int, length: int) -> Tensor:
    """Text of the memory, as tokens, without the start of its document."""
    return torch.from_numpy(memory.document_tokens(document)[start : start + length].astype(int))


def generate(world: World, prompt: Tensor, **options: Any) -> Any:
    return world.model.generate(
        **{
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 1,
            "eos_token_id": None,
            "return_dict_in_generate": True,
            "output_scores": True,
            **options,
        }
    )


SAMPLING = {"do_sample": True, "top_k": 0, "temperature": 1.0}


def check(
    world: World,
    sequence: Tensor,
    prompt: int,
    scores: Any,
    *,
    row: int = 0,
    replayed: int = 0,
) -> None:
    """Every step's distribution is the oracle's for the prefix."""
    told = world.predictions(sequence[:-1], max(0, prompt - 1 - replayed))[-len(scores) :]
    assert len(scores) == len(sequence) - prompt
    clear = [one.clear for one in told]
    assert sum(clear) > 0.7 * len(clear)
    assert any(one.weights for one in told)
    for one, found in zip(told, scores, strict=True):
        if one.clear:
            np.testing.assert_allclose(found[row].exp(), np.exp(one.log_probs), atol=2e-4)


OPTIONS: list[dict[str, Any]] = [
    SAMPLING,
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 4},
    {"prompt_lookup_num_tokens": 4},
]
# Every way of generating with three or more of the states, every state with two of the ways.
PAIRS = [(*state, OPTIONS[(n + m) % 5]) for n, state in enumerate(STATES) for m in (0, 2)]


@pytest.mark.parametrize(("world", "replay", "options"), PAIRS, indirect=["world"])
def test_every_step_equals_the_oracle(
    world: World, replay: int | str, options: dict[str, Any]
) -> None:
    prompt = prompt_of(world.memory, 2, 5, 11)[None]
    torch.manual_seed(1)
    with world.attached(replay=replay):
        output = generate(world, prompt, **options)
    if "do_sample" not in options:
        greedy = torch.stack([scores[0] for scores in output.scores]).argmax(-1)
        assert output.sequences[0, 11:].tolist() == greedy.tolist()
    check(world, output.sequences[0], 11, output.scores, replayed=REPLAYED[str(replay)])


def test_drafts_that_are_taken_back_leave_nothing(world: World) -> None:
    """The assistant drafts without the memory, so that most of its tokens are refused."""
    prompt = prompt_of(world.memory, 1, 3, 9)[None]
    with world.attached(replay=2):
        plain = generate(world, prompt).sequences
        assisted = generate(world, prompt, assistant_model=world.copy)
    assert torch.equal(assisted.sequences, plain)
    check(world, assisted.sequences[0], 9, assisted.scores, replayed=2)


def padded(rows: list[Tensor], pad: int = 1) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    batch = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        batch[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return batch, mask


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}], ids=str)
@with_replays
def test_rows_of_a_padded_batch_equal_the_oracle(
    world: World, options: dict[str, Any], replay: int | str
) -> None:
    rows = [
        prompt_of(world.memory, 0, 2, 12),
        prompt_of(world.memory, 3, 4, 1),
        prompt_of(world.memory, 4, 1, 6),
        prompt_of(world.memory, 4, 1, 6)[1:],  # the end of another row
    ]
    batch, mask = padded(rows)
    with world.attached(replay=replay):
        output = generate(world, batch, attention_mask=mask, **options)
    replayed = REPLAYED[str(replay)]
    for i, prompt in enumerate(rows):
        own = output.sequences[i, 12 - len(prompt) :]
        check(world, own, len(prompt), output.scores, row=i, replayed=replayed)


@with_replays
def test_beams_equal_their_sequences_scored_alone(world: World, replay: int | str) -> None:
    batch, mask = padded([prompt_of(world.memory, 0, 2, 9), prompt_of(world.memory, 5, 1, 5)])
    with world.attached(replay=replay):
        output = generate(world, batch, attention_mask=mask, num_beams=4, num_return_sequences=3)
    compared = 0
    for i, (sequence, score) in enumerate(
        zip(output.sequences, output.sequences_scores, strict=True)
    ):
        start, prompt = (0, 9) if i < 3 else (4, 5)
        tokens = sequence[start:]
        replayed = REPLAYED[str(replay)]
        told = world.predictions(tokens[:-1], max(0, prompt - 1 - replayed))[-NEW:]
        total = sum(one.log_probs[t] for one, t in zip(told, tokens[prompt:], strict=True))
        if all(one.clear for one in told):
            np.testing.assert_allclose(total / NEW, score, atol=3e-4)
            compared += 1
    assert compared >= 4


def test_full_replay_equals_evaluation(follower: World) -> None:
    """What generation predicts after a prompt is what `evaluate` scores there."""
    prompt = torch.cat([torch.tensor([0]), prompt_of(follower.memory, 2, 1, 14)])[None]
    torch.manual_seed(3)
    with follower.attached(replay="full"):
        output = generate(follower, prompt, **SAMPLING)
    new = output.sequences[0, 15:]
    found = -sum(float(s[0, t]) for s, t in zip(output.scores, new, strict=True))
    texts = [output.sequences[0].numpy(), prompt[0].numpy()]
    whole, before = evaluate(
        follower.model, follower.memory, texts, follower.method, **follower.given
    ).document_nll
    assert found == pytest.approx(whole - before, rel=1e-4)
    with follower.attached(replay=0):
        torch.manual_seed(3)
        other = generate(follower, prompt, **SAMPLING).scores[0]
    assert (other.exp() - output.scores[0].exp()).abs().max() > 1e-3


def test_a_plain_call_reads_the_whole_sequence(world: World) -> None:
    rows = [prompt_of(world.memory, 0, 0, 20), prompt_of(world.memory, 6, 3, 13)]
    batch, mask = padded(rows)
    right = torch.stack([rows[0], torch.cat([rows[1], torch.ones(7, dtype=torch.int64)])])
    with world.attached(), torch.no_grad():
        left = world.model(input_ids=batch, attention_mask=mask).logits
        unmasked = world.model(input_ids=right).logits  # padded on the right
    for i, tokens in enumerate(rows):
        told = world.predictions(tokens, 0)
        assert np.mean([one.clear for one in told]) > 0.7
        for j, one in enumerate(told):
            if one.clear:
                expected = np.exp(one.log_probs)
                np.testing.assert_allclose(unmasked[i, j].exp(), expected, atol=2e-4)
                if world.copy.config.model_type == "llama" or i == 0:  # positions need no help
                    at = 20 - len(tokens) + j
                    np.testing.assert_allclose(left[i, at].exp(), expected, atol=2e-4)


def test_logits_to_keep_begin_where_they_begin(world: World) -> None:
    """Of whatever is kept, the first position begins with no state; later ones go on from it."""
    tokens = prompt_of(world.memory, 0, 0, 20)
    some = torch.zeros((1, 20), dtype=torch.bool)
    some[0, [3, 9, 10]] = True
    with world.attached(), torch.no_grad():
        for keep, positions in (
            (6, range(14, 20)),
            (1, range(19, 20)),
            (torch.tensor([3, 9]), (3, 9)),
            (torch.tensor([9, 3]), (9, 3)),
            (torch.tensor([[3, 9]]), (3, 9)),
            (some, (3, 9, 10)),
        ):
            logits = world.model(input_ids=tokens[None], logits_to_keep=keep).logits
            logits = logits.reshape(-1, logits.shape[-1])
            first = min(positions)
            told = world.predictions(tokens, first)
            for found, position in zip(logits, positions, strict=True):
                if told[position - first].clear:
                    expected = np.exp(told[position - first].log_probs)
                    np.testing.assert_allclose(found.exp(), expected, atol=2e-4)


def test_kept_cells_of_padded_rows_come_in_the_order_that_was_asked_for(follower: World) -> None:
    """Though rows are looked up longest first."""
    world = follower
    ids = torch.stack([prompt_of(world.memory, number, 0, 4) for number in (0, 1)])
    mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cells = torch.zeros((2, 4), dtype=torch.bool)
    cells[0, 3] = cells[1, 2] = True
    with world.attached(), torch.no_grad():
        first = world.model(input_ids=ids[:1, 3:]).logits[0]
        second = world.model(input_ids=ids[1:, :3], logits_to_keep=1).logits[0]
        alone = torch.cat([first, second]).exp()
        for keep in (torch.tensor([[3], [2]]), cells):
            kept = world.model(input_ids=ids, logits_to_keep=keep, **padded).logits
            torch.testing.assert_close(kept.reshape(alone.shape).exp(), alone, atol=1e-4, rtol=0)


def test_gradients_flow_to_the_model(world: World) -> None:
    tokens = prompt_of(world.memory, 0, 0, 9)[None]
    with world.attached():
        world.model(input_ids=tokens, labels=tokens).loss.backward()
        gradient = next(iter(world.model.parameters())).grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    world.model.zero_grad()


def test_half_precision_is_mixed_in_float32(build_memory: Callable[..., Memory]) -> None:
    model = make_model("llama").bfloat16()
    memory = build_memory(model, DOCUMENTS)
    tokens = prompt_of(memory, 0, 0, 20)[None]
    with torch.no_grad():
        base = model(input_ids=tokens).logits
        for method in ("retomaton", "suffix"):
            with attach(model, memory, method, lam=0.3):
                mixed = model(input_ids=tokens).logits
            assert (base.dtype, mixed.dtype) == (torch.bfloat16, torch.float32)
            torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(1, 20))
            assert (mixed.exp() >= 0.699 * base.float().softmax(-1)).all()


# --- what cannot be followed ----------------------------------------------------------------------


def test_what_hides_the_tokens_is_refused(world: World) -> None:
    model, prompt = world.model, prompt_of(world.memory, 0, 2, 9)[None]
    embeddings = model.get_input_embeddings()(prompt).detach()
    with world.attached() as session, torch.no_grad():
        with session.disabled():
            cache = model(input_ids=prompt, use_cache=True).past_key_values
        refused: list[Callable[[], Any]] = [
            lambda: model(inputs_embeds=embeddings),
            lambda: model(input_ids=prompt[:, -1:], past_key_values=cache),
            lambda: model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones_like(prompt),
                pad_token_id=1,
                max_new_tokens=2,
            ),
        ]
        for call in refused:
            with pytest.raises(ModelError, match="looks at the tokens before a prediction"):
                call()
            output = generate(world, prompt)  # afterwards it works
            check(world, output.sequences[0], 9, output.scores)


def test_a_conversation_goes_on_from_its_cache(world: World) -> None:
    """generate() takes a cache with the whole sequence: the tokens are there."""
    prompt = prompt_of(world.memory, 0, 2, 9)[None]
    with world.attached() as session:
        cache = DynamicCache()
        with session.disabled(), torch.no_grad():
            world.model(input_ids=prompt[:, :6], past_key_values=cache)
        output = generate(world, prompt, past_key_values=cache)
    check(world, output.sequences[0], 9, output.scores)


@pytest.mark.parametrize("replay", [3, "full"])
def test_a_replay_of_what_a_cache_stands_for_is_refused(follower: World, replay: int | str) -> None:
    """Else less would be replayed than was asked for, and not a word said."""
    prompt = prompt_of(follower.memory, 0, 2, 9)[None]
    cache = DynamicCache()
    with follower.attached(replay=replay) as session:
        with session.disabled(), torch.no_grad():
            follower.model(input_ids=prompt[:, :6], past_key_values=cache)
        with pytest.raises(ModelError, match="replay fewer positions"):
            generate(follower, prompt, past_key_values=cache)
        with pytest.raises(ModelError, match="give the whole sequence as input_ids"):
            generate(
                follower,
                prompt[:, 6:],
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
            )
        output = generate(follower, prompt)
        check(follower, output.sequences[0], 9, output.scores, replayed=REPLAYED[str(replay)])
    with follower.attached(replay=2):  # as far as the cache does not reach
        output = generate(follower, prompt, past_key_values=cache)
    check(follower, output.sequences[0], 9, output.scores, replayed=2)


@pytest.mark.parametrize("whole", [False, True], ids=["new tokens", "in pieces"])
def test_what_a_cache_hides_is_refused(world: World, whole: bool) -> None:
    """Else the tokens that it stands for would be missing, and not a word said."""
    prompt = prompt_of(world.memory, 0, 2, 9)[None]
    cache = DynamicCache()
    given: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "past_key_values": cache}
    if whole:
        given["prefill_chunk_size"] = 2
    with world.attached() as session:
        with session.disabled(), torch.no_grad():
            world.model(input_ids=prompt[:, :3], past_key_values=cache)
        with pytest.raises(ModelError, match="give the whole sequence as input_ids"):
            generate(world, prompt if whole else prompt[:, 3:], **given)
        output = generate(world, prompt)
    check(world, output.sequences[0], 9, output.scores)


@pytest.mark.parametrize("replay", [-1, "all", "3", ""])
def test_replay_that_means_nothing(follower: World, replay: int | str) -> None:
    with pytest.raises(SettingError, match="replay must be a number of positions"):
        follower.attached(replay=replay)
    assert "forward" not in vars(follower.model)


class _Fails(LogitsProcessor):
    """Raises at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step -= 1
        if not self.step:
            raise RuntimeError("in the middle")
        return scores


def test_an_error_in_the_middle_leaves_the_session_usable(world: World) -> None:
    prompt = prompt_of(world.memory, 0, 2, 9)[None]
    tokens = prompt_of(world.memory, 3, 0, 12)[None]
    with world.attached(), torch.no_grad():
        expected = generate(world, prompt).scores
        plain = world.model(input_ids=tokens).logits
        with pytest.raises(RuntimeError, match="in the middle"):
            generate(world, prompt, logits_processor=LogitsProcessorList([_Fails(4)]))
        torch.testing.assert_close(world.model(input_ids=tokens).logits, plain)
        for one, other in zip(generate(world, prompt).scores, expected, strict=True):
            torch.testing.assert_close(one, other)


class _CallsTheModel(LogitsProcessor):
    """Reads another sequence between the steps, as guidance does."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.model(input_ids=self.tokens)
        return scores


def test_calls_between_the_steps_do_not_lose_the_state(follower: World) -> None:
    prompt = prompt_of(follower.memory, 0, 2, 9)[None]
    other = prompt_of(follower.memory, 3, 0, 12)[None]
    between = LogitsProcessorList([_CallsTheModel(follower.model, other)])
    with follower.attached():
        output = generate(follower, prompt, logits_processor=between)
    check(follower, output.sequences[0], 9, output.scores)


def test_two_threads_keep_their_states_apart(follower: World) -> None:
    """One generates while the other reads, with the memory and without."""
    prompt = prompt_of(follower.memory, 0, 2, 9)[None]
    tokens = prompt_of(follower.memory, 3, 0, 30)[None]
    found: list[tuple[Tensor, Tensor]] = []
    with follower.attached() as session, torch.no_grad():
        expected = generate(follower, prompt).scores
        mixed = follower.model(input_ids=tokens).logits
        with session.disabled():
            base = follower.model(input_ids=tokens).logits
        running = True

        def read() -> None:
            with torch.no_grad():
                while running:
                    one = follower.model(input_ids=tokens).logits
                    with session.disabled():
                        found.append((one, follower.model(input_ids=tokens).logits))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for _ in range(4):
                scores = generate(follower, prompt).scores
                for one, other in zip(scores, expected, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
                session.sources(0)
        finally:
            running = False
            thread.join()
    assert found
    for one, other in found:
        torch.testing.assert_close(one, mixed, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other, base, atol=1e-4, rtol=1e-4)


# --- sources, and what is kept --------------------------------------------------------------------


@with_replays
def test_sources_are_what_was_mixed(world: World, replay: int | str) -> None:
    batch, mask = padded([prompt_of(world.memory, 0, 2, 9), prompt_of(world.memory, 5, 1, 5)])
    with world.attached(replay=replay) as session:
        output = generate(world, batch, attention_mask=mask)
        named = [session.sources(0), session.sources(1)]
    replayed = REPLAYED[str(replay)]
    carried = 0
    for row, (start, prompt) in enumerate([(0, 9), (4, 5)]):
        sequence = output.sequences[row, start:]
        told = world.predictions(sequence[:-1], max(0, prompt - 1 - replayed))[-NEW:]
        for one, token, sources in zip(told, sequence[prompt:], named[row], strict=True):
            assert sources.token == token
            totals: dict[int, float] = {}
            for entry, weight in one.weights:
                if world.corpus.value[entry] == token:
                    totals[entry] = totals.get(entry, 0.0) + weight
            if not one.clear:
                continue
            share = sum(totals.values()) / np.exp(one.log_probs[token])
            assert sources.memory_weight == pytest.approx(share, abs=2e-4)
            if sources.memory_weight < 1e-6:
                continue
            carried += 1
            weights = {source.entry: source.weight for source in sources.sources}
            assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
            for entry, weight in totals.items():
                expected = weight / sum(totals.values())
                assert weights.get(entry, 0.0) == pytest.approx(expected, abs=2e-4)
            for source in sources.sources:
                stored = world.memory.document_tokens(source.document)
                assert stored[source.position + 1] == token
    assert carried >= NEW // 2


def test_disabled_generation_is_the_base_models(world: World) -> None:
    prompt = prompt_of(world.memory, 0, 2, 9)[None]
    alone = generate(world, prompt)
    with world.attached() as session:
        with session.disabled():
            disabled = generate(world, prompt)
        output = generate(world, prompt)
    assert torch.equal(disabled.sequences, alone.sequences)
    check(world, output.sequences[0], 9, output.scores)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Prefixes]]:
    """All that was made to follow prefixes."""
    made: list[Prefixes] = []
    original = Prefixes.__init__

    def remember(self: Prefixes, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(Prefixes, "__init__", remember)
    return made


def test_only_the_last_pass_is_kept_and_nothing_afterwards(
    follower: World, kept: list[Prefixes]
) -> None:
    import gc
    import weakref

    prompt = prompt_of(follower.memory, 0, 2, 9)[None]
    sizes = []

    class Counts(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            sizes.append(len(kept[-1]._reached))
            return scores

    with follower.attached(replay="full"):
        generate(follower, prompt, num_beams=3, logits_processor=LogitsProcessorList([Counts()]))
        assert sizes == [3] * NEW  # of the replayed prompt only what the next step goes on from
        assert len(kept) == 1
        gone = weakref.ref(kept.pop())
        gc.collect()
        assert gone() is None  # though the session lives
