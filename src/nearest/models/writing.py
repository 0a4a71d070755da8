"""Write with passages of a memory before the text, which are chosen anew as it grows."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from nearest.encode.identity import input_device, max_positions
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.attach import Session
from nearest.models.generated import generation_option
from nearest.models.in_context import PassageChooser
from nearest.models.sources import TokenSources
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.settings import method_named, resolve_settings
from nearest.store.tuned import SettingsFrom

_ONE_TEXT = ("num_beams", "num_return_sequences")


def write_with_passages(
    model: PreTrainedModel,
    memories: Sequence[Memory],
    method: str,
    text: Sequence[int],
    arguments: dict[str, Any],
    *,
    settings: dict[str, Any],
    new_tokens: int,
    session: dict[str, Any],
    replay: int = 0,
    sources: bool = False,
    show: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], list[TokenSources], SettingsFrom]:
    """New tokens after a text, where each came from, and where the settings did.

    Whenever passages are chosen, they and the whole text are read anew. What a method carries from
    token to token is then made again for the tokens that were written, and for `replay` of those
    before.

    Args:
        model, memories: the model that built the one memory.
        method: "in-context", alone or with another.
        text: token ids, the start token first.
        arguments: of `model.generate`.
        settings: single ones of the method; else as tuned.
        new_tokens: to be written, at most.
        session: tokenizer, force and draft, as of `attach`.
        replay: positions of the text that are looked up before its last.
        sources: whether they are named.
        show: given all tokens written so far, whenever there are more.

    Raises:
        SettingError: more than one text is asked for, or the model's positions do not suffice.
    """
    if several := [name for name in _ONE_TEXT if (arguments.get(name) or 1) > 1]:
        raise SettingError(
            f"with passages one text is written at a time, and {several[0]} asks for more: leave "
            "it out, or use a method without in-context"
        )
    memory = memories[0]
    chosen = resolve_settings(method, memory, **settings)
    chooser = PassageChooser.of(memories, model, chosen)
    stops = np.ravel(generation_option(model, arguments, "eos_token_id") or []).tolist()
    written: list[int] = []
    named: list[TokenSources] = []
    attached = _attached(model, memories, method, settings, session)
    with attached or nullcontext():
        while len(written) < new_tokens:
            all_tokens = np.array([*text, *written], dtype=np.int64)
            last = len(all_tokens) - 1
            at = chooser.chosen_at(last)
            front = chooser.before(all_tokens, at)
            count = min(at + chosen.passage_stride - last, new_tokens - len(written))
            _check_room(model, len(front), len(all_tokens), count)
            inputs = torch.from_numpy(np.concatenate([front, all_tokens]))[None]
            inputs = inputs.to(input_device(model))
            if attached is not None:
                attached.replay = min(last, replay + len(written))
            output = model.generate(  # type: ignore[operator]
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **{**arguments, "max_new_tokens": count},
            )
            new = output[0, inputs.shape[1] :].tolist()
            written += new
            if sources and attached is not None:
                named += attached.sources(0)
            elif sources:
                named += [TokenSources(token, 0.0, []) for token in new]
            if show is not None:
                show(written)
            if len(new) < count or new[-1] in stops:
                break
    return written, named, memory.settings_from(method)


def _attached(
    model: PreTrainedModel,
    memories: Sequence[Memory],
    method: str,
    settings: dict[str, Any],
    session: dict[str, Any],
) -> Session | None:
    if not method_named(method).kinds:
        return None
    return Session(model, Ensemble.of(memories, method, **settings), **session)


def _check_room(model: PreTrainedModel, front: int, text: int, count: int) -> None:
    positions = max_positions(model)
    if positions is not None and front + text + count > positions:
        raise SettingError(
            f"{front} tokens of passages, {text} of text and {count} new ones exceed the model's "
            f"{positions} positions: shorten the prompt, ask for fewer, or give fewer or shorter "
            "passages (--passages, --passage-tokens)"
        )
