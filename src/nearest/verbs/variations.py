"""The points of a sweep: each method at every value of the setting that controls searching."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nearest.errors import SettingError
from nearest.memory import Memory
from nearest.retrieval.gates.stored import load_gate
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.search_cache import Search
from nearest.retrieval.settings import (
    BASE,
    IN_CONTEXT,
    MEMORY_METHODS,
    Settings,
    check_method,
    check_settings,
    method_named,
    passage_settings,
    resolve_settings,
)

MIN_KNNS = (1.0, 2.0, 5.0, 20.0, 100.0, float("inf"))
SKIPS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
KNN = "knn"  # has no such setting, and is compared to leaving its searches out at random


class Variation(NamedTuple):
    """A method at one value of what is varied; no setting where nothing is.

    `lookup` is None where the model reads passages and nothing else is looked up.
    """

    method: str
    setting: str | None
    value: float | None
    settings: Settings
    lookup: Lookup | None

    @property
    def passages(self) -> Settings | None:
        """What the passages before the text depend on, nothing else; None without any."""
        if not method_named(self.method).in_context:
            return None
        return Settings(**passage_settings(self.settings))


def default_methods(memory: Memory) -> list[str]:
    """The methods that the memory was tuned for, or all that need no gate.

    None that reads passages: each way to read them is another pass of the model.
    """
    has_keys = memory.manifest.keys is not None
    usable = [name for name in MEMORY_METHODS if has_keys or not _searches(name)]
    gateless = [name for name in usable if method_named(name).gate is None]
    ready = [name for name in usable if name in gateless or memory.gate(name) is not None]
    return [name for name in ready if memory.settings(name)] or gateless


def checked_methods(methods: Sequence[str]) -> list[str]:
    """The methods that use the memory; the base model is part of every sweep.

    Raises:
        SettingError: one is unknown or named twice, or there is none.
    """
    for name in methods:
        check_method(name)
    names = [name for name in methods if name != BASE]
    if not names or len(set(names)) != len(names):
        raise SettingError(
            "name at least one method that uses the memory, and each only once: choose among "
            f"{', '.join(MEMORY_METHODS)}, {IN_CONTEXT}, or {IN_CONTEXT}+ one of these"
        )
    return names


def variations(
    memory: Memory,
    methods: Sequence[str],
    min_knns: Sequence[float],
    skip: Sequence[float],
    search: Search,
    passages: Mapping[str, int | None],
) -> list[Variation]:
    """Every method at every value, values ascending; `passages` are settings of methods with some.

    Raises:
        SettingError: a value is out of range, or a method lacks its gate or the memory's keys.
    """
    check_settings([IN_CONTEXT], passages)
    check_settings(methods, passages)
    for share in skip:  # which random skipping needs too
        Settings(skip=share)
    values: dict[str | None, list[float | None]] = {
        "min_knns": [*sorted(set(min_knns))],
        "skip": [*sorted(set(skip))],
        None: [None],
    }
    varied = []
    for method in methods:
        if _searches(method):
            memory.keys_record  # noqa: B018  refuses a memory without keys
        gate, setting = load_gate(memory, method), varied_setting(method)
        for value in values[setting]:
            given: dict[str, Any] = {} if setting is None else {setting: value}
            given |= passages if method_named(method).in_context else {}
            settings = resolve_settings(method, memory, **given)
            looks_up = bool(method_named(method).kinds)
            lookup = Lookup(memory, method, settings, gate, search) if looks_up else None
            varied.append(Variation(method, setting, value, settings, lookup))
    return varied


def checked_values(
    methods: Sequence[str], setting: str, given: Sequence[float] | None, default: Sequence[float]
) -> list[float]:
    """The values given for a setting that some method varies, or the default.

    Raises:
        SettingError: none is given, or no method varies it.
    """
    if given is None:
        return list(default)
    if not given:
        raise SettingError(f"no value of {setting} is given: give at least one, or leave it out")
    if not any(varied_setting(m) == setting or (m, setting) == (KNN, "skip") for m in methods):
        raise SettingError(f"{setting} is given, but {' and '.join(methods)} do not vary it")
    return list(given)


def varied_setting(method: str) -> str | None:
    """The setting that decides how often a method searches, if there is one."""
    settings = method_named(method).settings
    return next((name for name in ("skip", "min_knns") if name in settings), None)


def _searches(method: str) -> bool:
    return "dense" in method_named(method).kinds
