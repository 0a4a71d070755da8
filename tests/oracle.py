"""An independent kNN-LM: no cache, no index, no batches, no code of ours beyond opening files."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nearest import Memory

_FFN_ENTRIES = {
    "gpt2": "transformer.h.{last}.mlp.c_fc",
    "gpt_neox": "gpt_neox.layers.{last}.mlp.dense_h_to_4h",
    "opt": "model.decoder.layers.{last}.fc1",
    "bart": "model.decoder.layers.{last}.fc1",
    "marian": "model.decoder.layers.{last}.fc1",
    "t5": "decoder.block.{last}.layer.2.DenseReluDense.wi{gated}",
}


def ffn_entry(model: PreTrainedModel) -> torch.nn.Module:
    """The module whose input is the key `last_ffn_input`, by name."""
    path = _FFN_ENTRIES.get(model.config.model_type, "model.layers.{last}.mlp.gate_proj")
    config, names = model.config, ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    last = next(getattr(config, name) for name in names if hasattr(config, name)) - 1
    gated = "_0" if getattr(model.config, "is_gated_act", False) else ""
    return model.get_submodule(path.format(last=last, gated=gated))


def keys_and_logits(
    model: PreTrainedModel,
    tokens: Tensor,
    layer: str = "last_ffn_input",
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """float32 keys [length, dim] and logits [length, vocab] of one sequence, in one plain pass.

    `source` is what the encoder of an encoder–decoder reads.
    """
    module = ffn_entry(model) if layer == "last_ffn_input" else model.get_output_embeddings()
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    read = {"input_ids": tokens[None]}
    if source is not None:
        read = {"input_ids": source[None], "decoder_input_ids": tokens[None]}
    with torch.no_grad():
        logits = model(**read).logits[0]
    handle.remove()
    keys = seen[0].reshape(len(tokens), -1)  # OPT flattens them before its feed-forward block
    return keys.float(), logits.float()


def stored_pairs(memory: Memory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(entry ids, keys, values) of a one-segment memory, straight from its files."""
    folder = memory.path / "segments" / "000001"
    tokens = np.load(folder / "tokens.npy")
    offsets = np.load(folder / "offsets.npy")
    keys = np.load(folder / "keys.npy").astype(np.float64)
    ids = [i for a, b in pairwise(offsets) for i in range(a, b - 1)]
    return np.array(ids), keys[ids], tokens[np.array(ids) + 1].astype(np.int64)


def knn_lm_log_probs(
    memory: Memory,
    keys: Tensor,
    logits: Tensor,
    lam: float,
    temperature: float,
    k: int,
    metric: str = "l2",
) -> np.ndarray:
    """log(λ·p_kNN + (1−λ)·p_LM) in float64, [length, vocab], by comparing with every stored key.

    Rows whose k-th and next neighbour are equally far, so that either may be chosen, and whose
    choice would show, are NaN.
    """
    _, stored, values = stored_pairs(memory)
    lm = torch.log_softmax(logits.double(), -1).numpy()
    mixed = np.empty_like(lm)
    for row, query in enumerate(keys.double().numpy()):
        gaps = stored - query
        distances = (gaps**2).sum(1) if metric == "l2" else -(stored * query).sum(1)
        order = np.argsort(distances, kind="stable")
        nearest, following = order[:k], order[k : k + 1]
        weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / temperature)
        weights /= weights.sum()
        gap = distances[following] - distances[nearest[-1]]
        if (gap < 1e-6 * (stored**2).sum(1).max()).any() and weights[-1] > 1e-6:
            mixed[row] = np.nan
            continue
        knn = np.bincount(values[nearest], weights, minlength=lm.shape[1])
        with np.errstate(divide="ignore"):
            mixed[row] = np.logaddexp(lm[row] + np.log1p(-lam), np.log(knn) + np.log(lam))
    return mixed
