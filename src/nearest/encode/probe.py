"""What a model makes of a fixed probe text: its states at the key layer, and its logits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from nearest.encode.hooks import captured_input, of_this_thread
from nearest.encode.identity import (
    encoder_vocabulary_size,
    input_device,
    max_positions,
    reads_sources,
    source_positions,
)
from nearest.encode.layers import KeyLayer, blocks_of
from nearest.errors import ModelError

SKETCH = 32  # dimensions that states are projected to, and tokens whose logits are kept
_POSITIONS = 16  # of the text, whose states and logits are kept
_SHORT, _LONG = 32, 256  # tokens of the text, and at most if a sliding window is to be passed
_NOISE = 2.0**-9  # relative, as of rounding to bfloat16


class Probed(NamedTuple):
    """Projected states at some positions, and logits of some tokens less their mean."""

    states: Float[np.ndarray, "p d"]
    logits: Float[np.ndarray, "p d"]


def probe_length(model: PreTrainedModel) -> int:
    """Tokens of the text: past a sliding window if it is short, within the model's positions."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    beyond = window + _SHORT // 2
    length = beyond if _SHORT < beyond <= _LONG else _SHORT
    return min(length, max_positions(model) or length)


def lowest_ids(vocab_size: int) -> int:
    """How many token ids are used: those that stay when the vocabulary is padded or cut."""
    return -(-vocab_size // 2)


def probed(model: PreTrainedModel, layer: KeyLayer, vocab_size: int, tokens: int) -> Probed:
    """Read the text of so many tokens, which are derived from a vocabulary's size.

    A causal model's state at a position is that of the prefix that ends there, so 16 positions are
    16 lengths.
    """
    device = input_device(model)
    text = _token_ids(vocab_size, tokens).to(device)
    given: dict[str, Tensor] = {"input_ids": text}
    if reads_sources(model):
        length = min(tokens, source_positions(model) or tokens)
        size = min(vocab_size, encoder_vocabulary_size(model))
        given = {"input_ids": _token_ids(size, length).to(device), "decoder_input_ids": text}
    with torch.no_grad(), captured_input(layer.module) as seen:
        logits = model(**given, use_cache=False).logits[0]
    at = torch.linspace(0, tokens - 1, min(_POSITIONS, tokens)).long()
    states = seen[0].reshape(tokens, -1)[at.to(seen[0].device)].float().cpu().numpy()
    kept = _scrambled(SKETCH, seed=2) % lowest_ids(vocab_size)
    chosen = logits[at.to(logits.device)].float().cpu().numpy()[:, kept]
    signs = _scrambled(states.shape[1] * SKETCH, seed=3).reshape(-1, SKETCH) % 2 * 2 - 1
    with np.errstate(all="ignore"):  # what is not finite stops a build where keys are made
        return Probed(states @ signs.astype(np.float32), chosen - chosen.mean(-1, keepdims=True))


def sensitivity_of(model: PreTrainedModel, layer: KeyLayer, size: int, unshaken: Probed) -> float:
    """By how many times relative noise on what enters each block grows on its way.

    Rounding to a dtype or to quantised weights moves states by about its relative error times
    this.
    """
    with _noise(model):
        shaken = probed(model, layer, size, probe_length(model))
    return max(map(apart, unshaken, shaken)) / _NOISE


def apart(one: Float[np.ndarray, "p d"], other: Float[np.ndarray, "p d"]) -> float:
    """Root mean square over positions of the distance, relative to the lengths of the two."""
    with np.errstate(all="ignore"):  # as in `probed`
        squares = ((one - other) ** 2).sum(-1)
        lengths = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
        return float(np.sqrt((squares / np.maximum(lengths, 1e-30)).mean()))


def _token_ids(vocab_size: int, tokens: int) -> Int[Tensor, "1 tokens"]:
    return torch.from_numpy(_scrambled(tokens, seed=1) % lowest_ids(vocab_size))[None]


def _scrambled(count: int, seed: int) -> Int[np.ndarray, " count"]:
    """Integers from 0 that look random, the same everywhere (SplitMix64)."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed << 40)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


@contextmanager
def _noise(model: PreTrainedModel) -> Iterator[None]:
    """Multiply what enters each block by 1 + noise, as if it were rounded to bfloat16 there.

    In passes of this thread alone.
    """
    generator = torch.Generator().manual_seed(0)

    def shaken(states: Tensor) -> Tensor:
        noise = 1 + _NOISE * torch.randn(states.shape, generator=generator)
        return states * noise.to(states.device, states.dtype)

    def shake_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (shaken(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: shaken(kwargs[name])}

    with ExitStack() as stack:
        try:
            blocks = blocks_of(model.get_decoder() if reads_sources(model) else model)
        except ModelError:  # no list of blocks: noise enters with the embeddings
            table: Any = model.get_input_embeddings()
            handle = table.register_forward_hook(
                of_this_thread(lambda _, __, states: shaken(states))
            )
            stack.callback(handle.remove)
        else:
            hook = of_this_thread(shake_input)
            for block in blocks:
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield
