"""Forward passes of rows that share a cache, on transformers' caches.

A row is one sequence. Rows of one `Batch` advance by one token a pass; shorter ones are padded at
the left. A batch takes up rows whose prompt has been read, and loses rows that have finished.
Padding is masked and positions are given, so that a row's logits do not depend on the rows beside
it but for the order in which numbers are added (about 1e-6).
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nearest.encode.hooks import captured_input
from nearest.encode.layers import KeyLayer
from nearest.errors import ModelError
from nearest.serve.rows_cache import RowsCache


class Passed(NamedTuple):
    """What a pass gives for the last positions of each row."""

    keys: Float[Tensor, "rows n dim"]  # float32, on the CPU
    log_probs: Float[Tensor, "rows n vocab"]  # float32, of the model alone, in nats


class Batch:
    """Rows that advance together, and their cache."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        """Columns that a pass sees."""
        return int(self.cache.get_seq_length())

    @property
    def padding(self) -> list[int]:
        """Columns before each row's own; of one sequence there are none."""
        return self.cache.padding if isinstance(self.cache, RowsCache) else [0]


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
        return Batch(DynamicCache(config=self.model.config))

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

    def join(self, batch: Batch | None, one: Batch) -> Batch:
        """A batch, None for a new one, with the row of another."""
        if batch is None:
            return Batch(RowsCache(one.cache))
        batch.cache.add(one.cache)
        return batch

    @torch.inference_mode()
    def repeat(self, batch: Batch, times: int) -> Batch:
        """One row several times, for several continuations of a prompt."""
        if times > 1:
            batch.cache.batch_repeat_interleave(times)
        return batch

    @torch.inference_mode()
    def keep(self, batch: Batch, rows: Sequence[int]) -> list[int]:
        """Forget the other rows; the numbers of the kept ones in the order that they have now."""
        if isinstance(batch.cache, RowsCache):
            return batch.cache.keep(rows)
        batch.cache.batch_select_indices(torch.tensor(list(rows), device=self.model.device))
        return list(rows)

    def _pass(self, batch: Batch, ids: Tensor, keep: int) -> Passed:
        rows, width = ids.shape
        past, grows = batch.length, isinstance(batch.cache, RowsCache)
        if grows:
            batch.cache.make_room(width)
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
        if grows:
            batch.cache.appended(width)
        keys = seen[0].reshape(rows, -1, seen[0].shape[-1])[:, -keep:]
        log_probs = logits[:, -keep:].float().log_softmax(-1)
        return Passed(keys.float().cpu(), log_probs)
