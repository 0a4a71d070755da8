"""Forward passes of rows that share a cache, on transformers' caches.

A row is one sequence. Rows of one `Batch` advance by one token a pass; shorter ones are padded at
the left. Batches are joined when a prompt has been read, and lose rows that have finished. Padding
is masked and positions are given, so that a row's logits do not depend on the rows beside it but
for the order in which numbers are added (about 1e-6).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nearest.encode.hooks import captured_input
from nearest.encode.layers import KeyLayer
from nearest.errors import ModelError


class Passed(NamedTuple):
    """What a pass gives for the last positions of each row."""

    keys: Float[Tensor, "rows n dim"]  # float32, on the CPU
    log_probs: Float[Tensor, "rows n vocab"]  # float32, of the model alone, in nats


@dataclass
class Batch:
    """The cache of some rows, and how many columns of padding stand before each."""

    cache: Any
    padding: list[int]

    @property
    def length(self) -> int:
        """Columns of the cache."""
        return int(self.cache.get_seq_length())


class Passes:
    """Runs a causal model; a model whose cache is not of plain layers runs one row at a time."""

    def __init__(self, model: PreTrainedModel, layer: KeyLayer) -> None:
        self.model = model
        self._layer = layer
        self._parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in self._parameters:
            raise ModelError(
                f"{type(model).__name__} takes no past_key_values, which the server keeps for each "
                "request: serve a causal model that does"
            )
        plain = all(type(one) is DynamicLayer for one in DynamicCache(config=model.config).layers)
        self.joins = plain and "position_ids" in self._parameters

    def begin(self) -> Batch:
        """One row without tokens."""
        return Batch(DynamicCache(config=self.model.config), [0])

    @torch.inference_mode()
    def read(self, batch: Batch, tokens: Sequence[int], keep: int) -> Passed:
        """Go on with tokens of a prompt in a batch of one row; `keep` last positions are given."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self._pass(batch, ids, keep)

    @torch.inference_mode()
    def step(self, batch: Batch, tokens: Sequence[int]) -> Passed:
        """Go on with one token a row."""
        ids = torch.tensor(list(tokens), device=self.model.device)[:, None]
        return self._pass(batch, ids, 1)

    @torch.inference_mode()
    def join(self, one: Batch, other: Batch) -> Batch:
        """The rows of both."""
        length = max(one.length, other.length)
        pads = length - one.length, length - other.length
        cache = DynamicCache()
        for number, (a, b) in enumerate(zip(one.cache.layers, other.cache.layers, strict=True)):
            keys = torch.cat([_padded(a.keys, pads[0]), _padded(b.keys, pads[1])])
            values = torch.cat([_padded(a.values, pads[0]), _padded(b.values, pads[1])])
            cache.update(keys, values, number)
        padding = [p + pads[0] for p in one.padding] + [p + pads[1] for p in other.padding]
        return Batch(cache, padding)

    @torch.inference_mode()
    def repeat(self, batch: Batch, times: int) -> Batch:
        """One row several times, for several continuations of a prompt."""
        batch.cache.batch_repeat_interleave(times)
        return Batch(batch.cache, batch.padding * times)

    @torch.inference_mode()
    def select(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """Some rows, without padding that all of them have."""
        batch.cache.batch_select_indices(torch.tensor(list(rows), device=self.model.device))
        padding = [batch.padding[row] for row in rows]
        common = min(padding)
        if common:
            for layer in batch.cache.layers:
                layer.keys = layer.keys[..., common:, :]
                layer.values = layer.values[..., common:, :]
        return Batch(batch.cache, [pad - common for pad in padding])

    def _pass(self, batch: Batch, ids: Tensor, keep: int) -> Passed:
        rows, width = ids.shape
        past = batch.length
        arguments: dict[str, Any] = {"past_key_values": batch.cache, "use_cache": True}
        if self.joins:
            columns = torch.arange(past + width, device=ids.device)
            padding = torch.tensor(batch.padding, device=ids.device)[:, None]
            arguments["attention_mask"] = (columns >= padding).long()
            arguments["position_ids"] = columns[past:] - padding
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = keep
        with captured_input(self._layer.module) as seen:
            logits = self.model(input_ids=ids, **arguments).logits
        keys = seen[0].reshape(rows, -1, seen[0].shape[-1])[:, -keep:]
        log_probs = logits[:, -keep:].float().log_softmax(-1)
        return Passed(keys.float().cpu(), log_probs)


def _padded(states: Tensor, columns: int) -> Tensor:
    """Cached states [rows, heads, length, dim] with zeros in front."""
    return torch.nn.functional.pad(states, (0, 0, columns, 0)) if columns else states
