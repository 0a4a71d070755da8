"""Find where a model's keys are, without a table of architectures.

`last_hidden` is the input of the output embeddings. `last_ffn_input` (Khandelwal et al., 2020,
arXiv:1911.00172) is the input of the last block's feed-forward network after its norm: the first
weight matrix that a forward pass enters after the last block's attention has been left. In an
encoder–decoder it is the decoder's block, and the attention that is left last is the one to the
encoder.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nearest.encode.dtype import quantisation, warn_of_slow_dtype
from nearest.encode.hooks import captured_input, of_this_thread
from nearest.encode.identity import input_device, reads_sources, vocabulary_size
from nearest.errors import ModelError, SettingError

LanguageModel = PreTrainedModel  # for layers that need not know transformers
_QUANTISED_MOVES = 0.2  # LLM.int8 moves states by less than 0.1, looking ahead by about 1
_MIXER = re.compile("attention|attn|mixer", re.IGNORECASE)


@dataclass(frozen=True)
class KeyLayer:
    """The module whose input is the key, its path in the model, and the key's dimension."""

    name: str
    path: str
    module: nn.Module
    dim: int


def find_key_layer(model: PreTrainedModel, name: str) -> KeyLayer:
    """Find a key layer by one probe of the model with two tokens.

    Raises:
        SettingError: `name` is no key layer.
        ModelError: the model has no such layer, is not causal, reads no text, is in training mode,
            or compiled in place.
    """
    if name not in ("last_ffn_input", "last_hidden"):
        raise SettingError(f"key layer {name!r} is unknown: choose last_ffn_input or last_hidden")
    if model.training:
        raise ModelError(
            "the model is in training mode, where dropout blurs keys: call model.eval()"
        )
    if model.main_input_name != "input_ids":
        reader = "the encoder of " if reads_sources(model) else ""
        raise ModelError(
            f"{reader}{type(model).__name__} reads {model.main_input_name}, and a memory holds "
            "text: load a model that reads text"
        )
    if not hasattr(model, "hf_device_map") and all(w.is_meta for w in model.parameters()):
        raise ModelError(
            f"the weights of {type(model).__name__} are not loaded (they are on the device meta): "
            "load it with from_pretrained"
        )
    _output_embeddings(model)
    _refuse_compiled_parts(model)
    warn_of_slow_dtype(model)
    module = _output_embeddings(model) if name == "last_hidden" else _last_ffn_entry(model)
    path = next(path for path, candidate in model.named_modules() if candidate is module)
    with captured_input(module) as seen:
        _probe(model)
        _probe(model, second_token=1)
    first, other = (states.reshape(2, -1)[0].float() for states in seen)
    if not _equal_but_for_rounding(model, first, other):
        raise ModelError(
            f"{type(model).__name__} is not causal: its state at a token changes with the next "
            "one, which it is to predict. Load a causal language model"
        )
    return KeyLayer(name, path, module, seen[0].shape[-1])


def _equal_but_for_rounding(model: PreTrainedModel, one: Tensor, other: Tensor) -> bool:
    """Whether a token's state is the same before two others.

    Quantised layers may choose by all tokens of a pass which columns to round, so that a state
    moves a little with any other token.
    """
    if quantisation(model) is not None:
        return bool((one - other).norm() <= _QUANTISED_MOVES * one.norm())
    return torch.allclose(one, other, rtol=1e-2, atol=1e-3, equal_nan=True)


def _refuse_compiled_parts(model: PreTrainedModel) -> None:
    for part in model.modules():
        own_forward = vars(part).get("forward")
        in_place = getattr(part, "_compiled_call_impl", None) is not None
        if in_place or hasattr(own_forward, "_torchdynamo_orig_callable"):
            raise ModelError(
                f"{type(part).__name__} is compiled in place (model.compile(), or its forward), "
                "and compiled code passes over the hooks by which keys are read: use a model that "
                "is not, or torch.compile(model), which is read as it was before"
            )


def _output_embeddings(model: PreTrainedModel) -> nn.Module:
    module: nn.Module | None = model.get_output_embeddings()
    width = getattr(module, "out_features", None)
    if module is None or (width is not None and width < vocabulary_size(model) // 2):
        raise ModelError(
            f"{type(model).__name__} has no output embeddings: load it with a language-model head "
            "(AutoModelForCausalLM)"
        )
    return module


def _last_ffn_entry(model: PreTrainedModel) -> nn.Module:
    """The first module with a weight matrix entered after the last block's attention."""
    events: list[nn.Module | None] = []  # a matrix entered, or None: an attention left
    handles = []
    decoder = model.get_decoder() if reads_sources(model) else model
    for module in blocks_of(decoder)[-1].modules():
        if _MIXER.search(type(module).__name__):
            left = of_this_thread(lambda *_: events.append(None))
            handles.append(module.register_forward_hook(left))
        elif any(weight.ndim >= 2 for weight in module.parameters(recurse=False)):
            entered = of_this_thread(lambda m, _: events.append(m))
            handles.append(module.register_forward_pre_hook(entered))
    try:
        _probe(model)
    finally:
        for handle in handles:
            handle.remove()
    if None in events:
        after = events[len(events) - events[::-1].index(None) :]
        if after and after[0] is not None:
            return after[0]
    raise ModelError(
        f"{type(model).__name__} has no feed-forward layer after the attention of its last block: "
        "use the key layer last_hidden (--key-layer last_hidden)"
    )


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The module list that holds most of the model's weights."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks to look for layers in: for keys use the "
            "key layer last_hidden (--key-layer last_hidden)"
        )
    return max(stacks, key=lambda blocks: sum(weight.numel() for weight in blocks.parameters()))


@torch.no_grad()
def _probe(model: PreTrainedModel, second_token: int = 0) -> None:
    text = torch.tensor([[0, second_token]], device=input_device(model))
    if reads_sources(model):
        model(input_ids=torch.zeros_like(text), decoder_input_ids=text, use_cache=False)
    else:
        model(input_ids=text, use_cache=False)
