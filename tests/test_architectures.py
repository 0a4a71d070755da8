"""Memories attached to models of many kinds, against the oracles on untouched copies."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from automaton_oracle import Corpus, Oracle, states_of
from conftest import documents_apart, make_model, make_tokenizer, random_documents
from nearest import Memory, attach, evaluate
from nearest.errors import ModelError
from oracle import keys_and_logits, knn_lm_log_probs, stored_pairs

# PEFT asks for what transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

NEW = 8
TOKENIZER = make_tokenizer()
WEIGHING = {"lam": 0.6, "temperature": 40.0}
KNN = {**WEIGHING, "k": 8}
COMMON = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
COMMON |= {"bos_token_id": 0, "eos_token_id": 1}
SMALL = COMMON | {"intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": 64}
GROUPED = SMALL | {"num_key_value_heads": 1}
SLIDING = GROUPED | {"head_dim": 16, "sliding_window": 8}  # shorter than what is generated
CAPPED = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
CONFIGS: dict[str, Any] = {
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**SLIDING),
    "gemma2": Gemma2Config(**SLIDING, **CAPPED),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "mamba": MambaConfig(**COMMON, state_size=8),
}


def build(name: str) -> PreTrainedModel:
    """A random model whose predictions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
        for weight in model.parameters():
            weight.data.mul_(1.5 if name == "mamba" else 4)
    return model


def temperature_of(memory: Memory) -> float:
    """At which some neighbours weigh much more than others, and none alone."""
    keys = stored_pairs(memory)[1][:40]
    return float(((keys[:, None] - keys) ** 2).sum(-1).mean()) / 8


def generate(model: Any, prompt: Tensor, **options: Any) -> Any:
    given = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 1,
        "eos_token_id": None,
        "no_repeat_ngram_size": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    return model.generate(**given | options)


def prompts(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 258, (rows, length), generator=generator)


def check(scores: list[Tensor], row: int, expected: np.ndarray) -> None:
    """Each step's scores are the expected log-probabilities, but for tokens that were banned."""
    clear = 0
    for found, wanted in zip(scores, expected, strict=True):
        probs = found[row].float().exp().numpy()
        if not np.isnan(wanted).any():
            clear += 1
            np.testing.assert_allclose(probs[probs > 0], np.exp(wanted)[probs > 0], atol=1e-4)
    assert clear > len(scores) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_equals_the_oracle(name: str, build_memory: Callable[..., Memory]) -> None:
    """A left-padded batch with a cache; Mamba, which ignores padding, in rows of one length."""
    model, copy = build(name), build(name)
    layer = "last_hidden" if name == "mamba" else "last_ffn_input"
    memory = build_memory(model, random_documents(), key_layer=layer, window=64, stride=32)
    settings = {"lam": 0.6, "temperature": temperature_of(memory), "k": 8}
    batch = prompts(2, 7)
    padding = 0 if name == "mamba" else 3
    mask = torch.ones_like(batch)
    batch[1, :padding], mask[1, :padding] = 1, 0
    alone = generate(model, batch, attention_mask=mask).sequences
    with attach(model, memory, **settings) as session:
        output = generate(model, batch, attention_mask=mask)
        sources = session.sources(1)
    assert not torch.equal(output.sequences, alone)  # else the memory was not there
    assert torch.equal(generate(model, batch, attention_mask=mask).sequences, alone)
    for row, start in ((0, 0), (1, padding)):
        sequence = output.sequences[row, start:]
        keys, logits = keys_and_logits(copy, sequence, layer)
        log_probs = knn_lm_log_probs(memory, keys, logits, **settings)
        check(output.scores, row, log_probs[6 - start : -1])
    assert [source.token for source in sources] == output.sequences[1, 7:].tolist()


@pytest.mark.parametrize("name", ["gemma2", "mamba"])
def test_state_follows_caches_of_their_own_kinds(
    name: str, build_memory: Callable[..., Memory]
) -> None:
    """Pointers through sliding windows and recurrent states, with the whole prompt replayed."""
    model, copy = build(name), build(name)
    layer = "last_hidden" if name == "mamba" else "last_ffn_input"
    documents = documents_apart(9, 20, seed=3)
    memory = build_memory(model, documents, key_layer=layer, window=64, stride=32)
    settings = {"lam": 0.6, "temperature": temperature_of(memory), "k": 12, "min_knns": 3}
    prompt = memory.document_tokens(2)[:12].astype(int)
    with attach(model, memory, "retomaton", replay="full", **settings):
        output = generate(model, torch.tensor([prompt.tolist()]))
    sequence = output.sequences[0].tolist()
    oracle = Oracle(Corpus(memory), "retomaton", **settings)
    predicted = oracle.predict(*states_of(copy, sequence, layer), sequence, 0)
    expected = [
        one.log_probs if one.clear else np.full(258, np.nan) for one in predicted[11 : 11 + NEW]
    ]
    check(output.scores, 0, np.array(expected))


def test_mamba_without_feed_forward_says_what_to_do(build_memory: Callable[..., Memory]) -> None:
    with pytest.raises(ModelError, match="use the key layer last_hidden"):
        build_memory(build("mamba"), random_documents())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_mixed_in_single(
    dtype: torch.dtype, build_memory: Callable[..., Memory]
) -> None:
    """The model's own logits, in half precision, and all that follows in float32 or better."""
    model, copy = make_model("llama").to(dtype), make_model("llama").to(dtype)
    memory = build_memory(model, random_documents())
    tokens = prompts(1, 20)[0]
    keys, logits = keys_and_logits(copy, tokens)
    expected = knn_lm_log_probs(memory, keys, logits, **KNN)
    with attach(model, memory, **KNN), torch.no_grad():
        mixed = model(input_ids=tokens[None]).logits[0]
        output = generate(model, tokens[None])
    assert mixed.dtype == torch.float32
    clear = ~np.isnan(expected).any(axis=1)
    assert clear.sum() > 10
    np.testing.assert_allclose(mixed.exp()[clear], np.exp(expected[clear]), atol=1e-4)
    assert output.sequences.shape == (1, 20 + NEW)
    result = evaluate(model, memory, [tokens.numpy()], **KNN)
    if clear.all():
        wanted = -expected[np.arange(19), tokens[1:]].sum()
        assert result.document_nll[0] == pytest.approx(wanted, rel=1e-3)


# --- models that others have wrapped --------------------------------------------------------------


ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    "lora at the key and head": LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "gate_proj", "lm_head"]
    ),
    "ia3": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


def adapted(name: str) -> Any:
    model = get_peft_model(make_model("llama"), ADAPTERS[name]).eval()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter, weight in model.named_parameters():
            if "lora_" in parameter or "ia3_" in parameter:
                weight.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_part_of_the_model(name: str, build_memory: Callable[..., Memory]) -> None:
    model = adapted(name)
    copy = adapted(name).merge_and_unload()  # one plain model of base and adapter
    memory = build_memory(model, random_documents())
    prompt = prompts(1, 7)
    with attach(model, memory, **KNN) as session:
        output = generate(model, prompt)
        called = model(input_ids=prompt).logits
        assert len(session.sources(0)) == NEW
    keys, logits = keys_and_logits(copy, output.sequences[0])
    log_probs = knn_lm_log_probs(memory, keys, logits, **KNN)
    check(output.scores, 0, log_probs[6:-1])
    np.testing.assert_allclose(called[0, 6].detach().exp(), np.exp(log_probs[6]), atol=1e-4)
    result = evaluate(model, memory, [output.sequences[0].numpy()], **KNN)
    tokens = output.sequences[0, 1:].numpy()
    expected = -log_probs[np.arange(len(tokens)), tokens]
    if not np.isnan(expected).any():
        assert result.document_nll[0] == pytest.approx(expected.sum(), rel=1e-4)
    assert torch.equal(generate(model, prompt).sequences, generate(model, prompt).sequences)
    with pytest.raises(ModelError, match="is not the one that built"):  # it lacks the adapter
        attach(make_model("llama"), memory)


def test_adapters_before_the_model_are_refused(build_memory: Callable[..., Memory]) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model("llama"), config).eval()
    with pytest.raises(ModelError, match="PromptTuningConfig puts learned tokens before the text"):
        build_memory(model, random_documents())
    memory = build_memory(model.get_base_model(), random_documents())
    for refused in (lambda: attach(model, memory), lambda: evaluate(model, memory, [np.arange(9)])):
        with pytest.raises(ModelError, match="LoRA"):
            refused()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after", "generate"])
def test_compiled_models(how: str, build_memory: Callable[..., Memory]) -> None:
    """Compiled before or after it is attached, or by generate(); used again afterwards."""
    memory = build_memory(make_model("llama"), random_documents())
    plain, prompt, options = make_model("llama"), prompts(1, 7), {}
    compiled: Any = plain if how == "generate" else torch.compile(plain, backend="eager")
    if how == "generate":
        config = CompileConfig(backend="eager", fullgraph=False, mode=None, dynamic=False)
        config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": config}
    with torch.no_grad():
        before = plain(input_ids=prompt).logits
        if how == "before":
            torch.testing.assert_close(compiled(input_ids=prompt).logits, before)
        with attach(plain if how == "after" else compiled, memory, **KNN):
            called = compiled(input_ids=prompt).logits
            output = generate(compiled, prompt, max_new_tokens=3, **options)
        after = compiled(input_ids=prompt).logits
    keys, logits = keys_and_logits(make_model("llama"), output.sequences[0])
    log_probs = knn_lm_log_probs(memory, keys, logits, **KNN)
    np.testing.assert_allclose(called[0, 6].exp(), np.exp(log_probs[6]), atol=1e-4)
    check(output.scores, 0, log_probs[6:-1])
    torch.testing.assert_close(after, before)
    torch.compiler.reset()


def test_a_compiled_model_builds_and_scores_as_itself(
    build_memory: Callable[..., Memory], tiny_model: PreTrainedModel, tiny_memory: Memory
) -> None:
    compiled = torch.compile(tiny_model, backend="eager")
    text = [prompts(1, 20)[0].numpy()]
    expected = evaluate(tiny_model, tiny_memory, text, **KNN)
    assert evaluate(compiled, tiny_memory, text, **KNN).nll == expected.nll
    memory = build_memory(compiled)
    assert evaluate(tiny_model, memory, text, **KNN).nll == expected.nll


@pytest.mark.parametrize("how", ["model.compile()", "a layer", "forward"])
def test_models_compiled_in_place_are_refused(
    how: str, tiny_memory: Memory, build_memory: Callable[..., Memory]
) -> None:
    """Their compiled code would not call the hooks."""
    model = make_model()
    if how == "model.compile()":
        model.compile(backend="eager")
    elif how == "a layer":
        model.transformer.h[0].compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    for refused in (
        lambda: attach(model, tiny_memory),
        lambda: evaluate(model, tiny_memory, [np.arange(9)]),
        lambda: build_memory(model),
    ):
        with pytest.raises(ModelError, match="compiled in place"):
            refused()


# --- several at once ------------------------------------------------------------------------------


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """What each gives, all having run at once."""
    found: list[Any] = [None] * len(jobs)

    def run(number: int) -> None:
        try:
            found[number] = jobs[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def test_several_attached_models_in_one_process(build_memory: Callable[..., Memory]) -> None:
    """Each with a memory and method of its own, generating at the same time."""
    models = [make_model("gpt2"), make_model("llama"), make_model("llama")]
    methods = [("knn", KNN), ("retomaton", KNN), ("suffix", WEIGHING)]
    sessions = []
    expected = []
    prompt = prompts(1, 7)
    memories = [build_memory(model, random_documents()) for model in models[:2]]
    for model, memory, (method, given) in zip(
        models, [*memories, memories[1]], methods, strict=True
    ):
        with attach(model, memory, method, **given):
            expected.append(generate(model, prompt).sequences.tolist())
        sessions.append(attach(model, memory, method, **given))
    assert expected[0] != expected[1] != expected[2]
    found = in_threads(
        *(lambda model=model: generate(model, prompt).sequences.tolist() for model in models)
    )
    assert found == expected
    for session in sessions:
        session.detach()


def test_threads_share_one_memory_and_one_model(
    tiny_model: PreTrainedModel, build_memory: Callable[..., Memory]
) -> None:
    """Each evaluates a text of its own; nobody sees another's hidden states."""
    memory = Memory.open(build_memory(tiny_model).path)  # nothing of it has been read yet
    methods = ["base", "knn", "retomaton", "suffix"]
    texts = [[d] for d in documents_apart(4, 12, seed=7)]

    def score(text: list[Any]) -> list[float]:
        results = evaluate(tiny_model, memory, text, methods, tokenizer=TOKENIZER, **WEIGHING)
        return [result.nll for result in results]

    found = in_threads(*(lambda text=text: score(text) for text in texts))
    assert found == [score(text) for text in texts]


# --- continuous batching --------------------------------------------------------------------------


BATCHING = {
    "generation_config": GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=1
    ),
    "warmup": False,
    "progress_bar": False,
}


@pytest.mark.slow
def test_continuous_batching_mixes_hidden_states(build_memory: Callable[..., Memory]) -> None:
    model, copy = make_model("llama"), make_model("llama")
    memory = build_memory(model, random_documents())
    inputs = [prompts(1, 5)[0].tolist(), prompts(1, 9)[0].tolist()]
    few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    with attach(model, memory, **KNN):
        outputs = model.generate_batch(inputs, continuous_batching_config=few, **BATCHING)
    for prompt, output in zip(inputs, outputs.values(), strict=True):
        assert output.error is None
        sequence = torch.tensor([*prompt, *output.generated_tokens])
        log_probs = knn_lm_log_probs(memory, *keys_and_logits(copy, sequence), **KNN)
        for position in range(len(prompt) - 1, len(sequence) - 1):
            best = log_probs[position]
            assert np.isnan(best).any() or best[sequence[position + 1]] > best.max() - 1e-4


@pytest.mark.parametrize(
    ("method", "given"),
    [("suffix", {}), ("retomaton", {}), ("knn", {"guard": True}), ("knn", {"length_power": 1.0})],
)
def test_continuous_batching_with_context_is_refused(
    tiny_model: PreTrainedModel, tiny_memory: Memory, method: str, given: dict[str, Any]
) -> None:
    with (
        attach(tiny_model, tiny_memory, method, **given),
        pytest.raises(ModelError, match=f"{method} looks at the tokens before a prediction"),
    ):
        tiny_model.generate_batch([[5, 6, 7]], **BATCHING)
    assert "init_continuous_batching" not in vars(tiny_model)
