"""What models compute in: chosen by name, device and CPU; and memories do not mind another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from conftest import make_documents, make_model, make_tokenizer
from nearest import Memory, attach, evaluate
from nearest.cli import app
from nearest.encode import dtype as dtype_module
from nearest.encode.dtype import (
    chosen_device,
    chosen_dtype,
    fast_on_cpu,
    few_bits,
    quantisation,
    warn_of_slow_dtype,
)
from nearest.encode.fingerprint import model_fingerprint
from nearest.encode.loading import load_model_and_tokenizer, load_tokenizer
from nearest.errors import ModelError, SettingError

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("saved", "device", "cpu_has", "expected"),
    [
        (torch.float32, "cpu", [], torch.float32),
        (torch.float32, "cuda", [], torch.float32),
        (torch.bfloat16, "cpu", [], torch.float32),
        (torch.bfloat16, "cpu", ["avx512_bf16"], torch.bfloat16),
        (torch.bfloat16, "cpu", ["amx_bf16"], torch.bfloat16),
        (torch.bfloat16, "cuda", [], torch.bfloat16),
        (torch.float16, "cpu", ["avx512_bf16", "amx_bf16"], torch.float32),
        (torch.float16, "cuda", [], torch.float16),
    ],
    ids=str,
)
def test_auto_is_as_saved_where_that_is_fast(
    saved: torch.dtype,
    device: str,
    cpu_has: list[str],
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu_has, True))
    assert chosen_dtype("auto", saved, device) == expected
    for name in ("float32", "bfloat16", "float16"):
        assert chosen_dtype(name, saved, device) == getattr(torch, name)


def test_a_cpu_that_says_nothing_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not fast_on_cpu(torch.bfloat16)


def test_half_precision_that_a_cpu_emulates_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model, documents = make_model().bfloat16(), make_documents(2, 12)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(UserWarning, match=r"bfloat16.*dtype=torch\.float32"):
        memory = Memory.build(model, make_tokenizer(), documents, tmp_path / "m", tune=False)
    with pytest.warns(UserWarning, match="bfloat16"), attach(model, memory, lam=0.5):
        pass
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    recwarn.clear()
    evaluate(model, memory, documents, "knn", tokenizer=make_tokenizer(), lam=0.5)
    assert not [one for one in recwarn if "instructions" in str(one.message)]


def test_training_in_emulated_bfloat16_is_told(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for model, bf16, told in (
        (make_model(), False, ""),
        (make_model(), True, "leave bf16 out"),
        (make_model().bfloat16(), False, "dtype=torch.float32"),
    ):
        for cpu_has in ({}, {"avx512_bf16": True}):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=cpu_has: has)
            recwarn.clear()
            warn_of_slow_dtype(model, bf16=bf16)
            expected = bool(told) and not cpu_has
            assert [told in str(one.message) for one in recwarn] == [True] * expected


def test_a_device_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_device("cpu") == torch.device("cpu")
    for found, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert chosen_device("auto").type == kind
    for name in ("cuda:99", "cpu:x"):
        with pytest.raises(SettingError, match=f"device '{name}' cannot be used here"):
            chosen_device(name)
    for name in ("gpu", "meta", ""):
        with pytest.raises(SettingError, match=f"device '{name}' is unknown: choose auto, cpu"):
            chosen_device(name)


def test_the_commands_take_a_device(model_folder: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the court shall be")
    arguments = ["build", model_folder, str(corpus), "--out", str(tmp_path / "m"), "--device"]
    refused = CliRunner().invoke(app, [*arguments, "gpu"])
    assert refused.exit_code == 2
    assert "device 'gpu' is unknown" in refused.output
    assert not (tmp_path / "m").exists()
    assert CliRunner().invoke(app, [*arguments, "cpu"]).exit_code == 0


def test_weights_that_are_rounded_are_still_the_same_model(model_folder: str) -> None:
    known = model_fingerprint(load_model_and_tokenizer(model_folder)[0])
    for name in ("float32", "bfloat16", "float16"):
        model, _ = load_model_and_tokenizer(model_folder, name)
        assert model.dtype == getattr(torch, name)
        assert model_fingerprint(model) == known


def test_a_model_saved_in_half_precision(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model_and_tokenizer(model_folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for fast in (False, True):
        monkeypatch.setattr(dtype_module, "fast_on_cpu", lambda _, fast=fast: fast)
        loaded = load_model_and_tokenizer(str(tmp_path))[0]
        assert loaded.dtype == (torch.bfloat16 if fast else torch.float32)
        assert model_fingerprint(loaded) == model_fingerprint(model)


def run(*arguments: Any) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("made_in", ["float32", "bfloat16"])
def test_a_memory_is_read_in_any_dtype(made_in: str, model_folder: str, tmp_path: Path) -> None:
    """Half precision keeps 8 bits of 24 (bfloat16) or 11: nll is off by as small a share."""
    corpus, text = tmp_path / "corpus.jsonl", tmp_path / "text.jsonl"
    lines = [json.dumps({"text": d.text}) for d in make_documents(12, 20)]
    corpus.write_text("\n".join(lines[:10]))
    text.write_text("\n".join(lines[9:]))
    memory = tmp_path / "m"
    (info,) = run("build", model_folder, corpus, "--out", memory, "--dtype", made_in)
    assert info["keys_made_in"] == made_in
    keys = Memory.open(memory).manifest.keys
    assert keys is not None
    assert keys.dtype == made_in
    found = {}
    for name in ("float32", "bfloat16", "float16"):
        rows = run("eval", memory, "--text", text, "--method", "base,knn", "--dtype", name)
        found[name] = [row["nll"] for row in rows]
    for name, share in (("bfloat16", 2**-7), ("float16", 2**-8)):
        assert found[name] == pytest.approx(found["float32"], rel=share)
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "one more"}))
    (info,) = run("add", memory, more, "--dtype", "bfloat16")
    assert info["documents"] == 11


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "gguf", "gguf_file": "m.gguf"}, 4),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, 8),
        ({"quant_method": "quanto", "weights": "int4"}, 4),
        ({"quant_method": "quanto", "weights": "int8"}, 8),
    ],
)
def test_how_weights_are_quantised_is_known(config: dict[str, Any], expected: int) -> None:
    model = make_model()
    assert quantisation(model) is None
    model.config.quantization_config = config
    assert quantisation(model) == f"{config['quant_method']} {expected} bits"
    assert few_bits(f"x {expected} bits") is (expected == 4)


@pytest.mark.parametrize(("error", "reason"), [(AssertionError(), "AssertionError"),
                                               (OSError("no such\nfile"), "no such")])  # fmt: skip
def test_why_a_tokenizer_cannot_be_loaded(
    error: Exception, reason: str, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(error))
    for load in (load_model_and_tokenizer, load_tokenizer):
        with pytest.raises(ModelError, match=rf"\({reason}\)"):
            load(model_folder)


def test_a_model_that_does_not_fit(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "to", raising(torch.OutOfMemoryError()))
    with pytest.raises(ModelError, match="does not fit in the memory of cpu: use --device cpu"):
        load_model_and_tokenizer(model_folder, device="cpu")


def raising(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> None:
        raise error

    return raises
