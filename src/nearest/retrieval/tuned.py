"""Warn where a memory was not tuned for a method, or has changed since it was."""

from collections.abc import Collection

from nearest.errors import SettingsWarning, warn_caller
from nearest.memory import Memory
from nearest.retrieval.settings import tuning_options


def warn_of_settings(memory: Memory, method: str, given: Collection[str]) -> None:
    """Warn (`SettingsWarning`) of settings that are the paper's defaults, or out of date.

    `given` names the settings that are chosen for this call.
    """
    cure = f"nearest tune {memory.path} {tuning_options(method)} --text …"
    if memory.settings_from(method) == "defaults":
        if not {"lam", "temperature"} <= set(given):
            warn_caller(
                f"{memory.path} was not tuned for {method}: λ and temperature are the paper's "
                f"defaults, which suit few models. Tune it on held-out text: {cure}",
                SettingsWarning,
            )
        return
    if changed := memory.changed_since_tuning(method):
        warn_caller(
            f"since {memory.path} was tuned for {method}, {' and '.join(changed.values())}: its "
            f"settings may not suit any more. Tune it again: {cure}",
            SettingsWarning,
        )
