"""A memory accepts the model that built it in any form, and no model that computes otherwise."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from conftest import edit_manifest, make_model, make_tokenizer, random_documents
from nearest import Memory, attach
from nearest.encode import fingerprint, probe
from nearest.encode.fingerprint import model_fingerprint, probe_of, weights_hash
from nearest.encode.layers import find_key_layer
from nearest.errors import ModelError

# PEFT asks for what transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def gemma(**changes: Any) -> PreTrainedModel:
    """A fresh model with windows and soft caps; its weights are the same whatever changes."""
    settings: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "pad_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Gemma2ForCausalLM(Gemma2Config(**settings | changes)).eval()


@pytest.fixture(scope="module")
def memory(build_memory: Callable[..., Memory]) -> Memory:
    return build_memory(gemma(), random_documents(), window=32, stride=16)


@pytest.fixture(scope="module")
def gpt2_memory(build_memory: Callable[..., Memory]) -> Memory:
    return build_memory(make_model(), random_documents(), window=32, stride=16)


def accepts(memory: Memory, model: nn.Module) -> bool:
    try:
        attach(model, memory, tokenizer=make_tokenizer()).detach()
    except ModelError as error:
        return "is not the one that built" not in str(error)
    return True


def layers_of(model: Any) -> Any:
    return model.model.layers


def of_gemma(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def changed() -> nn.Module:
        model = gemma()
        with torch.no_grad():
            change(model)
        return model

    return changed


def swap(model: Any) -> None:
    layers = layers_of(model)
    layers[0], layers[1] = layers[1], layers[0]


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0))


def shift(model: Any) -> None:
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids, *args: forward(
        x, position_ids * 2, *args
    )


def train(model: Any) -> None:
    for weight in model.parameters():
        weight += (
            1e-3
            * weight.abs().mean()
            * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        )


CHANGED: dict[str, Callable[[], nn.Module]] = {
    "rope": lambda: gemma(rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
    "rope beyond the probe": lambda: gemma(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "soft cap": lambda: gemma(final_logit_softcapping=20.0),
    "soft cap of attention": lambda: gemma(attn_logit_softcapping=None),
    "sliding window": lambda: gemma(sliding_window=12),
    "attention scale": lambda: gemma(query_pre_attn_scalar=64),
    "attention scale of an attribute": of_gemma(
        lambda m: setattr(layers_of(m)[1].self_attn, "scaling", 0.5)
    ),
    "activation": lambda: gemma(hidden_activation="relu"),
    "activation of an attribute": of_gemma(
        lambda m: setattr(layers_of(m)[1].mlp, "act_fn", nn.ReLU())
    ),
    "norm of one layer": of_gemma(lambda m: layers_of(m)[1].input_layernorm.weight.add_(0.1)),
    "tied head": of_gemma(untie),
    "checkpoint step": of_gemma(train),
    "swapped layers": of_gemma(swap),
    "shifted positions": of_gemma(shift),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_changed_function_is_refused(change: Callable[[], nn.Module], memory: Memory) -> None:
    assert accepts(memory, gemma())
    assert not accepts(memory, change())


def lora(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["c_attn"], r=4, init_lora_weights=False)
    config.fan_in_fan_out = True
    with torch.random.fork_rng():
        return get_peft_model(make_model(), config).eval()


def test_adapters_are_told_apart(gpt2_memory: Memory, build_memory: Callable[..., Memory]) -> None:
    model = lora(0)
    torch.manual_seed(1)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("default")
    model.eval()
    adapted = build_memory(model, random_documents(), window=32, stride=16)
    assert accepts(adapted, model)
    assert not accepts(gpt2_memory, model)
    model.set_adapter("other")
    assert not accepts(adapted, model)
    with model.disable_adapter():
        assert not accepts(adapted, model)
        assert accepts(gpt2_memory, model)  # it is the base model then
    model.set_adapter("default")
    merged = model.merge_and_unload()
    assert accepts(adapted, merged)  # the same function in other weights
    assert not accepts(gpt2_memory, merged)


def test_a_model_with_other_weights_is_refused_with_how_far_its_states_are(
    gpt2_memory: Memory,
) -> None:
    model = make_model()
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[3] += 1
    with pytest.raises(ModelError, match=r"states for a fixed text are \d.* apart") as error:
        attach(model, gpt2_memory)
    assert "(float32 then, float32 now)" in str(error.value)
    attach(model, gpt2_memory, force=True).detach()


@pytest.mark.parametrize("built", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_another_dtype_or_number_of_threads_is_no_other_model(
    built: str, kind: str, build_memory: Callable[..., Memory]
) -> None:
    source = make_model(kind)
    with torch.no_grad():  # such that no half precision holds it exactly
        next(source.parameters()).add_(1e-4)
    model = copy.deepcopy(source).to(getattr(torch, built))
    memory = build_memory(model, random_documents(), window=32, stride=16, batch_size=3)
    threads = torch.get_num_threads()
    try:
        for name in ("float32", "bfloat16", "float16"):
            for count in (1, 2):
                torch.set_num_threads(count)
                assert accepts(memory, copy.deepcopy(source).to(getattr(torch, name)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized:UserWarning")
def test_methods_made_of_partials_are_told_by_their_functions_and_arguments() -> None:
    """As torchao's quantised layers have them: a partial has no name of its own."""
    model = make_model("gpt2")
    hashes = []
    for argument in (1, 1, 2):
        said = functools.partial(nn.Linear.extra_repr, argument)
        vars(model.transformer.h[0])["extra_repr"] = types.MethodType(said, model)
        hashes.append(fingerprint._structure(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_padded_embeddings_are_no_other_model(gpt2_memory: Memory) -> None:
    model = make_model()
    model.resize_token_embeddings(320, mean_resizing=False)
    assert model_fingerprint(model) != gpt2_memory.manifest.model.fingerprint
    assert accepts(gpt2_memory, model)


def test_a_memory_without_a_probe_knows_its_model_by_weights(
    build_memory: Callable[..., Memory],
) -> None:
    memory = build_memory(make_model(), random_documents(), window=32, stride=16)
    edit_manifest(memory.path, lambda manifest: manifest["model"].pop("function"))
    memory = Memory.open(memory.path)
    assert memory.manifest.model.function is None
    assert accepts(memory, make_model())
    changed = make_model()
    with torch.no_grad():
        changed.transformer.ln_f.weight[0] += 1e-3
    assert not accepts(memory, changed)


def test_a_model_is_probed_and_hashed_once_a_session(
    gpt2_memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    hashed, run = fingerprint.hash_of_weights, probe.probed
    monkeypatch.setattr(
        fingerprint, "hash_of_weights", lambda m: (runs.append("hash"), hashed(m))[1]
    )
    monkeypatch.setattr(fingerprint, "probed", lambda *a: (runs.append("probe"), run(*a))[1])
    model = make_model()
    assert accepts(gpt2_memory, model)
    assert accepts(gpt2_memory, model)
    assert runs == ["hash"]  # equal weights in an equal structure need no probe
    resized = make_model().to(torch.bfloat16)
    assert accepts(gpt2_memory, resized)
    assert accepts(gpt2_memory, resized)
    assert runs == ["hash", "hash", "probe"]
    for change in (lambda w: w.add_(1.0), lambda w: w.data.add_(1.0)):
        with torch.no_grad():
            change(model.transformer.ln_f.bias)
        assert not accepts(gpt2_memory, model)


def test_offloaded_weights_build_and_attach(
    gpt2_memory: Memory, build_memory: Callable[..., Memory], model_folder: str, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    places: dict[str, Any] = dict.fromkeys(
        ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head", "transformer.h.0"),
        "cpu",
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, device_map=places | {"transformer.h.1": "disk"}, offload_folder=str(tmp_path)
    ).eval()
    assert weights_hash(model) is None
    memory = build_memory(model, random_documents(), window=32, stride=16)
    assert accepts(memory, model)
    assert accepts(memory, make_model())
    assert accepts(gpt2_memory, model)
    other = make_model()
    with torch.no_grad():
        other.transformer.ln_f.weight[3] += 1
    assert not accepts(memory, other)


class Rounded(nn.Linear):
    """A linear layer whose weights are int8 codes, as quantisers leave them."""

    def __init__(self, inner: Any) -> None:
        super().__init__(1, 1)
        del self.weight
        matrix = inner.weight.detach()
        scale = matrix.abs().amax(0) / 127
        codes = (matrix / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = inner.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale) + self.bias


def test_weights_of_8_bits_are_within_their_tolerance(gpt2_memory: Memory) -> None:
    model = make_model()
    for block in model.transformer.h:
        block.mlp.c_proj = Rounded(block.mlp.c_proj)
    original = make_model()
    built = probe_of(original, find_key_layer(original, "last_ffn_input"))
    found = probe_of(model, find_key_layer(model, "last_ffn_input"), built)
    assert found.quantisation is not None
    assert fingerprint.tolerance(built, found) < 0.3
    assert accepts(gpt2_memory, model)
