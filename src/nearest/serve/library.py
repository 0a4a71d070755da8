"""The methods that requests ask of the served memories.

Requests that ask for the same share one `Ensemble`, and with it their searches.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nearest.errors import FolderError, NearestError, RemoteError, SettingError
from nearest.memory import Memory
from nearest.remote.memory import RemoteMemory
from nearest.retrieval.ensemble import Ensemble
from nearest.retrieval.lookup import Lookup
from nearest.retrieval.settings import (
    BASE,
    IN_CONTEXT,
    MEMORY_METHODS,
    as_stored,
    from_json,
    resolve_settings,
)
from nearest.serve.beside import AS_IT_IS, Reading
from nearest.serve.errors import ApiError
from nearest.serve.readings import RETRO, Readings, of_method
from nearest.serve.schema import NearestOptions
from nearest.serve.shelf import Shelf, version_of
from nearest.store.snapshot import Snapshot

_KEPT_ENSEMBLES = 64
_KEPT_LARGE = 4  # of those that hold something of their own as long as a memory
_NO_MEMORY = Ensemble((), ())


@dataclass(frozen=True)
class Retrieval:
    """What a request looks up: each memory by name and number, in one version.

    Attributes:
        method: of all memories.
        settings: of the method, as answers tell them.
        names: of the memories, by their numbers in the ensemble.
        memories: opened, by number.
        ensemble: of no memory where none is mixed, as with "base".
        reading: what is read beside the text.
        start_token: that texts are read after; None where they are read as they are.
        large: it holds something of its own as long as a memory: which documents are left out, or
            passages.
    """

    method: str
    settings: Mapping[str, Any]
    names: tuple[str, ...]
    memories: tuple[Memory, ...]
    ensemble: Ensemble
    reading: Reading
    start_token: int | None
    large: bool = False

    def described(self) -> dict[str, Any]:
        """As answers tell it."""
        weights = self.ensemble.weights or (0.0,) * len(self.memories)
        return {
            "version": 1,
            "method": self.method,
            "settings": dict(self.settings),
            "memories": [
                {"name": name, "version": version_of(memory), "weight": weight}
                for name, memory, weight in zip(self.names, self.memories, weights, strict=True)
            ],
        }


class Library(Shelf):
    """Memories by name, and methods that look them up; several threads may use it."""

    def __init__(
        self,
        memories: Sequence[Memory],
        method: str | None,
        settings: Mapping[str, Any],
        readings: Readings,
        start_token: int,
    ) -> None:
        super().__init__(memories)
        self._readings = readings
        self._start_token = start_token
        self.methods = [BASE, *self._possible()]
        if method is None:
            preferred = (RETRO, "hybrid", "knn", "suffix")
            method = next(m for m in preferred if m in self.methods)
        if method not in self.methods:
            raise SettingError(
                f"method {method!r} cannot be served with these memories: choose among "
                f"{', '.join(self.methods)}"
            )
        self.method = method
        self._settings = dict(settings)
        self._ensembles: OrderedDict[Any, Retrieval] = OrderedDict()
        try:
            self.retrieval(method, None)
        except ApiError as error:  # before anything is served
            raise SettingError(error.message) from error

    def _changed(self, name: str) -> None:
        for key in [k for k, one in self._ensembles.items() if name in one.names]:
            del self._ensembles[key]

    def method_of(self, method: str | None, options: NearestOptions | None) -> str:
        """The method that a request asks for, by the name of its model or in its options.

        Raises:
            ApiError: it asks for two, or for one that is not served.
        """
        asked = None if options is None else options.method
        if None not in (method, asked) and method != asked:
            raise ApiError(
                400,
                f"model asks for the method {method}, and nearest.method for {asked}: "
                "name one of them",
                param="nearest.method",
            )
        method = asked or method or self.method
        if method not in self.methods:
            raise ApiError(
                400,
                f"method {method!r} is not served: choose among {', '.join(self.methods)}",
                param="nearest.method",
            )
        return method

    def retrieval(self, method: str | None, options: NearestOptions | None) -> Retrieval:
        """What a request looks up.

        Raises:
            ApiError: a memory, method, document or setting is unknown or out of range.
        """
        options = options or NearestOptions.model_validate({})
        method = self.method_of(method, options)
        if method == BASE:
            return self._base(options)
        names, weights = self._weighted(options, mixed=of_method(method)[1] != BASE)
        memories = tuple(self.memory(name, "nearest.memories") for name in names)
        settings = options.settings or (self._settings if method == self.method else {})
        given = from_json(settings)
        without = tuple(sorted({(one.memory, one.id) for one in options.without}))
        key = (
            method,
            tuple(sorted(given.items())),
            tuple(zip(names, map(version_of, memories), weights, strict=True)),
            without,
        )
        with self._lock:
            made = self._ensembles.get(key)
            if made is not None:
                self._ensembles.move_to_end(key)
        if made is None:
            made = self._made(method, given, names, memories, weights, without)
            with self._lock:
                self._ensembles[key] = made
                self._forget_oldest()
        if options.replay and not made.ensemble.keeps_state:
            raise ApiError(
                400,
                f"{method} with these settings has no state that a prompt's replay could change: "
                "leave this out",
                param="nearest.replay",
            )
        return made

    def _forget_oldest(self) -> None:
        if len(self._ensembles) > _KEPT_ENSEMBLES:
            self._ensembles.popitem(last=False)
        large = [key for key, one in self._ensembles.items() if one.large]
        for key in large[:-_KEPT_LARGE]:
            del self._ensembles[key]

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

    def settings_of(self, method: str) -> dict[str, Any]:
        """The settings that a method has where a request gives none."""
        memory = self.memory(self.names[0])
        return self._settings_told(method, memory, self._settings if method == self.method else {})

    def _settings_told(
        self, method: str, memory: Memory, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A method's settings as answers tell them: as given, else as a memory was tuned."""
        way, of_memory = of_method(method)
        told: dict[str, Any] = {}
        if way == RETRO:
            told = self._readings.neighbour_settings(given)
            given = {name: value for name, value in given.items() if name not in told}
            method = of_memory
            if method == BASE and given:
                raise SettingError(
                    f"{min(given)!r} is no setting of {RETRO}: choose among {', '.join(told)}"
                )
        if method != BASE:
            told |= as_stored(resolve_settings(method, memory, **given), method)
        return told

    def _possible(self) -> Iterator[str]:
        """Methods other than the model alone."""
        looked_up = [method for method in MEMORY_METHODS if self._can(method)]
        if self._readings.search is not None:
            yield RETRO
            yield from (f"{RETRO}+{method}" for method in looked_up)
        if self._readings.keys_alone:
            yield from looked_up
        if not any(isinstance(memory, RemoteMemory) for memory in self._memories.values()):
            yield IN_CONTEXT
            if self._readings.keys_alone:
                both = (f"{IN_CONTEXT}+{method}" for method in MEMORY_METHODS)
                yield from filter(self._can, both)

    def _can(self, method: str) -> bool:
        try:
            for memory in self._memories.values():
                Lookup.of(memory, method, resolve_settings(method, memory))
        except NearestError:
            return False
        return True

    def _base(self, options: NearestOptions) -> Retrieval:
        for field in ("settings", "memories", "without", "replay"):
            if getattr(options, field):
                raise ApiError(
                    400,
                    "the method base looks nothing up: leave this out",
                    param=f"nearest.{field}",
                )
        return Retrieval(BASE, {}, (), (), _NO_MEMORY, AS_IT_IS, self._start_token)

    def _weighted(
        self, options: NearestOptions, *, mixed: bool
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        chosen = options.memories
        if not mixed and any(one.weight is not None for one in chosen or ()):
            raise ApiError(
                400,
                "the method mixes no memory with the model: leave weights out",
                param="nearest.memories",
            )
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
            made = self._looked_up(method, settings, names, memories, weights)
            return replace(made, large=bool(without) or of_method(method)[0] == IN_CONTEXT)
        except (FolderError, RemoteError) as error:
            raise ApiError(503, str(error), headers={"Retry-After": "5"}) from error
        except (NearestError, TypeError, ValueError) as error:
            param = "nearest.memories" if "weights sum" in str(error) else "nearest.settings"
            raise ApiError(400, str(error), param=param) from error

    def _looked_up(
        self,
        method: str,
        given: Mapping[str, Any],
        names: tuple[str, ...],
        memories: tuple[Memory, ...],
        weights: tuple[float, ...],
    ) -> Retrieval:
        """A method with its settings; NearestError where they make no sense."""
        way, of_memory = of_method(method)
        told = self._settings_told(method, memories[0], given)
        reading: Reading = AS_IT_IS
        start: int | None = self._start_token
        mixed = method  # whose settings those of a memory are
        if way == RETRO:
            near = self._readings.neighbour_settings(given)
            given = {name: value for name, value in given.items() if name not in near}
            mixed = of_memory
            reading = with_neighbours = self._readings.neighbours(
                memories, near, looked_up=of_memory != BASE
            )
            start = with_neighbours.start_token
        elif way == IN_CONTEXT:
            chosen = resolve_settings(method, memories[0], **given)
            reading = self._readings.passages(memories, chosen)
        ensemble = _NO_MEMORY
        if of_memory != BASE:
            ensemble = Ensemble.of(list(memories), mixed, weights, **given)
        return Retrieval(method, told, names, memories, ensemble, reading, start)
