"""Whether two models compute the same function, whatever their weights are stored as.

A fingerprint holds what a model makes of a fixed probe text: its states at the key layer and its
logits, at prefixes of several lengths. Two models are the same if these differ by no more than
rounding explains. Equal weights in an equal structure need no probe.
"""

import base64
import functools
import hashlib
import json
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from nearest.encode.dtype import few_bits, quantisation
from nearest.encode.identity import max_positions, vocabulary_size
from nearest.encode.layers import KeyLayer
from nearest.encode.probe import SKETCH, apart, lowest_ids, probe_length, probed, sensitivity_of
from nearest.errors import ModelError

_SAMPLES_PER_TENSOR = 65_536
_VERSION_SAMPLES = 8
# Relative rounding errors of activations, and of quantised weights of 8 and of fewer bits.
_ROUNDING = {"float64": 2**-24, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-9}
_QUANTISED_8, _QUANTISED_4 = 2**-7, 2**-5
# Scripts, digits, spaces and code: tokenizers with one vocabulary but other rules differ here.
_PROBE = "The 3rd  naïve café’s\n\tdef f(x_1):  return x**2  # § 1-204.06 — Ω 中文 🙂"
_MARGIN = 5.0
_LEAST = 1e-4  # kernels and devices add up in other orders
_MOST = 0.7  # states of unrelated models are about 1.4 apart
# Settings with effects that a short text may not show; numbers are compared to six digits.
_HIDDEN_SETTINGS = (
    "activation_function",
    "attention_chunk_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "rope_parameters",
    "sliding_window",
)
# Settings and attributes that say where a model comes from or how it is run, not what it computes.
_INCIDENTAL = {
    "_attn_implementation",
    "_is_hf_initialized",
    "_name_or_path",
    "_version",
    "architectures",
    "dtype",
    "gradient_checkpointing",
    "name_or_path",
    "quantization_config",
    "torch_dtype",
    "training",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class Probe:
    """What a model makes of the probe text, small enough for a manifest.

    Attributes:
        structure: hex hash of the modules, their plain attributes and buffers, and the config.
        dtype: what the model computes in.
        quantisation: how its weights are quantised; None if they are not.
        vocab_size: from which the probe's token ids were derived.
        tokens: length of the probe text.
        sensitivity: by how many times relative noise grows on its way to the states.
        settings: those whose effects a short text may not show.
        states: base64 of float32 [16, 32], a random projection of the states at 16 positions.
        logits: base64 of float32 [16, 32], of 32 tokens, less their mean at each position.
    """

    structure: str
    dtype: str
    quantisation: str | None
    vocab_size: int
    tokens: int
    sensitivity: float
    settings: dict[str, Any]
    states: str
    logits: str


@dataclass
class _Known:
    """What was computed of a model, valid for one version of its parameters."""

    version: str
    structure: str
    weights: str | None = None
    probes: dict[tuple[str, int, int], Probe] = field(default_factory=dict)


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, _Known]" = weakref.WeakKeyDictionary()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hex hash of every parameter's name and shape, and of up to 65,536 values of each.

    The same weights give the same hash in any dtype that holds them exactly, on any device, and
    after rounding by `load_model_and_tokenizer`.

    Raises:
        ModelError: weights cannot be read, because they are offloaded or quantised.
    """
    if (weights := weights_hash(model)) is None:
        raise ModelError(
            f"the weights of {type(model).__name__} cannot be read, because some are offloaded or "
            "quantised: load the model whole"
        )
    return weights


def tokenizer_fingerprint(tokenizer: Any, sources: bool = False) -> str:
    """Hex hash of a tokenizer's vocabulary and of what it makes of a probe text.

    With `sources`, also of what it makes of the probe as a source and as a target: languages that
    were chosen show there.
    """
    probes = [tokenizer(_PROBE, add_special_tokens=False)["input_ids"]]
    if sources:
        probes += [tokenizer(_PROBE)["input_ids"], tokenizer(text_target=_PROBE)["input_ids"]]
    seen = [sorted(tokenizer.get_vocab().items()), *probes]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def weights_hash(model: PreTrainedModel) -> str | None:
    """As `model_fingerprint`, but None where weights cannot be read."""
    known = _known(model)
    if known.weights is None and all(_readable(weight) for weight in model.parameters()):
        known.weights = hash_of_weights(model)
    return known.weights


def hash_of_weights(model: PreTrainedModel) -> str:
    """As `model_fingerprint`, of weights that can be read, as they are now."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        values = _sampled(weight, _SAMPLES_PER_TENSOR).to("cpu", torch.float32)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def weights_kept_known(model: PreTrainedModel) -> Iterator[None]:
    """Let a model keep the hash of its weights while they are rounded to another dtype."""
    weights = weights_hash(model)
    yield
    _known(model).weights = weights


def probe_of(model: PreTrainedModel, layer: KeyLayer, like: Probe | None = None) -> Probe:
    """Probe a model, with the token ids and the length of an earlier probe if one is given."""
    size = vocabulary_size(model) if like is None else like.vocab_size
    tokens = probe_length(model) if like is None else like.tokens
    known = _known(model)
    if (probe := known.probes.get((layer.path, size, tokens))) is not None:
        return probe
    found = probed(model, layer, size, tokens)
    probe = Probe(
        known.structure,
        str(model.dtype).removeprefix("torch."),
        quantisation(model),
        size,
        tokens,
        like.sensitivity if like else sensitivity_of(model, layer, size, found),
        _settings(model),
        _packed(found.states),
        _packed(found.logits),
    )
    known.probes[layer.path, size, tokens] = probe
    return probe


def function_hash(model: PreTrainedModel, probe: Probe | None) -> str:
    """Hex hash that stands for weights that cannot be read; no readable weights have it."""
    seen = _structure(model) if probe is None else json.dumps(asdict(probe), sort_keys=True)
    return _hash(seen.encode())


def departure(
    model: PreTrainedModel, layer: KeyLayer, weights: str, path: str, built: Probe
) -> str | None:
    """How a model departs from the one that was probed; None if it computes the same.

    Args:
        model: the model at hand.
        layer: its key layer.
        weights: hash of the weights of the model that was probed.
        path: path of its key layer. If this model's differs, equal weights do not mean equal
            states, so the states are compared.
        built: its probe.
    """
    plain = all(weight.is_floating_point() for weight in model.parameters())
    alike = built.structure == _known(model).structure and layer.path == path
    if plain and alike and weights_hash(model) == weights:
        return None
    for name, value in _settings(model).items():
        if not _equal(value, before := built.settings.get(name)):
            return f"its setting {name} is {value!r} and was {before!r}"
    if (limit := max_positions(model)) is not None and limit < built.tokens:
        return f"it reads {limit} tokens at most, and the probe has {built.tokens}"
    if vocabulary_size(model) < lowest_ids(built.vocab_size):
        return f"it knows {vocabulary_size(model)} tokens, and {built.vocab_size} were known"
    probe = probe_of(model, layer, built)
    allowed = tolerance(built, probe)
    for what, found, before in (
        ("states", probe.states, built.states),
        ("logits", probe.logits, built.logits),
    ):
        distance = apart(_unpacked(before), _unpacked(found))
        if not distance <= allowed:
            return (
                f"its {what} for a fixed text are {distance:.2g} of their length apart, where "
                f"rounding ({_precision(built)} then, {_precision(probe)} now) explains at most "
                f"{allowed:.2g}"
            )
    return None


def tolerance(built: Probe, probe: Probe) -> float:
    """The largest relative distance of states, or logits, that rounding explains."""
    error = built.sensitivity * _rounding(built, probe)
    return min(max(_LEAST, _MARGIN * error), _MOST)


def _rounding(built: Probe, probe: Probe) -> float:
    computed = max(_ROUNDING[built.dtype], _ROUNDING[probe.dtype])
    labels = {built.quantisation, probe.quantisation}
    if labels == {None}:
        return computed
    if len(labels) == 1:  # the same codes; activations may be rounded to 8 bits
        return max(computed, _ROUNDING["bfloat16"])
    return max(_QUANTISED_4 if few_bits(label) else _QUANTISED_8 for label in labels if label)


def _precision(probe: Probe) -> str:
    return probe.quantisation or probe.dtype


def _known(model: PreTrainedModel) -> _Known:
    structure = _structure(model)
    version, known = _version(model, structure), _KNOWN.get(model)
    if known is None or known.version != version:
        known = _KNOWN[model] = _Known(version, structure)
    return known


def _version(model: PreTrainedModel, structure: str) -> str:
    """Changes with every parameter, and with whatever else a model computes by; milliseconds.

    PyTorch counts changes of a tensor, but not those that are made through its `data`: of each
    parameter a few values are looked at, too.
    """
    counts: list[tuple[int, ...]] = []
    samples: dict[torch.device, list[Tensor]] = {}
    for weight in model.parameters():
        count = -1 if weight.is_inference() else weight._version
        counts.append((id(weight), count))
        if _readable(weight):
            few = _sampled(weight, _VERSION_SAMPLES).to(torch.float32)
            samples.setdefault(weight.device, []).append(few)
    values = [torch.cat(of_device).cpu().numpy().tobytes() for of_device in samples.values()]
    return _hash(repr(counts).encode(), structure.encode(), *values)


def _readable(weight: Tensor) -> bool:
    return not weight.is_meta and not is_traceable_wrapper_subclass(weight)


def _sampled(weight: Tensor, most: int) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // most))]


def _structure(model: PreTrainedModel) -> str:
    """Hash of all that a model computes by, other than its parameters."""
    parts: list[Any] = [_plain(model.config.to_dict())]
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        parts.append([name, type(module).__qualname__, hooks, _plain(vars(module))])
    buffers = [
        _sampled(buffer, _SAMPLES_PER_TENSOR).to("cpu", torch.float32).numpy().tobytes()
        for buffer in model.buffers()
        if _readable(buffer)
    ]
    return _hash(repr(parts).encode(), *buffers)


def _plain(values: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Numbers, texts and names of functions among some values."""
    return sorted(
        (str(name), shown)
        for name, value in values.items()
        if name not in _INCIDENTAL and (shown := _shown(value)) is not None
    )


def _shown(value: Any) -> str | None:
    if isinstance(value, types.MethodType):  # of a function or, in quantised layers, of a partial
        return _shown(value.__func__)
    if isinstance(value, functools.partial):
        return repr([_shown(value.func), _shown(value.args), _plain(value.keywords)])
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return value.__qualname__
    if isinstance(value, dict):
        return repr(_plain(value)) if value else None
    if isinstance(value, list | tuple | set | frozenset):
        shown = [_shown(one) for one in value]
        return repr(sorted(map(str, shown)) if isinstance(value, set | frozenset) else shown)
    return repr(value) if isinstance(value, bool | int | float | str) else None


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of the text model whose effects a short text may not show, where they are set."""
    config = model.config.get_text_config()
    found = {name: getattr(config, name, None) for name in _HIDDEN_SETTINGS}
    if getattr(config, "use_sliding_window", True) is False:
        found["sliding_window"] = None
    return {name: json.loads(json.dumps(value, default=str)) for name, value in found.items()}


def _equal(one: Any, other: Any) -> bool:
    """Equal, where numbers may differ in the seventh digit and what is None may be missing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one.get(name), other.get(name)) for name in one.keys() | other.keys())
    numbers = [v for v in (one, other) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == 2:
        return bool(np.isclose(one, other, rtol=1e-6, atol=0))
    return bool(one == other)


def _packed(values: Float[np.ndarray, "p d"]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> Float[np.ndarray, "p d"]:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, SKETCH).astype(np.float64)
