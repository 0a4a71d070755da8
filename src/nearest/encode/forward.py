"""Forward passes over batches of windows: keys alone, or keys with what the model predicts."""

import inspect
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from nearest.corpus.batches import WindowBatch, batch_windows
from nearest.corpus.tokens import Tokens
from nearest.encode.layers import KeyLayer, captured_input


class _KeysReachedError(Exception):
    """Ends a forward pass where its keys are: the layers above are not needed to build a memory."""


@torch.inference_mode()
def encode_keys(
    model: PreTrainedModel,
    layer: KeyLayer,
    inputs: Int[np.ndarray, "rows width"],
    wanted: Bool[np.ndarray, "rows width"],
) -> Float[Tensor, "n dim"]:
    """Keys (float32, CPU) at the wanted positions of right-padded windows, in row order."""

    def stop(_module: nn.Module, _args: Any) -> None:
        raise _KeysReachedError

    with captured_input(layer.module) as seen:
        handle = layer.module.register_forward_pre_hook(stop)
        try:
            model(input_ids=torch.from_numpy(inputs).to(model.device), use_cache=False)
        except _KeysReachedError:
            pass
        finally:
            handle.remove()
    return _rows(seen[0], inputs.shape, torch.from_numpy(wanted))


@torch.inference_mode()
def encode_and_score(
    model: PreTrainedModel,
    layer: KeyLayer,
    inputs: Int[np.ndarray, "rows width"],
    wanted: Bool[np.ndarray, "rows width"],
    targets: Int[np.ndarray, " n"],
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, " n"]]:
    """Keys, and the model's log-probability of each target in nats; float32, on the CPU."""
    mask = torch.from_numpy(wanted)
    slices = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": mask.to(model.device)} if slices else {}
    with captured_input(layer.module) as seen:
        logits = model(
            input_ids=torch.from_numpy(inputs).to(model.device), use_cache=False, **keep
        ).logits
    if not slices:
        logits = logits[mask.to(logits.device)]
    logits = logits.float()  # sums over the vocabulary in half precision lose digits
    target = torch.from_numpy(targets).to(logits.device)
    log_probs = logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
    return _rows(seen[0], inputs.shape, mask), log_probs.cpu()


def _rows(
    hidden: Tensor, shape: tuple[int, ...], wanted: Bool[Tensor, "rows width"]
) -> Float[Tensor, "n dim"]:
    """Pick positions from captured states, unless the model has picked them already."""
    if hidden.shape[:-1].numel() == wanted.numel():
        hidden = hidden.reshape(*shape, hidden.shape[-1])[wanted.to(hidden.device)]
    return hidden.reshape(-1, hidden.shape[-1]).float().cpu()


def default_batch_size(model: PreTrainedModel, window: int) -> int:
    """Windows in a batch such that their float32 logits take at most half a gigabyte."""
    logits_bytes = 4 * window * model.config.get_text_config().vocab_size
    return int(np.clip((1 << 29) // logits_bytes, 1, 16))


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of windows with what the model makes of its n predictions."""

    batch: WindowBatch
    keys: Float[Tensor, "n dim"]
    lm_log_probs: Float[Tensor, " n"]
    seconds: float


def score_documents(
    model: PreTrainedModel,
    layer: KeyLayer,
    documents: Iterable[Tokens],
    window: int,
    stride: int,
    batch_size: int | None = None,
) -> Iterator[ScoredBatch]:
    """Score every token but the first of each document exactly once, timing the model's part."""
    if batch_size is None:
        batch_size = default_batch_size(model, window)
    for batch in batch_windows(documents, window, stride, batch_size):
        started = time.perf_counter()
        keys, log_probs = encode_and_score(
            model, layer, batch.inputs, batch.predicts, batch.targets
        )
        yield ScoredBatch(batch, keys, log_probs, time.perf_counter() - started)
