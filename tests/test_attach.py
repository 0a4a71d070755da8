"""Generation with a memory attached, against a cache-free oracle."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from conftest import make_model, random_documents
from nearest import Memory, NearestError, attach
from nearest.errors import ModelError, SettingError
from oracle import keys_and_logits, knn_lm_log_probs

NEW = 12
SETTINGS = {"lam": 0.6, "temperature": 40.0, "k": 8}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def world(request: pytest.FixtureRequest, build_memory: Callable[..., Memory]) -> SimpleNamespace:
    """A model to attach to, an untouched copy for the oracle, and a memory of it."""
    model = make_model(request.param)
    memory = build_memory(model, random_documents())
    return SimpleNamespace(model=model, oracle=make_model(request.param), memory=memory)


def generate(world: SimpleNamespace, prompt: Tensor, **options: Any) -> Any:
    return world.model.generate(
        **{
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 1,
            "eos_token_id": None,
            "no_repeat_ngram_size": 1,  # else a random model repeats one token
            "return_dict_in_generate": True,
            "output_scores": True,
            **options,
        }
    )


def oracle_log_probs(world: SimpleNamespace, tokens: Tensor, **settings: Any) -> np.ndarray:
    """[length, vocab] of a whole sequence."""
    keys, logits = keys_and_logits(world.oracle, tokens, world.memory.manifest.keys.layer)
    return knn_lm_log_probs(world.memory, keys, logits, **{**SETTINGS, **settings})


def check_greedy(
    world: SimpleNamespace, sequence: Tensor, prompt: int, scores: list[Tensor] | None = None
) -> None:
    """Every new token is the oracle's most probable that is not banned for standing before.

    The scores are its distribution but for the banned: those must not come back to life.
    """
    log_probs = oracle_log_probs(world, sequence)
    for step, position in enumerate(range(prompt - 1, len(sequence) - 1)):
        expected = log_probs[position].copy()
        expected[sequence[: position + 1]] = -np.inf
        assert expected[sequence[position + 1]] > expected.max() - 1e-4
        if scores is not None:
            np.testing.assert_allclose(scores[step].exp(), np.exp(expected), atol=1e-4)


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 258, (rows, length), generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_greedy_equals_the_oracle(world: SimpleNamespace, options: dict[str, Any]) -> None:
    prompt = prompts(1, 7)
    alone = generate(world, prompt).sequences
    with attach(world.model, world.memory, **SETTINGS):
        output = generate(world, prompt, **options)
    assert not torch.equal(output.sequences, alone)  # else the memory was not there
    check_greedy(world, output.sequences[0], 7, [scores[0] for scores in output.scores])


def test_assisted_decoding_equals_the_oracle(world: SimpleNamespace) -> None:
    prompt = prompts(1, 7)
    assistant = make_model(world.model.config.model_type)  # drafts without the memory: many fail
    with attach(world.model, world.memory, **SETTINGS):
        plain = generate(world, prompt).sequences
        assisted = generate(world, prompt, assistant_model=assistant).sequences
    assert torch.equal(assisted, plain)
    check_greedy(world, assisted[0], prompt=7)


def test_sampling_draws_from_the_oracle_distribution(world: SimpleNamespace) -> None:
    prompt = prompts(1, 7)
    torch.manual_seed(0)
    with attach(world.model, world.memory, **SETTINGS):
        output = generate(world, prompt, do_sample=True, top_k=0, temperature=1.0)
    log_probs = oracle_log_probs(world, output.sequences[0])
    for step, scores in enumerate(output.scores):
        allowed = scores[0].isfinite()
        assert allowed.sum() > 200
        expected = np.exp(log_probs[6 + step])[allowed]
        np.testing.assert_allclose(scores[0][allowed].exp(), expected, atol=1e-4)


def test_beam_scores_equal_the_oracle(world: SimpleNamespace) -> None:
    prompt = prompts(2, 7)
    with attach(world.model, world.memory, **SETTINGS):
        output = generate(world, prompt, num_beams=4, num_return_sequences=2)
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        log_probs = oracle_log_probs(world, sequence)
        total = sum(log_probs[t, sequence[t + 1]] for t in range(6, len(sequence) - 1))
        np.testing.assert_allclose(total / NEW, score, atol=1e-4)


def test_left_padded_rows_equal_rows_alone(world: SimpleNamespace) -> None:
    long, short = prompts(1, 7), prompts(1, 4, seed=2)
    padding = torch.full((1, 3), 1)
    batch = torch.cat([long, torch.cat([padding, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    with attach(world.model, world.memory, **SETTINGS):
        found = generate(world, batch, attention_mask=mask).sequences
    check_greedy(world, found[0], prompt=7)
    check_greedy(world, found[1, 3:], prompt=4)


@pytest.mark.parametrize("layer", ["last_ffn_input", "last_hidden"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_plain_call_mixes_every_position(
    world: SimpleNamespace, build_memory: Callable[..., Memory], layer: str, metric: str
) -> None:
    memory = build_memory(world.model, random_documents(), key_layer=layer, metric=metric)
    tokens = prompts(1, 20)
    with attach(world.model, memory, **SETTINGS):
        found = world.model(input_ids=tokens).logits[0]
        kept = world.model(input_ids=tokens, logits_to_keep=torch.tensor([3, 9])).logits[0]
        as_tuple = world.model(input_ids=tokens, return_dict=False)[0][0]
    keys, logits = keys_and_logits(world.oracle, tokens[0], layer)
    expected = knn_lm_log_probs(memory, keys, logits, **SETTINGS, metric=metric)
    clear = ~np.isnan(expected).any(1)
    assert clear.sum() >= 15
    np.testing.assert_allclose(found.detach().exp()[clear], np.exp(expected)[clear], atol=1e-5)
    torch.testing.assert_close(kept, found[[3, 9]])
    torch.testing.assert_close(as_tuple, found)


@pytest.mark.parametrize("layer", ["last_ffn_input", "last_hidden"])
def test_some_cells_of_several_rows_are_those_of_the_whole_call(
    world: SimpleNamespace, build_memory: Callable[..., Memory], layer: str
) -> None:
    memory = build_memory(world.model, random_documents(), key_layer=layer)
    tokens = prompts(2, 9)
    cells = torch.zeros(tokens.shape, dtype=torch.bool)
    cells[0, 3] = cells[1, 2] = cells[1, 8] = True
    with attach(world.model, memory, **SETTINGS):
        whole = world.model(input_ids=tokens).logits
        kept = world.model(input_ids=tokens, logits_to_keep=cells).logits
    torch.testing.assert_close(kept.reshape(3, -1), whole[cells])


def test_the_loss_is_of_the_mixture(world: SimpleNamespace) -> None:
    tokens = prompts(2, 20)
    with attach(world.model, world.memory, **SETTINGS):
        output = world.model(input_ids=tokens, labels=tokens)
    expected = -output.logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(output.loss, expected)


def test_lambda_zero_is_the_base_model_and_one_the_memory_alone(world: SimpleNamespace) -> None:
    tokens = prompts(1, 9)
    base = world.model(input_ids=tokens).logits.log_softmax(-1)
    with attach(world.model, world.memory, **{**SETTINGS, "lam": 0.0}):
        torch.testing.assert_close(world.model(input_ids=tokens).logits, base)
    with attach(world.model, world.memory, **{**SETTINGS, "lam": 1.0, "k": 1}):
        alone = world.model(input_ids=tokens).logits.exp()
    assert ((alone == 1).sum(-1) == 1).all()


def test_detaching_restores_the_model_exactly(world: SimpleNamespace) -> None:
    model, tokens = world.model, prompts(1, 9)
    before = dict(vars(model))
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    expected = model(input_ids=tokens).logits
    session = attach(model, world.memory, **SETTINGS)
    with pytest.raises(RuntimeError, match="in the middle"), session:
        fail_after_generating(model, tokens)
    session.detach()
    assert vars(model) == before
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(input_ids=tokens).logits, expected)


def fail_after_generating(model: PreTrainedModel, tokens: Tensor) -> None:
    model.generate(tokens, max_new_tokens=2, pad_token_id=1)
    raise RuntimeError("in the middle")


def test_a_forward_set_on_the_instance_is_given_back(world: SimpleNamespace) -> None:
    model = world.model
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)  # as accelerate does
    mine = model.forward
    try:
        with attach(model, world.memory, **SETTINGS):
            assert model.forward is not mine
        assert model.forward is mine
    finally:
        del model.forward


def test_disabled_is_the_base_model(world: SimpleNamespace) -> None:
    tokens = prompts(1, 9)
    expected = world.model(input_ids=tokens).logits
    with attach(world.model, world.memory, **SETTINGS) as session:
        with session.disabled():
            assert torch.equal(world.model(input_ids=tokens).logits, expected)
        assert not torch.equal(world.model(input_ids=tokens).logits, expected)


def test_only_one_memory_at_a_time(world: SimpleNamespace) -> None:
    with (
        attach(world.model, world.memory),
        pytest.raises(SettingError, match="attached already"),
    ):
        attach(world.model, world.memory)


def test_forward_passes_of_two_threads_keep_their_keys_apart(world: SimpleNamespace) -> None:
    batches = [prompts(1, 9, seed) for seed in range(8)]
    found: dict[int, Tensor] = {}
    with attach(world.model, world.memory, **SETTINGS), torch.no_grad():
        expected = [world.model(input_ids=batch).logits for batch in batches]

        def run(i: int) -> None:
            for _ in range(5):
                found[i] = world.model(input_ids=batches[i]).logits

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(8):
        torch.testing.assert_close(found[i], expected[i])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_sources_are_the_entries_that_spoke(
    world: SimpleNamespace, options: dict[str, Any]
) -> None:
    """Weights against the oracle; the stored token after each entry is the one generated."""
    batch = torch.cat([prompts(1, 6), prompts(1, 6, seed=1)])
    mask = torch.ones_like(batch)
    batch[1, :2], mask[1, :2] = 1, 0
    with attach(world.model, world.memory, **SETTINGS) as session:
        sequences = generate(world, batch, attention_mask=mask, **options).sequences
        for row, sequence in enumerate(sequences):
            start = 2 if row >= len(sequences) // 2 else 0
            check_sources(world, session.sources(row), sequence[start:], 6 - start)
        with pytest.raises(IndexError):
            session.sources(len(sequences))


def check_sources(world: SimpleNamespace, named: list[Any], sequence: Tensor, prompt: int) -> None:
    keys, logits = keys_and_logits(world.oracle, sequence)
    mixed = np.exp(knn_lm_log_probs(world.memory, keys, logits, **SETTINGS))
    lm = torch.softmax(logits.double(), -1).numpy()
    assert [source.token for source in named] == sequence[prompt:].tolist()
    assert any(token.sources for token in named)
    for position, token in enumerate(named, start=prompt - 1):
        probability = mixed[position, token.token]
        expected = 1 - (1 - SETTINGS["lam"]) * lm[position, token.token] / probability
        np.testing.assert_allclose(token.memory_weight, expected, atol=1e-4)
        if token.memory_weight > 1e-6:
            np.testing.assert_allclose(sum(s.weight for s in token.sources), 1, atol=1e-5)
        for source in token.sources:
            stored = world.memory.document_tokens(source.document)
            assert stored[source.position + 1] == token.token
            assert world.memory.document(source.document).id == source.document_id


def test_sources_end_with_the_row(world: SimpleNamespace) -> None:
    """Padding after a row's end of text is no token of it."""
    prompt = prompts(1, 6)
    with attach(world.model, world.memory, **SETTINGS) as session:
        plain = generate(world, prompt).sequences[0, 6:].tolist()
        stop = plain[2]
        batch = torch.cat([prompt, prompts(1, 6, seed=1)])
        generate(world, batch, eos_token_id=stop)
        expected = plain[: plain.index(stop) + 1]
        assert [source.token for source in session.sources(0)] == expected


@pytest.mark.parametrize(
    "how", ["argument", "tensor", "configuration", "positional configuration", "stop string"]
)
def test_padding_is_never_a_source_token(world: SimpleNamespace, how: str) -> None:
    """However the end of a row was asked for, what pads it afterwards was not generated."""
    prompt = prompts(1, 6)
    batch = torch.cat([prompt, prompts(1, 6, seed=1)])
    with attach(world.model, world.memory, **SETTINGS) as session:
        plain = generate(world, batch).sequences[:, 6:].tolist()
        stop = next(token for token in plain[0][2:] if token not in plain[1])
        expected = plain[0][: plain[0].index(stop) + 1]
        config = GenerationConfig(
            eos_token_id=stop,
            pad_token_id=3,
            max_new_tokens=NEW,
            do_sample=False,
            no_repeat_ngram_size=1,
        )
        mask = torch.ones_like(batch)
        if how == "configuration":
            world.model.generate(batch, attention_mask=mask, generation_config=config)
        elif how == "positional configuration":
            world.model.generate(batch, config, attention_mask=mask)
        elif how == "stop string":
            ends = StoppingCriteriaList([_EndsRow(0, 6 + len(expected))])
            generate(world, batch, pad_token_id=3, eos_token_id=257, stopping_criteria=ends)
        else:
            ids = torch.tensor([stop]) if how == "tensor" else stop
            generate(world, batch, pad_token_id=3, eos_token_id=ids)
        assert [source.token for source in session.sources(0)] == expected
        assert [source.token for source in session.sources(1)] == plain[1]


class _EndsRow(StoppingCriteria):
    """Ends one row at a length, as a stop string may."""

    def __init__(self, row: int, length: int) -> None:
        self.row, self.length = row, length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[self.row] = input_ids.shape[1] >= self.length
        return done


def test_left_padding_without_a_mask_is_inferred_as_generate_does(world: SimpleNamespace) -> None:
    short = prompts(1, 4, seed=1)
    padded = torch.cat([torch.full((1, 3), 3), short], 1)
    with attach(world.model, world.memory, **SETTINGS) as session:
        generate(world, short)
        expected = session.sources(0)
        world.model.generate(
            padded,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=3,
            eos_token_id=257,
            no_repeat_ngram_size=1,
        )
        found = session.sources(0)
    for one, other in zip(found, expected, strict=True):
        assert one.token == other.token
        assert one.memory_weight == pytest.approx(other.memory_weight, abs=1e-4)


def test_disabled_may_be_nested_and_is_of_one_thread(world: SimpleNamespace) -> None:
    tokens = prompts(1, 9)
    base = world.model(input_ids=tokens).logits
    elsewhere: list[Tensor] = []
    with attach(world.model, world.memory, **SETTINGS) as session:
        generate(world, tokens)
        mixed = world.model(input_ids=tokens).logits
        with session.disabled():
            session.sources(0)  # which is disabled inside itself
            assert torch.equal(world.model(input_ids=tokens).logits, base)
            thread = threading.Thread(
                target=lambda: elsewhere.append(world.model(input_ids=tokens).logits)
            )
            thread.start()
            thread.join()
    torch.testing.assert_close(elsewhere[0], mixed)


def test_the_loss_heeds_the_models_own_arguments(world: SimpleNamespace) -> None:
    tokens = prompts(2, 20)
    with attach(world.model, world.memory, **SETTINGS):
        mean = world.model(input_ids=tokens, labels=tokens).loss
        summed = world.model(input_ids=tokens, labels=tokens, num_items_in_batch=100).loss
    torch.testing.assert_close(summed, mean * 38 / 100)


def test_sources_before_generating_says_so(world: SimpleNamespace) -> None:
    with (
        attach(world.model, world.memory) as session,
        pytest.raises(NearestError, match=r"model\.generate"),
    ):
        session.sources()


def test_sources_after_a_cache_that_hides_tokens_says_so(world: SimpleNamespace) -> None:
    ids, cache = torch.arange(5, 15)[None], DynamicCache()
    with attach(world.model, world.memory, **SETTINGS) as session:
        repeating = {"no_repeat_ngram_size": 0}
        whole = generate(world, ids, **repeating)
        assert len(session.sources()) == NEW
        with torch.no_grad():
            world.model(ids[:, :6], past_key_values=cache)
        given = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, **repeating}
        rest = generate(world, ids[:, 6:], **given)
        torch.testing.assert_close(rest.scores[0], whole.scores[0], atol=1e-4, rtol=0)
        with pytest.raises(NearestError, match="what a cache stands for"):
            session.sources()


def test_another_model_is_refused_unless_forced(world: SimpleNamespace) -> None:
    other = make_model(world.model.config.model_type)
    with torch.no_grad():
        # (a constant added to all embeddings would not change what the model computes)
        embeddings = next(iter(other.parameters()))
        embeddings.add_(torch.linspace(-1, 1, embeddings.shape[1]))
    with pytest.raises(ModelError, match="is not the one that built"):
        attach(other, world.memory)
    attach(other, world.memory, force=True).detach()


def test_other_dimensions_are_refused_even_when_forced(world: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=258,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).eval()
    with pytest.raises(ModelError, match="32 dims but this model gives 16"):
        attach(other, world.memory, force=True)


def test_training_mode_is_refused(world: SimpleNamespace) -> None:
    model = make_model().train()
    with pytest.raises(ModelError, match="training mode"):
        attach(model, world.memory)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.01}, r"lam must lie inside \[0, 1\], got 1.01"),
        ({"lam": float("nan")}, "lam must lie inside"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"distances": "cosine"}, "choose keys or index"),
        ({"lambda_": 0.5}, "is no setting of knn"),
        ({"method": "retromaton"}, "choose among knn"),
    ],
)
def test_settings_out_of_range_are_refused(
    world: SimpleNamespace, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        attach(world.model, world.memory, **settings)
    assert "forward" not in vars(world.model)


def test_k_above_the_entries_is_clamped_and_said(world: SimpleNamespace) -> None:
    with pytest.warns(UserWarning, match="more than the memory's"):
        session = attach(world.model, world.memory, k=10**6)
    session.detach()
    assert session.settings.k == world.memory.entries
