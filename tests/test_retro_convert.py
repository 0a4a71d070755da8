"""Checkpoints in every container, and those that must not be read."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from nearest.errors import ModelError, SettingError
from nearest.retro import RetroForCausalLM
from nearest.retro.convert import (
    from_norlund,
    from_retro_pytorch,
    read_checkpoint,
    to_norlund,
    to_retro_pytorch,
)
from retro_models import CHUNK, found, neighbours, tiny_model, tokens

PUBLIC_SIZES = {  # eight heads of at least 32 dims, feed-forward of four times the dims
    "cca_rotary": "public",
    "decoder_heads": 8,
    "encoder_heads": 8,
    "decoder_attention_dim": 256,
    "encoder_attention_dim": 256,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 80,
    "rotary_dim": 32,
}


class Settings:
    """Like a training framework's object in a checkpoint."""

    touched = False

    def __init__(self) -> None:
        self.rate = 1e-4

    def __setstate__(self, state: dict[str, Any]) -> None:
        Settings.touched = True


class Calls:
    """Its pickle calls something when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def touch(path: str) -> None:
    Path(path).touch()


def norlund_state() -> dict[str, torch.Tensor]:
    return to_norlund(tiny_model("norlund"))


def other_state() -> dict[str, torch.Tensor]:
    return to_retro_pytorch(tiny_model("retro-pytorch", **PUBLIC_SIZES))


def lightning(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "epoch": 3,
        "state_dict": OrderedDict(state),
        "hyper_parameters": {"config": Settings(), "names": {"a", "b"}, "shape": torch.Size([2])},
        "callbacks": {Settings: [Settings()]},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
    }


@pytest.mark.parametrize("container", ["safetensors", "plain", "lightning", "old", "parameters"])
def test_containers(container, tmp_path: Path):
    state = {name: weight.float() for name, weight in norlund_state().items()}
    state["lm_head.weight"] = state["lm_head.weight"].bfloat16()
    path = tmp_path / ("weights.safetensors" if container == "safetensors" else "weights.ckpt")
    if container == "safetensors":
        safetensors.torch.save_file(state, path)
    elif container == "old":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif container == "parameters":
        torch.save({name: torch.nn.Parameter(weight) for name, weight in state.items()}, path)
    else:
        torch.save(state if container == "plain" else lightning(state), path)
    Settings.touched = False
    read = read_checkpoint(path)
    assert not Settings.touched
    assert read.keys() == state.keys()
    for name, weight in state.items():
        assert torch.equal(read[name], weight)
        assert read[name].dtype == weight.dtype
    model = from_norlund(read, chunk_size=CHUNK)
    assert model.config.chunk_size == CHUNK


def test_views_and_shared_storages(tmp_path: Path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.T, "none": torch.empty(0, 3)}
    torch.save(state, tmp_path / "weights.pt")
    read = read_checkpoint(tmp_path / "weights.pt")
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor)
    read["whole"].zero_()
    assert torch.equal(read["part"], state["part"])


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, pickle.loads, os.remove, __import__, open]
)
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(function, tmp_path: Path):
    witness = tmp_path / "witness"
    witness.write_text("here")
    arguments = {
        os.system: (f"rm {witness}",),
        os.remove: (str(witness),),
        open: (str(witness), "w"),
        pickle.loads: (b"",),
        getattr: (1, "real"),
    }.get(function, (f"__import__('os').remove({str(witness)!r})",))
    call = Calls(function, *arguments)
    whole = lightning({"lm_head.weight": torch.ones(2)})
    for content in (
        {"x": call},
        {**whole, "callbacks": {"checkpoint": [call]}},
        {**whole, "hyper_parameters": {"config": call}},
        {**whole, "state_dict": OrderedDict(weight=call)},
    ):
        torch.save(content, tmp_path / "evil.ckpt")
        with pytest.raises(ModelError, match="refused"):
            read_checkpoint(tmp_path / "evil.ckpt")
    assert witness.read_text() == "here"


def test_functions_of_unknown_modules_are_not_called_either(tmp_path: Path):
    """A name that is not on the list of refused ones still does nothing."""
    witness = tmp_path / "witness"
    state = norlund_state()
    torch.save({"state_dict": state, "x": Calls(touch, str(witness))}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt").keys() == state.keys()
    assert not witness.exists()


def test_old_pickles_with_code_are_refused(tmp_path: Path):
    witness = tmp_path / "witness"
    content = {"x": Calls(os.system, f"touch {witness}")}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(content))
    for name in ("old.pt", "bare.pt"):
        with pytest.raises(ModelError):
            read_checkpoint(tmp_path / name)
    assert not witness.exists()


def damaged_archive(change: str) -> bytes:
    whole = io.BytesIO()
    torch.save({"a": torch.arange(5.0)}, whole)
    if change == "cut":
        return whole.getvalue()[:-40]
    out = io.BytesIO()
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if change == "short storage" and "/data/" in name:
                data = data[:-4]
            if change == "no pickle" and name.endswith("data.pkl"):
                continue
            target.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    "content", ["cut", "short storage", "no pickle", "empty", "text", "missing"]
)
def test_damaged_files(content, tmp_path: Path):
    path = tmp_path / "weights.pt"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "text":
        path.write_text("hello")
    elif content != "missing":
        path.write_bytes(damaged_archive(content))
    with pytest.raises(ModelError, match="no checkpoint"):
        read_checkpoint(path)
    with pytest.raises(ModelError, match="no checkpoint"):
        read_checkpoint(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("content", [{}, [1], {"a": 1}, {"a": torch.ones(1), "b": Settings()}])
def test_files_without_weights(content, tmp_path: Path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"no weights|no state dict"):
        read_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("load", "make"), [(from_norlund, norlund_state), (from_retro_pytorch, other_state)]
)
def test_missing_and_extra_keys_are_all_named(load, make):
    state = make()
    first, second = sorted(name for name in state if "layers.1.2" in name or "decoder.1.2" in name)[
        :2
    ]
    del state[first], state[second]
    state["more.weight"], state["most.weight"] = torch.ones(1), torch.ones(1)
    with pytest.raises(ModelError) as error:
        load(state, chunk_size=CHUNK)
    for name in (first, second, "more.weight", "most.weight"):
        assert name in str(error.value)
    with pytest.raises(ModelError, match=r"missing .*(dec_embs|token_emb)"):
        load({}, chunk_size=CHUNK)


@pytest.mark.parametrize(
    ("load", "make", "head"),
    [
        (from_norlund, norlund_state, "lm_head.weight"),
        (from_retro_pytorch, other_state, "to_logits.weight"),
    ],
)
def test_another_vocabulary(load, make, head):
    state = make()
    assert load(state, vocab_size=50, chunk_size=CHUNK).config.vocab_size == 50
    with pytest.raises(ModelError, match="vocabulary of 50 tokens, not 60"):
        load(state, vocab_size=60, chunk_size=CHUNK)
    state[head] = state[head][:40]
    with pytest.raises(ModelError, match=head):
        load(state, chunk_size=CHUNK)


def test_weights_of_the_wrong_shape():
    state = norlund_state()
    name = "base.decoder.1.2.wo.weight"
    state[name] = state[name][:, :-1]
    with pytest.raises(ModelError, match=r"wo\.weight has the shape"):
        from_norlund(state, chunk_size=CHUNK)


@pytest.mark.parametrize(
    ("save", "preset", "settings", "message"),
    [
        (to_norlund, "paper", {}, "scale_scores|feed_forward"),
        (to_norlund, "norlund", {"absolute_positions": True}, "absolute_positions"),
        (to_norlund, "norlund", {"cca_buckets": "shared"}, "cca_buckets"),
        (to_retro_pytorch, "retro-pytorch", {}, "cca_rotary"),
        (to_retro_pytorch, "norlund", {}, "norm|scale_scores"),
        (to_retro_pytorch, "retro-pytorch", {"cca_rotary": "public"}, "heads"),
        (to_retro_pytorch, "retro-pytorch", {**PUBLIC_SIZES, "decoder_ffn_dim": 64}, "ffn_dim"),
    ],
)
def test_models_that_the_public_code_cannot_hold(save, preset, settings, message):
    with pytest.raises(SettingError, match=message):
        save(tiny_model(preset, **settings))


def test_settings_that_the_weights_do_not_fit_are_refused():
    for settings in ({"absolute_positions": True}, {"positions": "rotary", "rotary_dim": 8}):
        with pytest.raises(SettingError, match="another model than the public one"):
            from_norlund(norlund_state(), chunk_size=CHUNK, **settings)


def test_layers_that_memorize_can_be_added():
    model = from_norlund(norlund_state(), chunk_size=CHUNK, memorizing_layers=[1])
    plain = from_norlund(norlund_state(), chunk_size=CHUNK)
    assert torch.equal(model(tokens(1, 9)).logits, plain(tokens(1, 9)).logits)
    layer = model.layers[1].self_attention.body.memorizing
    assert torch.equal(layer.gate, torch.zeros(2))
    memory = model(tokens(1, 9), memory=model.empty_memory(1)).memory
    assert not torch.equal(model(tokens(1, 9), memory=memory).logits, plain(tokens(1, 9)).logits)


def test_a_converted_model_is_saved_and_generates(tmp_path: Path):
    original = tiny_model("norlund", zero_init_retrieval=True).float()
    from_norlund(to_norlund(original), chunk_size=CHUNK).save_pretrained(tmp_path)
    model = RetroForCausalLM.from_pretrained(tmp_path)
    ids = neighbours(original, 1, 9)
    expected = original(tokens(1, 9), neighbour_ids=ids).logits
    assert torch.equal(model(tokens(1, 9), neighbour_ids=ids).logits, expected)
    options = {"neighbours": found, "max_new_tokens": 9, "eos_token_id": None}
    expected = original.generate(tokens(1, 9), **options)
    assert torch.equal(model.generate(tokens(1, 9), **options), expected)
