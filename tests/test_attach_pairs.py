"""Encoder–decoders with a memory attached, against the oracles on untouched copies."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from automaton_oracle import Corpus, Oracle, Prediction, states_of
from conftest import gates_trained_at_once
from nearest import Memory, attach, evaluate, tune
from nearest.build.cluster import KMeans, cluster_memory
from nearest.build.compress import Compression, compress_memory
from nearest.encode.identity import token_rules
from nearest.errors import CorpusError, ModelError, NearestError, SettingError
from nearest.verbs.generate import generate as generate_text
from oracle import keys_and_logits, knn_lm_log_probs, stored_pairs
from pairs import CONFIGS, EOS, PAD, make_pair_model, make_pair_tokenizer, pair_documents

# PEFT asks for what transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

NEW = 7
TOKENIZER = make_pair_tokenizer()
DOCUMENTS = pair_documents(8)
TEXT = pair_documents(2, seed=5, longest=24)
LENGTHS = (9, 5)  # of the sources in a batch; the second is padded


def world_of(name: str, path: Any) -> SimpleNamespace:
    """A model, an untouched copy for the oracle, and a memory."""
    model = make_pair_model(name)
    layer = "last_hidden" if name == "t5" else "last_ffn_input"
    options = {"keys": "fp16", "key_layer": layer, "window": 64, "stride": 32}
    memory = Memory.build(model, TOKENIZER, DOCUMENTS, path, **options)
    keys = stored_pairs(memory)[1][:40]
    temperature = float(((keys[:, None] - keys) ** 2).sum(-1).mean()) / 8
    start = token_rules(model, TOKENIZER).start_token
    return SimpleNamespace(
        model=model,
        copy=make_pair_model(name),
        memory=memory,
        layer=layer,
        start=start,
        knn={"lam": 0.6, "temperature": temperature, "k": 12},
    )


@pytest.fixture(scope="module", params=CONFIGS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world_of(request.param, tmp_path_factory.mktemp("pairs") / "m")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world_of("t5", tmp_path_factory.mktemp("pairs") / "m")


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sources and their mask; padding is no token that a model knows by its id."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randint(2, 258, (2, max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return sources * mask, mask


def source_of(row: int, seed: int = 0) -> Tensor:
    return batch(seed)[0][row, : LENGTHS[row]]


def generate(model: Any, **options: Any) -> Any:
    sources, mask = batch()
    given = {
        "input_ids": sources,
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "no_repeat_ngram_size": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    return model.generate(**given | options)


def predictions(
    world: Any, method: str, settings: dict[str, Any], sequence: Tensor, source: Tensor
) -> list[Prediction]:
    """What the oracle predicts at each position of a sequence."""
    tokens = sequence.tolist()
    oracle = Oracle(Corpus(world.memory), method, **settings)
    return oracle.predict(*states_of(world.copy, tokens, world.layer, source), tokens)


def check(scores: list[Tensor], row: int, expected: list[Prediction]) -> None:
    """Each step's scores are the expected log-probabilities, but for tokens that were banned."""
    clear = 0
    for found, wanted in zip(scores, expected, strict=True):
        if wanted.clear:
            clear += 1
            probs = found[row].float().exp().numpy()
            some = probs > 0
            np.testing.assert_allclose(probs[some], np.exp(wanted.log_probs)[some], atol=1e-4)
    assert clear > len(scores) / 2


METHODS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "knn": lambda knn: knn,
    "retomaton": lambda knn: {**knn, "min_knns": 3},
    "suffix": lambda knn: {"lam": 0.6, "temperature": knn["temperature"]},
}


GATED = ["retomaton", "knn+mixture", "knn+adaptret", "hybrid"]
ADDED = [replace(d, id=f"added-{d.id}") for d in pair_documents(4, seed=8)]
# Of what it is tuned on, a memory knows a part.
TUNED_ON = [
    replace(d, id=f"text-{i}")
    for i, d in enumerate([*DOCUMENTS[:2], *pair_documents(6, seed=6, longest=40)])
]


def settings_of(world: Any, method: str) -> dict[str, Any]:
    given = METHODS[method](world.knn)
    return given | ({"length_power": 0.0} if method == "suffix" else {})


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_generation_equals_the_oracle(world: Any, sample: bool) -> None:
    """A batch with a padded source, by each method; the model is then given back."""
    alone = generate(world.model).sequences
    found = {}
    for method in METHODS:
        settings = settings_of(world, method)
        options = {"do_sample": True, "top_k": 0} if sample else {}
        torch.manual_seed(0)
        with attach(world.model, world.memory, method, **settings) as session:
            output = generate(world.model, **options)
            sources = session.sources(1)
        for row in (0, 1):
            sequence = output.sequences[row]
            expected = predictions(world, method, settings, sequence, source_of(row))
            check(output.scores, row, expected[:-1])
        assert [one.token for one in sources] == output.sequences[1, 1:].tolist()
        for one, wanted in zip(sources, expected, strict=False):
            if wanted.clear:  # the memory's share of the token's probability
                value = stored_values(world.memory)
                from_memory = sum(w for entry, w in wanted.weights if value[entry] == one.token)
                share = from_memory / np.exp(wanted.log_probs[one.token])
                assert one.memory_weight == pytest.approx(share, abs=2e-3)
        found[method] = output.sequences
    if not sample:
        assert any(not torch.equal(sequences, alone) for sequences in found.values())
        assert torch.equal(generate(world.model).sequences, alone)


def stored_values(memory: Memory) -> dict[int, int]:
    ids, _, values = stored_pairs(memory)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_beam_scores_equal_the_oracle(world: Any, method: str) -> None:
    settings = settings_of(world, method)
    with attach(world.model, world.memory, method, **settings):
        output = generate(world.model, num_beams=3, num_return_sequences=2)
    clear = 0
    for number, (sequence, score) in enumerate(
        zip(output.sequences, output.sequences_scores, strict=True)
    ):
        predicted = predictions(world, method, settings, sequence, source_of(number // 2))[:-1]
        steps = zip(predicted, sequence[1:].tolist(), strict=True)
        if all(one.clear for one in predicted):
            clear += 1
            total = sum(one.log_probs[token] for one, token in steps)
            np.testing.assert_allclose(total / NEW, score, atol=1e-3)
    assert clear > 1


def test_sources_with_the_same_prefix_share_no_state(t5: Any) -> None:
    """Beams of one source have prefixes that beams of the other had a step before."""
    settings = {**settings_of(t5, "retomaton"), "lam": 0.9, "min_knns": 6, "k": 8}
    prompts = torch.tensor([t5.memory.document_tokens(0)[:3].tolist()] * 2)
    with attach(t5.model, t5.memory, "retomaton", replay="full", **settings):
        output = generate(t5.model, decoder_input_ids=prompts, num_beams=4, num_return_sequences=4)
    clear = 0
    for number, (sequence, score) in enumerate(
        zip(output.sequences, output.sequences_scores, strict=True)
    ):
        predicted = predictions(t5, "retomaton", settings, sequence, source_of(number // 4))[:-1]
        if all(one.clear for one in predicted):
            clear += 1
            steps = zip(predicted[2:], sequence[3:].tolist(), strict=True)
            total = sum(one.log_probs[token] for one, token in steps)
            np.testing.assert_allclose(total / NEW, score, atol=1e-3)
    assert clear > 4


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_decode_give_the_same(t5: Any, options: dict[str, Any]) -> None:
    """Drafts, static caches and none at all; assistants take one row."""
    sources, _ = batch()
    one = {"input_ids": sources[:1], "attention_mask": torch.ones_like(sources[:1])}
    if "assistant_model" in options:
        options = {"assistant_model": make_pair_model("t5")}
    for method in ("knn", "retomaton"):
        with attach(t5.model, t5.memory, method, **settings_of(t5, method)):
            plain = generate(t5.model, **one).sequences
            assert torch.equal(generate(t5.model, **one, **options).sequences, plain)


@pytest.mark.parametrize("begun", [True, False], ids=["with start", "without"])
def test_prompts_of_the_decoder_are_gone_on_from(world: Any, begun: bool) -> None:
    """What of a prompt is replayed decides the state; generate() adds a start token."""
    settings = settings_of(world, "retomaton")
    prompt = world.memory.document_tokens(2)[0 if begun else 1 :][:8].astype(int)
    prompts = torch.tensor([prompt.tolist()] * 2)
    with attach(world.model, world.memory, "retomaton", replay="full", **settings) as session:
        output = generate(world.model, decoder_input_ids=prompts)
        sources = session.sources(0)
    length = 8 if begun else 9
    assert output.sequences.shape == (2, length + NEW)
    assert int(output.sequences[0, 0]) == world.start
    for row in (0, 1):
        expected = predictions(world, "retomaton", settings, output.sequences[row], source_of(row))
        check(output.scores, row, expected[length - 1 : -1])
    assert [one.token for one in sources] == output.sequences[0, length:].tolist()


def test_prompts_of_the_decoder_may_be_padded(t5: Any) -> None:
    settings = settings_of(t5, "retomaton")
    prompts = torch.tensor([t5.memory.document_tokens(n)[:6].tolist() for n in (1, 2)])
    mask = torch.ones_like(prompts)
    prompts[1], mask[1] = torch.tensor([PAD, PAD, *prompts[1, :4].tolist()]), mask[1]
    mask[1, :2] = 0
    with attach(t5.model, t5.memory, "retomaton", replay="full", **settings) as session:
        output = generate(t5.model, decoder_input_ids=prompts, decoder_attention_mask=mask)
        sources = session.sources(1)
    sequence = output.sequences[1, 2:]
    expected = predictions(t5, "retomaton", settings, sequence, source_of(1))
    check(output.scores, 1, expected[3:-1])
    assert [one.token for one in sources] == sequence[4:].tolist()


def test_outputs_of_the_encoder_stand_for_the_source(t5: Any) -> None:
    sources, mask = batch()
    with torch.no_grad():
        states = t5.model.get_encoder()(input_ids=sources, attention_mask=mask).last_hidden_state
    with attach(t5.model, t5.memory, "retomaton", **settings_of(t5, "retomaton")) as session:
        expected = generate(t5.model).sequences
        output = generate(
            t5.model,
            input_ids=None,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
        )
        assert torch.equal(output.sequences, expected)
        with pytest.raises(NearestError, match="encoder_outputs and what a cache"):
            session.sources(0)


# --- plain calls ----------------------------------------------------------------------------------


def text_of(world: Any, number: int) -> tuple[Tensor, Tensor]:
    """A document's source and its decoder's tokens."""
    source = TOKENIZER(TEXT[number].encoder_text)["input_ids"]
    tokens = [world.start, *TOKENIZER(TEXT[number].text)["input_ids"]]
    return torch.tensor([source]), torch.tensor([tokens])


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_call_predicts_as_evaluate_does(world: Any, method: str) -> None:
    """Labels are not shifted; the decoder reads them shifted where no other input is given."""
    settings = settings_of(world, method)
    options = {"tokenizer": TOKENIZER, "window": 64, "stride": 32, **settings}
    result = evaluate(world.model, world.memory, TEXT, method, **options)
    for number, nll in enumerate(result.document_nll):
        source, tokens = text_of(world, number)
        labels = tokens[:, 1:]
        with attach(world.model, world.memory, method, **settings), torch.no_grad():
            given = world.model(input_ids=source, decoder_input_ids=tokens[:, :-1], labels=labels)
            shifted = world.model(input_ids=source, labels=labels)
            loss, logits = world.model(input_ids=source, labels=labels, return_dict=False)[:2]
            some = torch.where(torch.arange(labels.shape[1]) < 3, -100, labels)
            text = tokens[:, :-1]
            masked = world.model(input_ids=source, decoder_input_ids=text, labels=some).loss
        log_probs = given.logits.log_softmax(-1)[0]
        losses = functional.nll_loss(log_probs, labels[0], reduction="none")
        np.testing.assert_allclose(losses.sum(), nll, rtol=1e-3)
        for one in (given.loss, shifted.loss, loss):
            torch.testing.assert_close(one, losses.mean())
        torch.testing.assert_close(masked, losses[3:].mean())
        torch.testing.assert_close(shifted.logits, logits)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A memory of pairs that was clustered, compressed and tuned with gates, and then grew."""
    path = tmp_path_factory.mktemp("everything") / "m"
    made = world_of("t5", path)
    cluster_memory(path, KMeans(20))
    compress_memory(path, Compression(pca=24, keys="int8"))
    memory = Memory.open(path)
    for method in GATED:
        with gates_trained_at_once():
            tuned = tune(made.model, memory, TUNED_ON, method=method, tokenizer=TOKENIZER)
        assert tuned.nll < tuned.base_nll
        memory = Memory.open(path)
    made.memory = memory.add(made.model, TOKENIZER, ADDED).remove(["pair-3"])
    return made


@pytest.mark.parametrize("method", GATED)
def test_whatever_a_memory_has_an_attached_model_predicts_as_evaluate_does(
    everything: Any, method: str
) -> None:
    memory = everything.memory
    assert memory.clusters is not None
    result = evaluate(everything.model, memory, TEXT, method, tokenizer=TOKENIZER)
    losses = []
    for number in range(len(TEXT)):
        source, tokens = text_of(everything, number)
        labels = tokens[:, 1:]
        with attach(everything.model, memory, method, replay="full"), torch.no_grad():
            found = everything.model(input_ids=source, labels=labels)
        losses.append(float(found.loss) * labels.shape[1])
    np.testing.assert_allclose(result.document_nll, losses, rtol=1e-3)
    base = evaluate(everything.model, None, TEXT, "base", tokenizer=TOKENIZER)
    assert abs(base.nll - result.nll) > 1e-3


def test_calls_that_do_not_show_the_text(world: Any) -> None:
    source, tokens = text_of(world, 0)
    embedded = world.model.get_input_embeddings()(tokens[:, :-1])
    scale = getattr(world.model.get_decoder(), "embed_scale", 1.0)
    with attach(world.model, world.memory, **world.knn), torch.no_grad():
        expected = world.model(input_ids=source, decoder_input_ids=tokens[:, :-1]).logits
        found = world.model(input_ids=source, decoder_inputs_embeds=embedded * scale).logits
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with (
        attach(world.model, world.memory, "suffix"),
        pytest.raises(ModelError, match="decoder_input_ids"),
    ):
        world.model(input_ids=source, decoder_inputs_embeds=embedded)


def test_bart_goes_on_from_its_source(tmp_path: Any) -> None:
    """Without any decoder input it shifts what the encoder reads."""
    bart = world_of("bart", tmp_path / "m")
    source, _ = text_of(bart, 0)
    shifted = torch.cat([torch.tensor([[EOS]]), source[:, :-1]], 1)
    with attach(bart.model, bart.memory, **bart.knn), torch.no_grad():
        expected = bart.model(input_ids=source, decoder_input_ids=shifted).logits
        torch.testing.assert_close(bart.model(input_ids=source).logits, expected)
        with pytest.raises(ValueError, match="Please pass either `input_ids`"):
            bart.model()


# --- the rest -------------------------------------------------------------------------------------


def with_lora(model: PreTrainedModel) -> Any:
    """Adapters that change what it predicts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        wrapped = get_peft_model(model, config).eval()
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.data.normal_()
    return wrapped


def test_adapters_are_attached_with_their_model(t5: Any, tmp_path: Any) -> None:
    wrapped = with_lora(make_pair_model("t5"))
    options = {"keys": "fp16", "key_layer": "last_hidden"}
    memory = Memory.build(wrapped, TOKENIZER, DOCUMENTS, tmp_path / "m", **options)
    with attach(wrapped, memory, **t5.knn):
        output = generate(wrapped)
    bare = with_lora(make_pair_model("t5")).get_base_model()
    for row in (0, 1):
        keys, logits = keys_and_logits(bare, output.sequences[row], "last_hidden", source_of(row))
        expected = knn_lm_log_probs(memory, keys, logits, **t5.knn)
        for scores, wanted in zip(output.scores, expected, strict=False):
            probs = scores[row].exp().numpy()
            some = (probs > 0) & ~np.isnan(wanted)
            np.testing.assert_allclose(probs[some], np.exp(wanted)[some], atol=1e-4)
    with pytest.raises(ModelError, match="is not the one that built"):
        attach(t5.model, memory)


def test_a_memory_brings_a_text_to_its_end(world: Any) -> None:
    """Asked for a source that it holds, it writes the text that came with it, and stops."""
    document = DOCUMENTS[3]
    generation = generate_text(
        world.model,
        TOKENIZER,
        world.memory,
        document.encoder_text,
        settings={"lam": 1 - 1e-9, "temperature": 1e-3, "k": 1},
        max_new_tokens=62,
    )
    assert generation.text == document.text
    assert not generation.continues
    assert [token.text for token in generation.tokens] == [*document.text, "</s>"]
    assert generation.documents[0].id == document.id
    assert generation.documents[0].weight > 0.95


def test_what_cannot_be_generated(world: Any) -> None:
    with pytest.raises(CorpusError, match="the prompt has no text for the encoder"):
        generate_text(world.model, TOKENIZER, world.memory, "")
    if "bart" in world.model.config.model_type:
        with pytest.raises(CorpusError, match="the prompt has 65 tokens"):
            generate_text(world.model, TOKENIZER, world.memory, "a" * 64)
        with pytest.raises(SettingError, match="exceed the model's 64 positions"):
            generate_text(world.model, TOKENIZER, world.memory, "a", max_new_tokens=64)
