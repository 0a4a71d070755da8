"""Forward passes over batches of windows: keys alone, or keys with what the model predicts."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from nearest.corpus.batches import EncoderInputs
from nearest.encode.hooks import captured_input, inputs_shown
from nearest.encode.identity import input_device
from nearest.encode.layers import KeyLayer
from nearest.encode.view import LmView, lm_view

_AT_ONCE = 2**20  # logits


class _KeysReachedError(Exception):
    """Ends a forward pass where its keys are: the layers above are not needed to build a memory."""


class Scored(NamedTuple):
    """What a model makes of n positions: `view` only where it was asked for."""

    keys: Float[Tensor, "n dim"]
    log_probs: Float[Tensor, " n"]
    view: LmView | None


@torch.no_grad()  # inference_mode breaks weights that are quantised or offloaded
def encode_keys(
    model: PreTrainedModel,
    layer: KeyLayer,
    inputs: Int[np.ndarray, "rows width"],
    wanted: Bool[np.ndarray, "rows width"],
    encoder_inputs: EncoderInputs | None = None,
) -> Float[Tensor, "n dim"]:
    """Keys (float32, CPU) at the wanted positions of right-padded windows, in row order.

    `encoder_inputs` are what an encoder reads for each row.
    """
    seen: list[Tensor] = []

    def stop(states: Tensor) -> None:
        seen.append(states)
        raise _KeysReachedError

    with inputs_shown(layer.module, stop), suppress(_KeysReachedError):
        model(**_arguments(model, inputs, encoder_inputs))
    return _rows(seen[0], inputs.shape, torch.from_numpy(wanted))


@torch.no_grad()  # inference_mode breaks weights that are quantised or offloaded
def encode_and_score(
    model: PreTrainedModel,
    layer: KeyLayer,
    inputs: Int[np.ndarray, "rows width"],
    wanted: Bool[np.ndarray, "rows width"],
    targets: Int[np.ndarray, " n"],
    with_view: bool = False,
    encoder_inputs: EncoderInputs | None = None,
) -> Scored:
    """Keys, and the model's log-probability of each target in nats; float32, on the CPU."""
    mask = torch.from_numpy(wanted)
    slices = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": mask.to(input_device(model))} if slices else {}
    with captured_input(layer.module) as seen:
        logits = model(**_arguments(model, inputs, encoder_inputs), **keep).logits
    if not slices:
        logits = logits[mask.to(logits.device)]
    log_probs, views = [], []
    target = torch.from_numpy(targets).to(logits.device)
    for some, came in _in_cache(logits, target):
        some = some.float()  # sums over the vocabulary in half precision lose digits
        log_probs.append(some.gather(-1, came[:, None])[:, 0] - some.logsumexp(-1))
        if with_view:
            views.append(lm_view(some.log_softmax(-1)))
    view = LmView(*map(np.concatenate, zip(*views, strict=True))) if views else None
    return Scored(_rows(seen[0], inputs.shape, mask), torch.cat(log_probs).cpu(), view)


def _in_cache(
    logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]
) -> Iterator[tuple[Float[Tensor, "some vocab"], Int[Tensor, " some"]]]:
    """Few rows at a time on a CPU, so that what is made of them stays in its caches; else all."""
    rows = max(1, _AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(logits.split(max(1, rows)), targets.split(max(1, rows)), strict=True)


def _arguments(
    model: PreTrainedModel,
    inputs: Int[np.ndarray, "rows width"],
    encoder_inputs: EncoderInputs | None,
) -> dict[str, Any]:
    """What a model is called with, to read windows of text and what an encoder reads with them."""
    device = input_device(model)
    text = torch.from_numpy(inputs).to(device)
    if encoder_inputs is None:
        return {"input_ids": text, "use_cache": False}
    return {
        "input_ids": torch.from_numpy(encoder_inputs.tokens).to(device),
        "attention_mask": torch.from_numpy(encoder_inputs.mask).to(device),
        "decoder_input_ids": text,
        "use_cache": False,
    }


def _rows(
    hidden: Tensor, shape: tuple[int, ...], wanted: Bool[Tensor, "rows width"]
) -> Float[Tensor, "n dim"]:
    """Pick positions from captured states, unless the model has picked them already."""
    if hidden.shape[:-1].numel() == wanted.numel():
        hidden = hidden.reshape(*shape, hidden.shape[-1])[wanted.to(hidden.device)]
    return hidden.reshape(-1, hidden.shape[-1]).float().cpu()
