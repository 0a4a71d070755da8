"""Where a method's settings come from, and whether what they were found on has changed since."""

import warnings
from collections.abc import Collection
from typing import Any, Literal

from nearest.errors import SettingsWarning
from nearest.memory import Memory

Origin = Literal["tuned", "self-tuned", "paper's defaults"]
SELF_TUNED = "self_tuned"  # in stored settings: found on the memory's own text


def what_keys(memory: Memory) -> str:
    """What distances are measured between; another one where keys have been compressed since."""
    keys = memory.manifest.keys
    if keys is None:
        return "none"
    merged = any(segment.kept is not None for segment in memory.manifest.segments)
    return f"{keys.format}, {keys.stored_dim} dims, {keys.metric}{', merged' if merged else ''}"


def what_index(memory: Memory) -> str:
    """How keys are searched."""
    return "none" if memory.manifest.keys is None else memory.manifest.keys.index


def found_on(memory: Memory) -> dict[str, Any]:
    """What is stored with settings, so that a later change can be told."""
    return {"tuned_keys": what_keys(memory), "tuned_index": what_index(memory)}


def origin(memory: Memory, method: str) -> Origin:
    """Which settings of a method are in use where none are given."""
    stored = memory.settings(method)
    if not stored:
        return "paper's defaults"
    return "self-tuned" if stored.get(SELF_TUNED) else "tuned"


def changed_since(memory: Memory, method: str) -> list[str]:
    """What has changed since a method's settings were found, as parts of a sentence."""
    stored, manifest = memory.settings(method), memory.manifest
    before = {**found_on(memory), **stored}
    changes = []
    if before["tuned_keys"] != what_keys(memory):
        changes.append(f"keys changed from {before['tuned_keys']} to {what_keys(memory)}")
    elif before["tuned_index"] != what_index(memory):
        changes.append(f"the index changed from {before['tuned_index']} to {what_index(memory)}")
    elif memory.settings_stale(method) == "keys":
        changes.append("keys or index were made anew")
    if manifest.tuned_at.get(method, manifest.documents_of) < manifest.documents_of:
        changes.append("documents were added or removed")
    return changes


def warn_of_settings(memory: Memory, method: str, given: Collection[str]) -> None:
    """Warn (`SettingsWarning`) of settings that are the paper's defaults, or out of date.

    `given` names the settings that are chosen for this call.
    """
    base, _, gate = method.partition("+")
    cure = f"nearest tune {memory.path} --method {base}{f' --gate {gate}' if gate else ''} --text …"
    if origin(memory, method) == "paper's defaults":
        if not {"lam", "temperature"} <= set(given):
            warnings.warn(
                f"{memory.path} was not tuned for {method}: λ and temperature are the paper's "
                f"defaults, which suit few models. Tune it on held-out text: {cure}",
                SettingsWarning,
                stacklevel=2,
            )
        return
    if changes := changed_since(memory, method):
        warnings.warn(
            f"since {memory.path} was tuned for {method}, {' and '.join(changes)}: its settings "
            f"may not suit any more. Tune it again: {cure}",
            SettingsWarning,
            stacklevel=2,
        )
