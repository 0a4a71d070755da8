"""Lend chosen layers of a Hugging Face decoder a memory of the segments before.

The model computes its local attention as ever; the memory is mixed in where the model calls its
attention function, which transformers lets one register, so no architecture has to be known.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nearest.errors import ModelError, SettingError
from nearest.models.memorizing.attention import MemorizingAttention
from nearest.models.memorizing.decoder import DecoderMemory, Pairs
from nearest.models.memorizing.memory import AttentionMemory, KeyIndex

_NAME = "nearest_memorizing"


class MemorizingSession:
    """The memory of a model's layers, and the gates to be trained.

    Attributes:
        gates: a MemorizingAttention for each layer, in order; its one parameter is the gate.
        memory: what the layers remember; None before the first `remember`.
    """

    def __init__(self, gates: nn.ModuleList, capacity: int, index: KeyIndex | None) -> None:
        self.gates = gates
        self.memory: DecoderMemory | None = None
        self._capacity = capacity
        self._index = index
        self._segment: list[Pairs | None] = [None] * len(gates)

    def remember(
        self,
        attention_mask: Bool[Tensor, "_ _"] | Int[Tensor, "_ _"] | None = None,
        ended: Bool[Tensor, " _"] | Int[Tensor, " _"] | None = None,
    ) -> None:
        """Make the latest forward pass, a whole segment, part of the memory.

        Args:
            attention_mask: 1 at tokens, 0 at padding, as the pass had it.
            ended: rows whose document ends here; they forget everything.

        Raises:
            ModelError: no pass was made since the last call, it continued a key-value cache, or
                its batch is not the memory's.
        """
        segment = [pairs for pairs in self._segment if pairs is not None]
        if len(segment) < len(self._segment):
            raise ModelError(
                "there is no segment to remember: call the model on one first, from its first "
                "token (a pass that continues a key-value cache is no segment)"
            )
        memory = self.memory or self._nothing(segment)
        memory = memory.extended(segment, attention_mask)
        self.memory = memory if ended is None else memory.cleared(ended)
        self._segment = [None] * len(self._segment)

    def forget(self) -> None:
        """Forget everything, so that a batch of another size can begin."""
        self.memory = None

    def _nothing(self, segment: Sequence[Pairs]) -> DecoderMemory:
        """Memories of nothing, of the sizes that a segment's pairs have."""
        return DecoderMemory(
            tuple(
                AttentionMemory.empty(
                    keys.shape[0],
                    keys.shape[1],
                    keys.shape[3],
                    self._capacity,
                    value_dim=values.shape[3],
                    index=self._index,
                    dtype=keys.dtype,
                    device=keys.device,
                )
                for keys, values in segment
            )
        )

    def attend(
        self,
        i: int,
        queries: Float[Tensor, "batch heads q dim"],
        keys: Float[Tensor, "batch kv_heads length dim"],
        values: Float[Tensor, "batch kv_heads length value_dim"],
        local: Float[Tensor, "batch q heads value_dim"],
    ) -> Float[Tensor, "batch q heads value_dim"]:
        """Mix layer i's memory into its local attention, and keep the segment for `remember`."""
        whole = queries.shape[2] == keys.shape[2]
        self._segment[i] = (keys.detach(), values.detach()) if whole else None
        if self.memory is None:
            return local
        layer, memory = cast(MemorizingAttention, self.gates[i]), self.memory.layers[i]
        return layer.mixed(queries, local.transpose(1, 2), memory).transpose(1, 2)


@contextmanager
def memorize(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    k: int | None = 32,
    capacity: int = 8192,
    initial_gate: float = 0.5,
    index: KeyIndex | None = None,
) -> Iterator[MemorizingSession]:
    """Let layers of a decoder attend to earlier segments of the same document. arXiv:2203.08913.

    Each forward pass is a segment, one row of the batch a document; nothing is remembered until
    `session.remember()` says that the segment is over::

        with memorize(model, layers=[8], k=32) as session:
            for ids, mask, ended in segments:
                loss = model(input_ids=ids, attention_mask=mask).loss
                loss.backward()
                session.remember(mask, ended)

    Keys are the model's own, so they are not normalised; before the first `remember`, and after
    leaving, the model is what it was. `session.gates.parameters()` are the new weights. Call
    backward before `remember`: checkpointing repeats the pass, and needs the memory that it had.

    Args:
        model: a decoder whose attention is computed by one of transformers' attention functions.
        layers: numbers of the layers, from 0; the paper takes one near the top (9th of 12).
        k: pairs each query attends to in each head; None for all.
        capacity: pairs kept for each row.
        initial_gate: of every head, in (0, 1).
        index: as in AttentionMemory.

    Raises:
        ModelError: the model has no such layers, or computes attention in its own eager code.
        SettingError: a setting is outside its range.
    """
    if capacity < 1:
        raise SettingError(f"capacity must be at least 1 pair a row, got {capacity}")
    modules = [_attention_of(model, number) for number in layers]
    if not modules or len(set(layers)) != len(layers):
        raise SettingError(f"give each layer once, and at least one: got {list(layers)}")
    gates = nn.ModuleList(
        MemorizingAttention(
            module.config.num_attention_heads,
            module.head_dim,
            k=k,
            initial_gate=initial_gate,
            normalise=False,
            scale=module.scaling,
        ).to(next(module.parameters()).device)
        for module in modules
    )
    session = MemorizingSession(gates, capacity, index)
    with ExitStack() as undo:
        for i, module in enumerate(modules):
            undo.enter_context(_attention_replaced(module, session, i))
        yield session


def _attention_of(model: PreTrainedModel, number: int) -> Any:
    """The self-attention of one decoder layer, found by the number that caching gives it."""
    found = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) == number
        and hasattr(module, "scaling")
        and hasattr(module, "head_dim")
        and getattr(module, "is_causal", False)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} causal attention layers number {number} that "
            "use transformers' attention functions, and one is needed: choose another layer or "
            "model"
        )
    return found[0]


@contextmanager
def _attention_replaced(module: Any, session: MemorizingSession, i: int) -> Iterator[None]:
    """Give one layer its own attention function, through a configuration of its own."""
    config = module.config
    implementation = config._attn_implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise ModelError(
            f"the model computes attention as {implementation!r}, in code of its own: load it with "
            "attn_implementation='sdpa'"
        )
    name = f"{_NAME}_{id(module)}"
    ALL_ATTENTION_FUNCTIONS[name] = _memorizing(ALL_ATTENTION_FUNCTIONS[implementation], session, i)
    module.config = copy.copy(config)
    module.config._attn_implementation = name
    try:
        yield
    finally:
        module.config = config
        del ALL_ATTENTION_FUNCTIONS[name]


def _memorizing(
    attention: Callable[..., tuple[Tensor, Tensor | None]], session: MemorizingSession, i: int
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function as transformers calls it: the model's own, then the memory."""

    def attend(
        module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        local, weights = attention(module, queries, keys, values, *args, **kwargs)
        return session.attend(i, queries, keys, values, local), weights

    return attend
