"""The frozen base of a RETROfit as the encoder of neighbours: it reads each as a text of its own.

A new layer makes keys of the base's states at a neighbour's tokens, as the block before that
layer leaves them, and values of the embeddings of the tokens that follow. Queries are states of the
same block, and all begin as they are: at first a layer finds what kNN-LM (arXiv:1911.00172) finds
among the tokens of a chunk's own neighbours, and training has to learn what to make of it.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from nearest.encode.hooks import of_this_thread, unseen
from nearest.errors import SettingError
from nearest.retro.chunked import ChunkedCrossAttention, Encoded
from nearest.retro.config import RetroConfig
from nearest.retro.norms import make_norm

_SHARPNESS = 24.0  # scores begin as so many times the cosine of two states


class _StatesReachedError(Exception):
    """Ends a pass over neighbours where no new layer needs the blocks above."""


class NextTokenAttention(ChunkedCrossAttention):
    """Compares states of the base, and finds the tokens that came next."""

    def __init__(self, config: RetroConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.state_norm = make_norm(config.norm, config.decoder_dim, config.gated_norm)
        self.token_norm = make_norm(config.norm, config.decoder_dim, config.gated_norm)
        keys, values = self.kv.weight.chunk(2)
        with torch.no_grad():
            for weight in (self.q.weight, keys):
                nn.init.eye_(weight).mul_((_SHARPNESS / self.head_dim / self.scale) ** 0.5)
            nn.init.eye_(values)

    def _of(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        assert encoded.following is not None
        keys, values = self.kv.weight.chunk(2)
        states = self.state_norm(encoded.states[self.layer])
        following = self.token_norm(encoded.following)
        return self.split(states @ keys.mT), self.split(following @ values.mT)


def read_as_texts(
    base: PreTrainedModel,
    blocks: Mapping[int, nn.Module],
    embed: Callable[[Tensor], Tensor],
    ids: Int[Tensor, "batch chunks neighbours length"],
    seen: Bool[Tensor, "batch chunks neighbours length"],
) -> Encoded:
    """What new layers attend to, of neighbours that the base reads one by one, each of them once.

    Args:
        base: a causal model. blocks: those with a new layer after them, by its number.
        embed: ids → vectors of the tokens that follow.
        ids: of the neighbours. seen: which are no padding.

    Raises:
        SettingError: a neighbour is longer than what the base reads.
    """
    length, most = ids.shape[-1], getattr(base.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise SettingError(
            f"neighbours of {length} tokens exceed the {most} positions of the model that is to "
            "read them: take fewer continuations, or fit it with encoder='own'"
        )
    texts, places = ids.masked_fill(~seen, -1).flatten(0, 2).unique(dim=0, return_inverse=True)
    read = texts >= 0
    read[:, 0] |= ~read.any(1)  # of nothing but padding something, which nobody attends to
    states: dict[int, Tensor] = {}
    with torch.no_grad(), unseen(), ExitStack() as hooks, suppress(_StatesReachedError):
        for number, block in blocks.items():
            keep = _keeping(states, number, last=number == max(blocks))
            hooks.callback(block.register_forward_hook(keep).remove)
        base.base_model(texts.clamp(min=0), attention_mask=read.long(), use_cache=False)
    shape = (*ids.shape[:2], -1)
    return Encoded(
        {
            number: found[places].reshape(*shape, found.shape[-1])
            for number, found in states.items()
        },
        embed(F.pad(ids[..., 1:], (0, 1)).clamp(min=0)).flatten(2, 3),
        (seen & F.pad(seen[..., 1:], (0, 1))).reshape(shape),
    )


def _keeping(states: dict[int, Tensor], number: int, last: bool) -> Callable[..., None]:
    """A hook that keeps what a block returns: states, or a tuple that begins with them."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        states[number] = output[0] if isinstance(output, tuple) else output
        if last:
            raise _StatesReachedError

    return of_this_thread(hook)
