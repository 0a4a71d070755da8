"""The methods that requests ask of the served memories.

Requests that ask for the same share one `Ensemble`, and with it their searches.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearest.errors import NearestError, SettingError
from nearest.memory import Memory
from nearest.remote.memory import RemoteMemory
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import BASE, MEMORY_METHODS, check_method, resolve_settings
from nearest.serve.errors import ApiError
from nearest.serve.schema import NearestOptions
from nearest.serve.shelf import Shelf, version_of
from nearest.store.snapshot import Snapshot

_KEPT_ENSEMBLES = 64


@dataclass(frozen=True)
class Retrieval:
    """What a request looks up: each memory by name and number, in one version.

    Attributes:
        method: of all memories.
        names: of the memories, by their numbers in the ensemble.
        memories: opened, by number.
        ensemble: of no memory where the method is "base".
    """

    method: str
    names: tuple[str, ...]
    memories: tuple[Memory, ...]
    ensemble: Ensemble

    def described(self) -> dict[str, Any]:
        """As answers tell it."""
        lookups = self.ensemble.lookups
        settings = lookups[0].settings.of(self.method) if lookups else {}
        return {
            "version": 1,
            "method": self.method,
            "settings": {k: "inf" if v == float("inf") else v for k, v in settings.items()},
            "memories": [
                {"name": name, "version": version_of(memory), "weight": weight}
                for name, memory, weight in zip(
                    self.names, self.memories, self.ensemble.weights, strict=True
                )
            ],
        }


class Library(Shelf):
    """Memories by name, and methods that look them up; several threads may use it."""

    def __init__(
        self, memories: Sequence[Memory], method: str | None, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(memories)
        self.methods = [BASE, *(m for m in MEMORY_METHODS if self._can(m))]
        if method is None:
            preferred = ("hybrid", "knn", "suffix")
            method = next(m for m in preferred if m in self.methods)
        check_method(method, (BASE, *MEMORY_METHODS))
        self.method = method
        self._settings = dict(settings)
        self._ensembles: OrderedDict[Any, Retrieval] = OrderedDict()
        self.retrieval(
            method, None
        )  # refuses settings that make no sense before anything is served

    def _changed(self, name: str) -> None:
        for key in [k for k, one in self._ensembles.items() if name in one.names]:
            del self._ensembles[key]

    def retrieval(self, method: str | None, options: NearestOptions | None) -> Retrieval:
        """What a request looks up.

        Raises:
            ApiError: a memory, method, document or setting is unknown or out of range.
        """
        options = options or NearestOptions.model_validate({})
        method = options.method or method or self.method
        if method not in self.methods:
            raise ApiError(
                400,
                f"method {method!r} is not served: choose among {', '.join(self.methods)}",
                param="nearest.method",
            )
        if method == BASE:
            return self._base(options)
        names, weights = self._weighted(options)
        memories = tuple(self.memory(name, "nearest.memories") for name in names)
        settings = options.settings or (self._settings if method == self.method else {})
        given = {k: float(v) if v == "inf" else v for k, v in settings.items()}
        without = tuple(sorted({(one.memory, one.id) for one in options.without}))
        key = (
            method,
            tuple(sorted(given.items())),
            tuple(zip(names, map(version_of, memories), weights, strict=True)),
            without,
        )
        with self._lock:
            if (known := self._ensembles.get(key)) is not None:
                self._ensembles.move_to_end(key)
                return known
        made = self._made(method, given, names, memories, weights, without)
        with self._lock:
            self._ensembles[key] = made
            if len(self._ensembles) > _KEPT_ENSEMBLES:
                self._ensembles.popitem(last=False)
            return made

    def _without(self, memory: Memory, name: str, ids: Sequence[str]) -> Memory:
        """A memory as it would be without some documents; nothing is written."""
        if not ids:
            return memory
        if isinstance(memory, RemoteMemory):
            raise ApiError(
                400,
                f"memory {name!r} is held by another server, so that no document can be left out",
                param="nearest.without",
            )
        hidden: list[list[int]] = [[] for _ in memory.segments]
        for one, stored in zip(ids, self.stored_ids(memory).find(ids), strict=True):
            if stored is None:
                raise ApiError(
                    400, f"memory {name!r} has no document {one!r}", param="nearest.without"
                )
            hidden[stored.segment].append(stored.number)
        if len(ids) >= memory.documents:
            raise ApiError(
                400, f"nothing of memory {name!r} would be left", param="nearest.without"
            )
        segments = [
            segment.without(numbers) if numbers else segment
            for segment, numbers in zip(memory.segments, hidden, strict=True)
        ]
        without = Snapshot(memory.path, memory.manifest, segments)
        return Memory(without, memory.search_on, memory)

    def _can(self, method: str) -> bool:
        try:
            for memory in self._memories.values():
                Lookup.of(memory, method, resolve_settings(method, memory))
        except NearestError:
            return False
        return True

    def _base(self, options: NearestOptions) -> Retrieval:
        for field in ("settings", "memories", "without"):
            if getattr(options, field):
                raise ApiError(
                    400,
                    "the method base looks nothing up: leave this out",
                    param=f"nearest.{field}",
                )
        return Retrieval(BASE, (), (), Ensemble((), ()))

    def _weighted(self, options: NearestOptions) -> tuple[tuple[str, ...], tuple[float, ...]]:
        chosen = options.memories
        if chosen is None:
            names = self.names
            return tuple(names), (1 / len(names),) * len(names)
        weights = [one.weight for one in chosen]
        if all(weight is None for weight in weights):
            return tuple(one.name for one in chosen), (1 / len(chosen),) * len(chosen)
        if any(weight is None for weight in weights):
            raise ApiError(
                400, "give every memory a weight, or none of them", param="nearest.memories"
            )
        return tuple(one.name for one in chosen), tuple(w for w in weights if w is not None)

    def _made(
        self,
        method: str,
        settings: Mapping[str, Any],
        names: tuple[str, ...],
        memories: tuple[Memory, ...],
        weights: tuple[float, ...],
        without: tuple[tuple[str, str], ...],
    ) -> Retrieval:
        if len(set(names)) < len(names):
            raise ApiError(400, "a memory is named twice", param="nearest.memories")
        if unknown := {name for name, _ in without} - set(names):
            raise ApiError(
                400, f"no memory {min(unknown)!r} is looked up here", param="nearest.without"
            )
        memories = tuple(
            self._without(memory, name, [i for n, i in without if n == name])
            for name, memory in zip(names, memories, strict=True)
        )
        try:
            ensemble = Ensemble.of(list(memories), method, weights, **settings)
        except (SettingError, TypeError, ValueError) as error:
            param = "nearest.memories" if "weight" in str(error) else "nearest.settings"
            raise ApiError(400, str(error), param=param) from error
        return Retrieval(method, names, memories, ensemble)
