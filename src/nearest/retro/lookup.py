"""A model that looks the neighbours of whatever it reads up by itself."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from nearest.retro.generation import Retrieve, gather_neighbours
from nearest.retro.reading import layout_of, neighbour_chunks


@contextmanager
def looking_up(model: PreTrainedModel, neighbours: Retrieve) -> Iterator[PreTrainedModel]:
    """While it lasts, passes and `generate` get neighbours from a callable where none are given.

    So whatever reads a Hugging Face model reads it with its neighbours: lm-evaluation-harness, a
    token memory that is built or attached. A pass that goes on from a cache by itself, outside
    `generate`, cannot know the chunk it is in and gets none.

    Args:
        model: RETRO or RETROfit; it is given back as it was.
        neighbours: as `generate` takes it; see `NeighbourCache`.
    """
    reader: Any = model
    forward, generate = reader.forward, reader.generate
    before = {name: vars(reader).get(name) for name in ("forward", "generate")}

    @functools.wraps(forward)
    def read(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *others: Any,
        neighbour_ids: Tensor | None = None,
        **named: Any,
    ) -> Any:
        cache = named.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        if neighbour_ids is None and not seen and not others:
            config = reader.retro_config
            layout = layout_of(config, input_ids, attention_mask, None)
            needed = neighbour_chunks(config, layout)
            neighbour_ids = gather_neighbours(input_ids, layout, needed, None, neighbours)
        return forward(input_ids, attention_mask, *others, neighbour_ids=neighbour_ids, **named)

    @functools.wraps(generate)
    def write(*given: Any, **named: Any) -> Any:
        if named.get("neighbour_ids") is None:
            named.setdefault("neighbours", neighbours)
        return generate(*given, **named)

    reader.forward, reader.generate = read, write
    try:
        yield model
    finally:
        for name, original in before.items():
            delattr(reader, name)
            if original is not None:  # another had put its own there
                setattr(reader, name, original)
