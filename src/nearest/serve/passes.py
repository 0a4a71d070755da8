"""Forward passes of rows that share a cache, on transformers' caches.

A row is one sequence. Rows of one `Batch` advance by one token a pass; shorter ones are padded at
the left. A batch takes up rows whose prompt has been read, and loses rows that have finished.
Padding is masked and positions are given, so that a row's logits do not depend on the rows beside
it but for the order in which numbers are added (about 1e-6).
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nearest.encode.hooks import captured_input
from nearest.encode.layers import KeyLayer
from nearest.errors import ModelError
from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.serve.rows_cache import RowsCache


class ReadPassage(NamedTuple):
    """A passage that a model read beside the text.

    Attributes:
        memory: its number among those of the request; `document`: its number in that memory.
        position: of its first token in the document, the start token counted.
        tokens: of the passage; `after`: of what follows it in the document, and was read too.
        distance: of a neighbour to the chunk that it was found for; None where there is none.
    """

    memory: int
    document: int
    position: int
    tokens: tuple[int, ...]
    after: tuple[int, ...] = ()
    distance: float | None = None


class Read(NamedTuple):
    """Passages that a model read beside the text, and the tokens that they were found for."""

    query: tuple[int, ...]
    passages: tuple[ReadPassage, ...]


class Passed(NamedTuple):
    """What a pass gives for the last positions of each row.

    Attributes:
        keys: float32, on the CPU.
        log_probs: float32, of the model without a memory's candidates, in nats.
        alone: as the model has them where it reads the text alone; None where it does, or where
            that is not asked.
        read: what was read beside the text, of each row and position; empty for nothing.
    """

    keys: Float[Tensor, "rows n dim"]
    log_probs: Float[Tensor, "rows n vocab"]
    alone: Float[Tensor, "rows n vocab"] | None = None
    read: Sequence[Sequence[Read | None]] = ()

    def at(self, place: int) -> "Passed":
        """One of the positions of each row."""
        one = slice(place, place + 1)
        alone = None if self.alone is None else self.alone[:, one]
        return Passed(
            self.keys[:, one], self.log_probs[:, one], alone, [row[one] for row in self.read]
        )

    def rows(self, numbers: Sequence[int]) -> "Passed":
        """Some of the rows."""
        return Passed(
            self.keys[list(numbers)],
            self.log_probs[list(numbers)],
            None if self.alone is None else self.alone[list(numbers)],
            [self.read[n] for n in numbers] if self.read else (),
        )


@runtime_checkable
class Batch(Protocol):
    """Rows that advance together, and what is kept of what they have read.

    Attributes:
        pieces: whether a prompt may be read in several pieces.
    """

    @property
    def pieces(self) -> bool: ...

    def read(self, tokens: Sequence[int], keep: int) -> Passed:
        """Go on with tokens of a prompt, in one row; the `keep` last positions are predicted."""
        ...

    def step(self, tokens: Sequence[int]) -> Passed:
        """Go on with one token a row."""
        ...

    def repeat(self, times: int) -> None:
        """One row several times, for several continuations of a prompt."""
        ...

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Forget the other rows; the numbers of the kept ones in the order that they have now."""
        ...


class Passes:
    """Runs a causal model on texts as they are.

    A model whose cache is not of plain layers runs one row at a time.
    """

    def __init__(self, model: PreTrainedModel, layer: KeyLayer) -> None:
        self.model = model
        self.layer = layer
        self.parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in self.parameters:
            raise ModelError(
                f"{type(model).__name__} takes no past_key_values, which the server keeps for each "
                "request: serve a causal model that does"
            )
        self._of_retro = isinstance(model.config, RetroConfig)
        plain = all(type(one) is DynamicLayer for one in DynamicCache(config=model.config).layers)
        self.joins = plain and "position_ids" in self.parameters
        self.pieces = self.joins or self._of_retro

    def begin(self) -> "PlainBatch":
        """One row without tokens."""
        kind = RetroCache if self._of_retro else DynamicCache
        return PlainBatch(self, kind(config=self.model.config))


class PlainBatch:
    """Rows that are read as they are."""

    def __init__(self, passes: Passes, cache: Any) -> None:
        self._passes = passes
        self._cache = cache

    @property
    def joins(self) -> bool:
        """Whether rows of other requests may advance with them."""
        return self._passes.joins

    @property
    def pieces(self) -> bool:
        """Whether a prompt may be read in several pieces."""
        return self._passes.pieces

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], keep: int) -> Passed:
        """Go on with tokens of a prompt, in one row; the `keep` last positions are predicted."""
        ids = torch.tensor([list(tokens)], device=self._passes.model.device)
        return self._pass(ids, keep)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Passed:
        """Go on with one token a row."""
        ids = torch.tensor(list(tokens), device=self._passes.model.device)[:, None]
        return self._pass(ids, 1)

    @torch.inference_mode()
    def verify(self, tokens: Sequence[Sequence[int]], least: int = 1) -> Passed:
        """Go on with a token and a draft in each row, of which `take_back` is to tell the false.

        Shorter ones, and all to a width of `least`, are filled up with tokens that are false, too.
        For rows of a shared cache.
        """
        lengths = np.array([len(own) for own in tokens])
        width = max(int(lengths.max()), least)
        ids = [[*own, *[own[-1]] * (width - len(own))] for own in tokens]
        own = np.minimum(np.arange(width), lengths[:, None] - 1)
        return self._pass(torch.tensor(ids, device=self._passes.model.device), width, own)

    def take_back(self, columns: Sequence[int]) -> None:
        """Forget so many of the last tokens of each row."""
        if any(columns):
            self._cache.take_back(columns)

    @torch.inference_mode()
    def repeat(self, times: int) -> None:
        """One row several times, for several continuations of a prompt."""
        if times > 1:
            self._cache.batch_repeat_interleave(times)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> list[int]:
        """Forget the other rows; the numbers of the kept ones in the order that they have now."""
        if isinstance(self._cache, RowsCache):
            return self._cache.keep(rows)
        chosen = torch.tensor(list(rows), device=self._passes.model.device)
        self._cache.batch_select_indices(chosen)
        return list(rows)

    def share(self) -> None:
        """Get ready to take up rows of others."""
        self._cache = RowsCache(self._cache)

    def join(self, other: "PlainBatch") -> None:
        """Take up the rows of another, whose prompt has been read."""
        self._cache.add(other._cache)

    def _pass(
        self, ids: Tensor, keep: int, own: Int[np.ndarray, "rows width"] | None = None
    ) -> Passed:
        """A pass over tokens; `own` numbers those of each row, where some are there to fill it."""
        rows, width = ids.shape
        passes, cache = self._passes, self._cache
        past, keep = int(cache.get_seq_length()), max(1, keep)
        if isinstance(cache, RowsCache):
            cache.make_room(width)
            past = int(cache.get_seq_length())
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if passes.joins:
            kept = cache.kept if isinstance(cache, RowsCache) else np.ones((rows, past), dtype=bool)
            mask = np.pad(kept, ((0, 0), (0, width)), constant_values=True)
            positions = kept.sum(axis=1)[:, None] + (np.arange(width) if own is None else own)
            arguments["attention_mask"] = torch.from_numpy(mask).long().to(ids.device)
            arguments["position_ids"] = torch.from_numpy(positions).to(ids.device)
        if "logits_to_keep" in passes.parameters:
            arguments["logits_to_keep"] = keep
        with captured_input(passes.layer.module) as seen:
            logits = passes.model(input_ids=ids, **arguments).logits
        if isinstance(cache, RowsCache):
            cache.appended(width)
        return passed(seen[0], logits, keep)


def passed(states: Tensor, logits: Tensor, keep: int) -> Passed:
    """What a pass gives, of a model's states and logits."""
    rows = len(logits)
    keys = states.reshape(rows, -1, states.shape[-1])[:, -keep:]
    return Passed(keys.float().cpu(), logits[:, -keep:].float().log_softmax(-1))
