"""What `generate` needs beyond transformers' own: neighbours for each chunk as it ends."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin

from nearest.errors import SettingError
from nearest.retro.cache import RetroCache
from nearest.retro.config import RetroConfig
from nearest.retro.layout import ChunkLayout
from nearest.retro.reading import check_dtype, layout_of, neighbour_chunks

Retrieve = Callable[[Tensor], Tensor]
"""(chunks, m) token ids → (chunks, neighbours, length) token ids, padded."""


_OURS = ("neighbours", "neighbour_ids", "memory")  # what generate takes besides transformers' own


class RetroGenerationMixin(GenerationMixin):
    """`generate` with `neighbours`, a callable, and `neighbour_ids` of the prompt's first chunks.

    The callable gets (n, m) token ids of chunks, no two alike, and returns (n, neighbours, length)
    token ids padded with −1 or the padding token: `NeighbourCache` keeps it from being asked twice.
    Chunks that neither gives neighbours for have none. Without both, retrieval is off.
    """

    retro_config: RetroConfig  # settings of chunks and neighbours

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, *others: Any, **named: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat the rows of a memory as transformers repeats those of tensors, for beams."""
        expand = cast(Any, super())._expand_inputs_for_generation
        input_ids, model_kwargs = expand(expand_size, *others, **named)
        if (memory := model_kwargs.get("memory")) is not None and expand_size > 1:
            rows = torch.arange(len(memory.lengths)).repeat_interleave(expand_size)
            model_kwargs["memory"] = memory.rows(rows)
        return input_ids, model_kwargs

    def _get_candidate_generator(  # type: ignore[override]
        self, generation_config: GenerationConfig, *, model_kwargs: dict[str, Any], **named: Any
    ) -> Any:
        """An assistant model drafts without neighbours and memory: what is accepted is the same."""
        if generation_config.assistant_early_exit is not None:
            raise SettingError(
                "a model with neighbours cannot leave its own layers early: give an "
                "assistant_model, or prompt_lookup_num_tokens, instead of assistant_early_exit"
            )
        plain = {name: value for name, value in model_kwargs.items() if name not in _OURS}
        make = cast(Any, super())._get_candidate_generator
        return make(generation_config=generation_config, model_kwargs=plain, **named)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *others: Any,
        **named: Any,
    ) -> Any:
        """Where transformers would make its dynamic cache, make one of ours."""
        if generation_config.cache_implementation is not None:
            raise SettingError(
                f"cache_implementation {generation_config.cache_implementation!r} is none for "
                "models with neighbours, which have a cache of their own: leave it out"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RetroCache(cast(Any, self).config)
            return None
        prepare = cast(Any, super())._prepare_cache_for_generation
        return prepare(generation_config, model_kwargs, *others, **named)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "batch n"],
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        neighbour_ids: Tensor | None = None,
        neighbours: Retrieve | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of the next pass, with neighbours of the chunks that end in it."""
        inputs: dict[str, Any] = cast(Any, super()).prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        columns = inputs["input_ids"].shape[1]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:  # transformers found no padding: a generated token is none
            attention_mask = input_ids.new_ones(len(input_ids), seen + columns)
            inputs["attention_mask"] = attention_mask
        if neighbours is None and neighbour_ids is None:
            return inputs
        if input_ids.shape[1] < seen + columns:
            raise SettingError(
                f"only {input_ids.shape[1]} of {seen + columns} tokens are given, too few to look "
                "chunks up: pass the whole sequence, and no prefill_chunk_size"
            )
        config = self.retro_config
        layout = layout_of(config, inputs["input_ids"], attention_mask, past_key_values)
        needed = neighbour_chunks(config, layout)
        inputs["neighbour_ids"] = gather_neighbours(
            input_ids, layout, needed, neighbour_ids, neighbours
        )
        return inputs


def _checked(given: Tensor, rows: int) -> Tensor:
    """Neighbours of the first chunks, as given to `generate`; SettingError where they do not fit.

    How many chunks they are for is free.
    """
    if given.ndim != 4 or len(given) != rows:
        raise SettingError(
            f"neighbour_ids have the shape {tuple(given.shape)}, but must be (batch, chunks, "
            f"neighbours, length) = ({rows}, …)"
        )
    check_dtype(given)
    return given


def gather_neighbours(
    input_ids: Int[Tensor, "batch n"],
    layout: ChunkLayout,
    needed: int,
    given: Tensor | None,
    retrieve: Retrieve | None,
) -> Int[Tensor, "batch needed neighbours length"]:
    """Neighbours of the chunks that end in a pass: given, else retrieved, else padding."""
    known = 0 if given is None else _checked(given, len(input_ids)).shape[1]
    found: dict[tuple[int, int], Tensor] = {}
    wanted: list[tuple[int, int]] = []
    m = layout.chunk_size
    for row, (past, finished) in enumerate(zip(layout.past, layout.finished, strict=True)):
        for i in range(finished):
            number = past // m + i
            if given is not None and number < known:
                found[row, i] = given[row, number]
            else:
                wanted.append((row, i))
    if wanted and retrieve is not None:
        first = [layout.starts[row] + (layout.past[row] // m + i) * m for row, i in wanted]
        chunks = torch.stack(
            [input_ids[row, f : f + m] for (row, _), f in zip(wanted, first, strict=True)]
        )
        keys = [tuple(chunk) for chunk in chunks.tolist()]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        unique = chunks.new_tensor(list(numbers))  # in the order of the text
        answers = retrieve(unique)
        if not isinstance(answers, Tensor) or answers.ndim != 3 or len(answers) != len(unique):
            what = getattr(answers, "shape", type(answers).__name__)
            raise SettingError(
                f"neighbours(…) gave {what} for {len(unique)} chunks: it must return a tensor of "
                "token ids, (chunks, neighbours, length)"
            )
        check_dtype(answers)
        which = [numbers[key] for key in keys]
        found.update(zip(wanted, answers.to(input_ids.device)[which], strict=True))
    shapes = {tuple(ids.shape) for ids in found.values()}
    if len(shapes) > 1:
        raise SettingError(
            f"neighbours have the shapes {sorted(shapes)}: give and retrieve as many for every "
            "chunk, padded to one length"
        )
    shape = shapes.pop() if shapes else (1, 1) if given is None else tuple(given.shape[2:])
    ids = input_ids.new_full((len(input_ids), needed, *shape), -1)
    for (row, i), tokens in found.items():
        ids[row, i] = tokens
    return ids
