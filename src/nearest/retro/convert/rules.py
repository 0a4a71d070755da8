"""Rename and re-cut weights by rules: what they say of ours and theirs holds in both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nearest.errors import ModelError, SettingError
from nearest.retro.config import RetroConfig
from nearest.retro.model import RetroForCausalLM


class Rule(NamedTuple):
    """The rows of our tensors, one after another, are the rows of theirs.

    Where theirs are several they are of one size.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


def same(ours: str, theirs: str) -> Rule:
    """One tensor that only has two names."""
    return Rule((ours,), (theirs,))


def load(
    state: Mapping[str, Tensor], config: RetroConfig, rules: Iterable[Rule], ignored: set[str]
) -> RetroForCausalLM:
    """A model of these settings with their weights.

    Layers that memorize, which no public model has, start anew.

    Raises:
        ModelError: keys are missing or left over (all are named), or a shape does not fit.
        SettingError: settings that the public weights do not fit.
    """
    rules = list(rules)
    expected = {name for rule in rules for name in rule.theirs}
    missing, extra = sorted(expected - set(state)), sorted(set(state) - expected - ignored)
    if missing or extra:
        raise ModelError(
            "the checkpoint does not fit: "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("missing", missing), ("left over", extra))
                if names
            )
            + ". Give the whole state dict of one model"
        )
    model = RetroForCausalLM(config)
    own = model.state_dict()
    loaded = {name: weight for name, weight in own.items() if ".memorizing." in name}
    if unlike := sorted(own.keys() ^ {*loaded, *(name for rule in rules for name in rule.ours)}):
        raise SettingError(
            f"the settings ask for another model than the public one: they differ in {unlike[0]}; "
            "give only what weights do not tell, such as chunk_size"
        )
    for rule in rules:
        rows = torch.cat([state[name] for name in rule.theirs])
        shapes = [own[name].shape for name in rule.ours]
        height = sum(shape[0] for shape in shapes)
        if any(rows.shape != (height, *shape[1:]) for shape in shapes):
            raise ModelError(
                f"{' + '.join(rule.theirs)} has the shape {tuple(rows.shape)}, where these "
                f"settings need {(height, *shapes[0][1:])}: check the vocabulary and dimensions"
            )
        parts = rows.split([shape[0] for shape in shapes])
        loaded.update(zip(rule.ours, parts, strict=True))
    model.load_state_dict(loaded)
    model.train(False)
    return model


def save(model: RetroForCausalLM, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """A model's weights under their names."""
    own = model.state_dict()
    renamed = {}
    for rule in rules:
        rows = torch.cat([own[name] for name in rule.ours])
        for name, part in zip(rule.theirs, rows.chunk(len(rule.theirs)), strict=True):
            renamed[name] = part.detach().clone()
    return renamed


def check_family(config: RetroConfig, family: RetroConfig, free: set[str]) -> None:
    """Refuse a model whose settings, but for sizes and `free` ones, are not a family's."""
    free = {*free, "zero_init_retrieval"}  # of new weights alone
    for name in RetroConfig.__annotations__:
        setting = getattr(family, name)
        structural = isinstance(setting, bool | str) or name in (
            "masked_score",
            "memorizing_layers",
        )
        if structural and name not in free and getattr(config, name) != setting:
            raise SettingError(
                f"{name} is {getattr(config, name)!r}, but the public code knows only {setting!r}: "
                "this model cannot be written in its format"
            )


def check_vocabulary(config: RetroConfig, vocab_size: int | None) -> None:
    """Refuse a checkpoint of another vocabulary than is wanted (ModelError)."""
    if vocab_size not in (None, config.vocab_size):
        raise ModelError(
            f"the checkpoint has a vocabulary of {config.vocab_size} tokens, not {vocab_size}: it "
            "belongs to another tokenizer"
        )


def shape_of(state: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of a weight without which nothing can be told (ModelError)."""
    if name not in state:
        raise ModelError(
            f"the checkpoint does not fit: missing {name}. Give the whole state dict of one model"
        )
    return state[name].shape


def layers_of(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The layer numbers in names that start with a pattern."""
    return sorted({int(found[1]) for name in state if (found := re.match(pattern, name))})
