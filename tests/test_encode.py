"""Keys of many architectures, found without a table of them; fingerprints."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
)

from conftest import make_model, make_tokenizer, random_documents
from nearest import Memory, attach, evaluate
from nearest.encode.fingerprint import model_fingerprint, tokenizer_fingerprint
from nearest.encode.forward import encode_and_score, encode_keys
from nearest.encode.identity import start_token
from nearest.encode.layers import find_key_layer
from nearest.errors import ModelError, SettingError
from oracle import keys_and_logits

SMALL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[Any, str]] = {
    "gpt_neox": (GPTNeoXConfig(**SMALL), "mlp.dense_h_to_4h"),
    "gptj": (
        GPTJConfig(vocab_size=258, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
        "mlp.fc_in",
    ),
    "opt": (
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
        "fc1",
    ),
    "mistral": (MistralConfig(**SMALL, num_key_value_heads=1, head_dim=16), "mlp.gate_proj"),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=1), "mlp.gate_proj"),
    "gemma2": (Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=16), "mlp.gate_proj"),
    "phi": (PhiConfig(**SMALL), "mlp.fc1"),
    "phi3": (Phi3Config(**SMALL, num_key_value_heads=1), "mlp.gate_up_proj"),
    "falcon": (FalconConfig(**SMALL, alibi=False), "mlp.dense_h_to_4h"),
    "mixtral": (
        MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2),
        "gate",
    ),
}


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_feed_forward_input_is_found(name: str) -> None:
    config, expected = ARCHITECTURES[name]
    model = build(config)
    layer = find_key_layer(model, "last_ffn_input")
    assert layer.path.endswith(expected)
    assert ".1." in layer.path  # in the last of two blocks
    assert layer.dim == 32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_hidden_equals_the_last_hidden_state(name: str) -> None:
    model = build(ARCHITECTURES[name][0])
    layer = find_key_layer(model, "last_hidden")
    tokens = np.arange(1, 9)[None]
    keys = encode_keys(model, layer, tokens, np.ones((1, 8), dtype=bool))
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(tokens), output_hidden_states=True)
    torch.testing.assert_close(keys, states.hidden_states[-1][0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_evaluates_as_it_predicts_when_attached(
    name: str, build_memory: Callable[..., Memory]
) -> None:
    """Two ways to the same mixture: scoring windows, and the model's own forward pass."""
    model = build(ARCHITECTURES[name][0])
    memory = build_memory(model, random_documents(), window=64, stride=32)
    tokens = np.random.default_rng(0).integers(2, 258, size=(2, 20))
    settings = {"lam": 0.5, "temperature": 3.0, "k": 20}
    expected = evaluate(model, memory, list(tokens), **settings)
    rows = torch.from_numpy(tokens)
    with attach(model, memory, **settings), torch.no_grad():
        log_probs = model(input_ids=rows).logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
        order = torch.tensor([4, 2])
        picked = model(input_ids=rows, logits_to_keep=order).logits
        torch.testing.assert_close(picked, model(input_ids=rows).logits[:, order])
        model.generate(rows[:, :5], max_new_tokens=3, pad_token_id=1, eos_token_id=None)
    np.testing.assert_allclose(-log_probs.sum(1), expected.document_nll, rtol=1e-4)


def test_a_model_that_sees_the_next_token_is_refused() -> None:
    config = BertConfig(**SMALL, is_decoder=False)
    with pytest.raises(ModelError, match="not causal"):
        find_key_layer(build(config), "last_hidden")


def test_mamba_has_no_feed_forward_layer_and_the_cure_is_named() -> None:
    model = build(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ModelError, match="last_hidden"):
        find_key_layer(model, "last_ffn_input")
    assert find_key_layer(model, "last_hidden").dim == 32


def test_an_unknown_key_layer_is_refused() -> None:
    with pytest.raises(SettingError, match="choose last_ffn_input or last_hidden"):
        find_key_layer(make_model(), "first_hidden")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["last_ffn_input", "last_hidden"])
def test_right_padding_changes_no_key_and_no_score(kind: str, name: str) -> None:
    model = make_model(kind)
    layer = find_key_layer(model, name)
    rng = np.random.default_rng(0)
    long, short = rng.integers(2, 258, size=20), rng.integers(2, 258, size=7)
    inputs = np.zeros((2, 20), dtype=np.int64)
    inputs[0], inputs[1, :7] = long, short
    wanted = np.zeros((2, 20), dtype=bool)
    wanted[0, 5:19], wanted[1, :6] = True, True
    targets = np.concatenate([long[6:20], short[1:7]])
    keys, log_probs, _ = encode_and_score(model, layer, inputs, wanted, targets)
    torch.testing.assert_close(encode_keys(model, layer, inputs, wanted), keys)
    for tokens, rows, start, stop in ((long, slice(0, 14), 5, 19), (short, slice(14, 20), 0, 6)):
        alone, logits = keys_and_logits(model, torch.from_numpy(tokens), name)
        torch.testing.assert_close(keys[rows], alone[start:stop], rtol=1e-4, atol=1e-4)
        expected = logits.log_softmax(-1)[start:stop].gather(
            -1, torch.from_numpy(tokens[start + 1 : stop + 1, None])
        )[:, 0]
        torch.testing.assert_close(log_probs[rows], expected, rtol=1e-4, atol=1e-4)


def test_encoding_leaves_no_hook_behind() -> None:
    model = make_model()
    layer = find_key_layer(model, "last_ffn_input")
    encode_keys(model, layer, np.arange(4)[None], np.ones((1, 4), dtype=bool))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def change_one_weight(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.transformer.ln_f.weight[3] += 1e-3
    return model


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda model: model, True),
        (lambda model: model.to(torch.float64), True),
        (change_one_weight, False),
        (lambda _: make_model("llama"), False),
    ],
    ids=["same", "wider dtype", "one weight", "another architecture"],
)
def test_fingerprint_of_a_model(
    change: Callable[[PreTrainedModel], PreTrainedModel], same: bool
) -> None:
    reference = model_fingerprint(make_model())
    assert (model_fingerprint(change(make_model())) == reference) is same


def test_fingerprint_of_a_tokenizer() -> None:
    reference, other = make_tokenizer(), make_tokenizer()
    assert tokenizer_fingerprint(reference) == tokenizer_fingerprint(other)
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(reference) != tokenizer_fingerprint(other)


def test_the_start_token_is_bos_else_eos_else_an_error() -> None:
    tokenizer = make_tokenizer()
    assert start_token(tokenizer) == 0
    tokenizer.bos_token = None
    assert start_token(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        start_token(tokenizer)
