"""Write with passages of a memory before the text, which are chosen anew as it grows."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StopStringCriteria

from nearest.build.match import check_tokenizer
from nearest.encode.identity import input_device, max_positions
from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.models.attach import Session
from nearest.models.generated import generation_option, stop_tokens
from nearest.models.in_context import PassageChooser
from nearest.models.sources import TokenSources
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.settings import method_named, resolve_settings
from nearest.store.tuned import SettingsFrom

_ONE_TEXT = ("num_beams", "num_return_sequences")
# What counts from where a text begins, or says how it ends.
_WHOLE_TEXT = (
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_eos_token_id",
    "max_time",
    "stopping_criteria",
)


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
    weights: Sequence[float] | None = None,
    first_arguments: dict[str, Any] | None = None,
    replay: int = 0,
    sources: bool = False,
    show: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], list[TokenSources], SettingsFrom]:
    """New tokens after a text, where each came from, and where the settings did.

    Whenever passages are chosen, they and the whole text are read anew, by another call of
    `model.generate`; where the model's positions do not suffice, the oldest of the text gives way.
    What a method carries from token to token is then made again for the tokens that were written,
    and for `replay` of those before.

    Args:
        model, memories: the model that built the one memory.
        method: "in-context", alone or with another.
        text: token ids, the start token first.
        arguments: of `model.generate`.
        settings: single ones of the method; else as tuned.
        new_tokens: to be written, at most.
        session: tokenizer, force and draft, as of `attach`.
        weights: of the memories.
        first_arguments: of the first call of `model.generate` alone.
        replay: positions of the text that are looked up before its last.
        sources: whether they are named.
        show: given all tokens written so far, whenever there are more.

    Raises:
        SettingError: more than one text is asked for, an option is of texts that one call writes,
            or the model's positions do not hold the passages.
        ModelError: model or tokenizer do not fit the memory.
    """
    if several := [name for name in _ONE_TEXT if (arguments.get(name) or 1) > 1]:
        raise SettingError(
            f"with passages one text is written at a time, and {several[0]} asks for more: leave "
            "it out, or use a method without in-context"
        )
    if whole := [name for name in _WHOLE_TEXT if generation_option(model, arguments, name)]:
        raise SettingError(
            f"with passages a text is written in pieces, and {whole[0]} would be of each: leave it "
            "out, or use a method without in-context"
        )
    memory = memories[0]
    chosen = resolve_settings(method, memory, **settings)
    chooser = PassageChooser.of(memories, model, chosen)
    stops = stop_tokens(model, arguments)
    least = max(
        generation_option(model, arguments, "min_new_tokens") or 0,
        (generation_option(model, arguments, "min_length") or 0) - len(text),
    )
    lengths = ("min_length", "max_length")  # of a text, without passages
    arguments = {name: value for name, value in arguments.items() if name not in lengths}
    strings = generation_option(model, arguments, "stop_strings")
    ended = StopStringCriteria(session["tokenizer"], strings) if strings else None
    written: list[int] = []
    named: list[TokenSources] = []
    attached = None
    if method_named(method).kinds:
        attached = Session(model, Ensemble.of(memories, method, weights, **settings), **session)
    elif not session.get("force"):
        check_tokenizer(memory, session["tokenizer"])
    positions, first = max_positions(model), first_arguments or {}
    with attached or nullcontext():
        while len(written) < new_tokens:
            all_tokens = np.array([*text, *written], dtype=np.int64)
            last = len(all_tokens) - 1
            at = chooser.chosen_at(last)
            front = chooser.before(all_tokens, at)
            count = min(at + chosen.passage_stride - last, new_tokens - len(written))
            # The last new token is not read.
            room = len(all_tokens) if positions is None else positions - len(front) - count + 1
            kept = all_tokens[-room:]
            inputs = torch.from_numpy(np.concatenate([front, kept]))[None]
            inputs = inputs.to(input_device(model))
            if attached is not None:
                attached.replay = min(len(kept) - 1, replay + len(written))
            output = model.generate(  # type: ignore[operator]
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **{
                    **arguments,
                    **({} if written else first),
                    "min_new_tokens": max(0, min(count, least - len(written))),
                    "max_new_tokens": count,
                },
            )
            new = output[0, inputs.shape[1] :].tolist()
            written += new
            if sources and attached is not None:
                named += attached.sources(0)
            elif sources:
                named += [TokenSources(token, 0.0, []) for token in new]
            if show is not None:
                show(written)
            if len(new) < count or new[-1] in stops or (ended and bool(ended(output, None))):
                break
    return written, named, memory.settings_from(method)
